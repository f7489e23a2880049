"""--compile: one graph, the same numbers, the same names, and no compilation twice."""

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from launch import TINY, launch, wait
from runs import records
from torch._dynamo.testing import CompileCounterWithBackend

import main_finetune
import main_pretrain
import util.train.dist
from models_zoo import create_model
from util.config.flags import FlagParser, add_optimisation_flags, add_shard_flag, compiles
from util.errors import BadInput
from util.train.checkpoint import LAST, load_file
from util.train.dist import Processes, distribute

ALONE = Processes(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No graph of another test; and a second compilation of a function is an error."""
    torch._dynamo.reset()
    # One compiling thread: more are processes of their own, which import torch first.
    one_thread = torch._inductor.config.patch(compile_threads=1)
    with torch._dynamo.config.patch(error_on_recompile=True), one_thread:
        yield
    torch._dynamo.reset()


def without_inductor() -> None:
    """Trace and differentiate as ever, but do not generate code: that takes a minute."""
    compile_model = torch.compile

    @functools.wraps(compile_model)
    def traced(model: torch.nn.Module, *, options: object, **kwargs: object) -> object:
        return compile_model(model, backend="aot_eager", **kwargs)

    torch.compile = traced  # type: ignore[assignment]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", torch.compile)  # restored afterwards
    without_inductor()


def test_inductor_gives_the_same_numbers() -> None:
    torch.manual_seed(0)
    model = create_model(
        "mae_vit_micro_patch4", img_size=16, depth=1, decoder_depth=1, lscale_init=0.1,
        pos_offset="learned", norm_pix_loss=True,
    )  # fmt: skip
    trained = distribute(model, ALONE, compiled=True)
    images = torch.randn(4, 3, 16, 16)
    mask = torch.rand(4, 16).argsort(1) >= 4
    results = []
    for each in (model, trained):
        loss = each(images, mask, 4)["loss"]
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append((loss.detach(), gradients))
        model.zero_grad(set_to_none=True)
    (loss, gradients), (compiled_loss, compiled_gradients) = results
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=0)
    largest = max(g.norm() for g in gradients.values())
    for name, gradient in gradients.items():
        difference = (compiled_gradients[name] - gradient).norm()
        assert difference <= 1e-5 * max(gradient.norm(), 1e-2 * largest), name
    assert all("_orig_mod" not in name for name in model.state_dict())


@pytest.mark.parametrize("kind", ["cross", "jitter", "classifier"])
def test_one_graph_for_all_steps_and_none_for_evaluation(kind: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    small = {"img_size": 16, "depth": 1}
    if kind == "classifier":
        model = create_model("vit_micro_patch4", num_classes=3, drop_path=0.5, **small)
    else:
        terms = {"decoder": "cross", "predict_ratio": 0.5} if kind == "cross" else {}
        terms |= {"pos_offset": "jitter"} if kind == "jitter" else {}
        model = create_model("mae_vit_micro_patch4", decoder_depth=1, **small, **terms)
    trained = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    for seed in range(3):
        torch.manual_seed(seed)
        images, mask = torch.randn(2, 3, 16, 16), torch.rand(2, 16).argsort(1) >= 4
        given = (images, mask, 4, torch.rand(2, 2) if kind == "jitter" else None, torch.rand(2, 16))
        trained.train()
        out = trained(*(given if kind != "classifier" else (images,)))
        (out.sum() if kind == "classifier" else out["loss"]).backward()
        model.eval()
        with torch.inference_mode():  # another batch, as an evaluation's last one
            one = [x[:1] if isinstance(x, torch.Tensor) else x for x in given]
            model(*(one if kind != "classifier" else one[:1]))
    assert counter.frame_count == 1


@pytest.mark.smoke
@pytest.mark.usefixtures("traced")
def test_pretraining_with_it_is_the_same_run(tmp_path: Path) -> None:
    flags = ["--eval_every=1", "--eval_images=5", "--picture_every=1", "--epochs=2"]
    for name in ("--compile", "--no-compile"):
        main_pretrain.main([*TINY, *flags, name, f"--output_dir={tmp_path / name}"])
    one, other = (records(tmp_path / name, "train") for name in ("--compile", "--no-compile"))
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in other], rel=1e-5)
    states = [load_file(tmp_path / name / LAST) for name in ("--compile", "--no-compile")]
    assert states[0]["model"].keys() == states[1]["model"].keys()
    # Rounding only, as another device: the other way goes on from the same checkpoint.
    flags[-1] = "--epochs=3"
    with pytest.raises(SystemExit):  # epochs are arithmetic, and said to be
        main_pretrain.main([*TINY, *flags, f"--output_dir={tmp_path / '--compile'}"])
    flags[-1] = "--epochs=2"
    main_pretrain.main([*TINY, *flags, "--no-compile", f"--output_dir={tmp_path / '--compile'}"])


@pytest.mark.smoke
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("tune", ["full", "linear"])
def test_fine_tuning_with_it_is_the_same_run(tmp_path: Path, tune: str) -> None:
    flags = [
        "--dataset=digits", "--model=vit_micro_patch4", "--input_size=8", "--batch_size=48",
        f"--tune={tune}", "--epochs=2", "--warmup_epochs=0", "--num_workers=0", "--device=cpu",
        "--train_images=96", "--aa=none", "--reprob=0", "--log_every=1", "--drop_path=0.3",
    ]  # fmt: skip
    found = []
    for name in ("--compile", "--no-compile"):
        main_finetune.main([*flags, name, f"--output_dir={tmp_path / name}"])
        path = tmp_path / name / "metrics-finetune.jsonl"
        (tmp_path / name / "metrics.jsonl").write_text(path.read_text())
        found.append([r["loss"] for r in records(tmp_path / name, "train")])
    assert len(found[0]) == 4 and found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.dist
def test_two_processes_with_it_are_one_without(tmp_path: Path) -> None:
    flags = [*TINY, "--epochs=1", "--log_every=1", "--batch_size=12"]
    two = launch(
        [*flags, "--compile", f"--output_dir={tmp_path}/two"], tmp_path / "log", 2,
        prepare=without_inductor,
    )  # fmt: skip
    assert wait(two) == [0, 0], (tmp_path / "log").read_text()
    main_pretrain.main([*flags, "--accum_iter=2", f"--output_dir={tmp_path}/one"])
    one, other = (records(tmp_path / name, "train") for name in ("one", "two"))
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in other], rel=1e-4)


PROBE = [
    "--dataset=digits", "--model=vit_micro_patch4", "--input_size=8", "--tune=linear",
    "--epochs=1", "--warmup_epochs=0", "--num_workers=0", "--device=cpu", "--train_images=96",
    "--log_every=1", "--compile", "--eval_every=0", "--blr=1",
]  # fmt: skip


@pytest.mark.dist
@pytest.mark.usefixtures("traced")
def test_probe_with_it_on_two_processes_has_the_batch_norm_of_both(tmp_path: Path) -> None:
    log, two, one = tmp_path / "log", tmp_path / "two", tmp_path / "one"
    flags = [*PROBE, "--batch_size=24", f"--output_dir={two}"]
    children = launch(flags, log, 2, module="main_finetune", prepare=without_inductor)
    assert wait(children) == [0, 0], log.read_text()
    main_finetune.main([*PROBE, "--batch_size=48", f"--output_dir={one}"])
    models = [load_file(folder / LAST)["model"] for folder in (one, two)]
    torch.testing.assert_close(*models, rtol=1e-4, atol=1e-6)


def test_flag_and_recipe(tmp_path: Path) -> None:
    parser = FlagParser()
    add_optimisation_flags(parser)
    assert parser.parse([]).compile is None
    for value in (True, False, None):
        recipe = tmp_path / "r.yaml"
        recipe.write_text(f"compile: {'null' if value is None else str(value).lower()}\n")
        assert parser.parse(["--config", str(recipe)]).compile is value
    assert parser.parse(["--config", str(recipe), "--compile"]).compile is True
    assert parser.parse(["--compile", "--no-compile"]).compile is False


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(util.train.dist.shutil, "which", lambda name: None)
    with pytest.raises(BadInput, match="--no-compile"):
        distribute(torch.nn.Linear(1, 1), ALONE, compiled=True)


def test_shards_are_not_compiled() -> None:
    parser = FlagParser(description="")
    add_optimisation_flags(parser)
    add_shard_flag(parser)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert compiles(parser.parse([]), gpu) and not compiles(parser.parse([]), cpu)
    assert compiles(parser.parse(["--compile"]), cpu)
    assert not compiles(parser.parse(["--shard"]), gpu)
    assert not compiles(parser.parse(["--shard", "--no-compile"]), gpu)
    with pytest.raises(BadInput, match="--shard does not go with --compile"):
        compiles(parser.parse(["--shard", "--compile"]), gpu)
