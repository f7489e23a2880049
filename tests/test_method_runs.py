"""SimMIM and Pixio through the commands: training, resuming, tuning, files of other programs."""

import pickle
import sys
import types
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch, wait
from registries import registered_apart
from runs import records
from stopped_runs import stopping
from test_plugins import say_what_it_sees
from torch import Tensor, nn

import models_zoo
from models_simmim import SimMIM
from models_swin import SwinTransformer
from models_vit_relative import RelativeVisionTransformer
from util.errors import BadInput
from util.mask.relative import resize_bias
from util.plugins import load_plugin
from util.train.checkpoint import LAST, load_file, write_signed
from util.weights.files import load_state

PLUGINS = Path(__file__).parent / "plugins"
KNOWN = ["--plugin", *(str(PLUGINS / f"{name}.py") for name in ("simmims", "pixios", "pieces"))]
SIMMIM = ["simmim_swin_nano", "simmim_vit_nano"]
MODELS = [*SIMMIM, "pixio_vit_nano"]
RUN = ["--dataset=ramps", "--log_every=1", "--num_workers=0", "--device=cpu"]
# 24 images in batches of 6 are 4 steps an epoch.
TRAIN = [*RUN, "--batch_size=6", "--epochs=2", "--warmup_epochs=1", "--blr=0.1"]


@pytest.fixture(autouse=True)
def apart() -> Iterator[None]:
    """The small models are registered, and gone after each test."""
    with registered_apart():
        for path in KNOWN[1:]:
            load_plugin(Path(path))
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run of each model that is asked for; the tests read it."""
    import main_pretrain

    @cache
    def run(model: str) -> Path:
        folder = tmp_path_factory.mktemp(model)
        with registered_apart():
            main_pretrain.main(
                [*KNOWN, f"--model={model}", *TRAIN, "--picture_every=1", "--eval_every=1",
                 "--eval_images=8", f"--output_dir={folder}"]
            )  # fmt: skip
        return folder

    return run


@pytest.fixture(params=MODELS)
def method(request: pytest.FixtureRequest, runs: Callable[[str], Path]) -> Path:
    """A run of each method and encoder."""
    return runs(request.param)


@pytest.fixture(params=SIMMIM)
def trained(request: pytest.FixtureRequest, runs: Callable[[str], Path]) -> Path:
    """A run of SimMIM with each of its encoders."""
    return runs(request.param)


def pretrain(model: str, folder: Path, run_main: Any, *more: str) -> dict[str, Any]:
    words = [*KNOWN, f"--model={model}", *TRAIN, "--picture_every=0", *more]
    code, _, err = run_main("main_pretrain", [*words, f"--output_dir={folder}"])
    assert code in (0, 75), err
    return load_file(folder / LAST)


# ---- Pretraining -------------------------------------------------------------------------------


@pytest.mark.smoke
def test_it_learns_is_measured_and_drawn(method: Path) -> None:
    losses = [r["loss"] for r in records(method, "train")]
    assert len(losses) == 8 and losses[-1] < losses[0]
    measured = records(method, "eval")
    assert len(measured) == 2 and all(r["own_mask_model_psnr"] > 0 for r in measured)
    assert (method / "pictures" / "epoch-1.png").is_file()


@pytest.mark.smoke
def test_the_recipe_is_preset(trained: Path) -> None:
    """What `--method simmim` says, and the rates that the schedule of its code gives."""
    settings = load_file(trained / LAST)["arithmetic"]
    expected = {
        "mask": "random", "mask_ratio": 0.6, "betas": [0.9, 0.999], "clip_grad": 5.0,
        "crop_scale": [0.67, 1.0], "interpolation": "bilinear", "schedule": "full_cosine",
        "lr_batch": 512, "warmup_lr": 1e-6, "min_lr": 1e-5, "weight_decay": 0.05,
    }  # fmt: skip
    assert {name: settings[name] for name in expected} == expected
    assert settings["mask_cell"] == [4 if "swin" in str(trained) else 2]
    rates = [r["lr"] for r in records(trained, "train")]
    scale = 6 / 512
    assert rates[0] == pytest.approx(1e-6 * scale)
    assert max(rates) < 0.1 * scale  # the cosine has begun to fall when the warm-up ends


@pytest.mark.smoke
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("step", [2, 6])
def test_it_resumes_in_the_same_bits(model: str, step: int, tmp_path: Path, run_main: Any) -> None:
    """Stopped in the middle of either epoch; of the transformer with what drops its paths."""
    whole = pretrain(model, tmp_path / "whole", run_main)
    with stopping(step):
        stopped = pretrain(model, tmp_path / "part", run_main)
    assert stopped["step"] == step
    resumed = pretrain(model, tmp_path / "part", run_main)
    assert resumed["step"] == whole["step"] == 8
    for name, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][name]), name
    for key, state in whole["optimizer"]["state"].items():
        again = resumed["optimizer"]["state"][key]
        assert all(torch.equal(state[n], again[n]) for n in state), key


@pytest.mark.dist
@pytest.mark.parametrize("model", MODELS)
def test_it_trains_alike_however_a_batch_is_divided(model: str, tmp_path: Path) -> None:
    """On two processes, in micro-batches, in shards, compiled, recomputed: as at once."""
    ways = {
        "at once": (1, ["--batch_size=6"]),
        "processes": (2, ["--batch_size=3"]),
        "micro-batches": (1, ["--batch_size=2", "--accum_iter=3"]),
        "shards": (2, ["--batch_size=3", "--shard"]),
        "recomputed": (1, ["--batch_size=6", "--grad_checkpointing"]),
        "compiled": (1, ["--batch_size=6", "--compile"]),
    }
    losses = {}
    for name, (world, own) in ways.items():
        flags = [*KNOWN, f"--model={model}", *RUN, "--epochs=2", "--warmup_epochs=1", "--blr=0.05"]
        flags += ["--picture_every=0", "--eval_every=2", "--eval_images=8"]
        flags += [*own, f"--output_dir={tmp_path / name}"]
        assert set(wait(launch(flags, tmp_path / f"out {name}", world))) == {0}, name
        losses[name] = [r["loss"] for r in records(tmp_path / name, "train")]
        losses[name] += [r["model_psnr"] for r in records(tmp_path / name, "eval")]
    assert len(losses["at once"]) == 9
    for name in ways:
        assert losses["at once"] == pytest.approx(losses[name], rel=1e-3), name


@pytest.mark.smoke
@pytest.mark.parametrize("model", ["simmim_vit_nano", "pixio_vit_nano"])
def test_drop_path_is_a_flag(model: str, tmp_path: Path, run_main: Any) -> None:
    """The default is the model's; without it a run is another."""
    states = {
        flag: pretrain(model, tmp_path / str(i), run_main, *flag.split())
        for i, flag in enumerate(("", "--drop_path=0", "--drop_path=0.3"))
    }
    name = f"{'encoder.' if 'simmim' in model else ''}blocks.2.mlp.fc1.weight"
    found = {flag: state["model"][name] for flag, state in states.items()}
    assert torch.equal(found[""], found["--drop_path=0.3"])
    assert not torch.equal(found[""], found["--drop_path=0"])
    assert states["--drop_path=0"]["model_args"]["drop_path"] == 0


@pytest.mark.smoke
def test_sizes_are_flags(tmp_path: Path, run_main: Any) -> None:
    sizes = ["--patch_size=4", "--window_size=2", "--mask_cell=2"]
    state = pretrain("simmim_swin_nano", tmp_path / "a", run_main, *sizes)
    assert (state["model_args"]["patch_size"], state["model_args"]["window_size"]) == (4, 2)
    assert state["model"]["encoder.patch_embed.proj.weight"].shape == (16, 3, 4, 4)
    assert len(state["model"]["encoder.layers.0.blocks.0.attn.relative_position_bias_table"]) == 9
    words = [*KNOWN, "--model=simmim_vit_nano", *TRAIN, "--window_size=2"]
    code, _, err = run_main("main_pretrain", [*words, f"--output_dir={tmp_path / 'b'}"])
    assert code == 2 and "has no windows" in err


@pytest.mark.smoke
@pytest.mark.parametrize("flag", ["--help", "--help_all"])
def test_help_knows_what_the_method_presets(flag: str, run_main: Any) -> None:
    code, out, _ = run_main("main_pretrain", ["--method=simmim", flag])
    assert code == 0 and "simmim_swin_base_patch4_window6" in out
    assert "norm_pix_loss" not in out and "(default: 0.6)" in " ".join(out.split())


@pytest.mark.smoke
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(model: str, precision: str, tmp_path: Path, run_main: Any) -> None:
    losses = []
    for name in ("fp32", precision):
        pretrain(model, tmp_path / name, run_main, f"--precision={name}")
        losses.append([r["loss"] for r in records(tmp_path / name, "train")])
    assert losses[0] == pytest.approx(losses[1], rel=3e-2) and losses[0] != losses[1]


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mask_cell=3"], "does not divide the grid"),
        (["--input_size=36"], "is not a multiple of"),
        (["--mask_ratio=0.99", "--mask_cell=8"], "hides all"),
        (["--method=mae"], "invalid choice: 'mae'"),
        (["--norm_pix_loss"], "unknown argument --norm_pix_loss"),
    ],
)
def test_refusals(flags: list[str], message: str, tmp_path: Path, run_main: Any) -> None:
    words = [*KNOWN, "--model=simmim_swin_nano", *TRAIN, *flags, f"--output_dir={tmp_path / 'r'}"]
    code, _, err = run_main("main_pretrain", words)
    assert code == 2 and message in err, err


# ---- What follows ------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("tune", ["full", "partial:2", "partial:0.5", "linear"])
def test_it_is_tuned_and_evaluated(tune: str, method: Path, tmp_path: Path, run_main: Any) -> None:
    words = [*KNOWN, f"--finetune={method}", *RUN, "--batch_size=6", "--epochs=1",
             "--warmup_epochs=0", "--global_pool", f"--tune={tune}"]  # fmt: skip
    code, out, err = run_main("main_finetune", [*words, f"--output_dir={tmp_path / 'run'}"])
    assert code == 0, err
    if "simmim_vit" in str(method):
        assert "fitted   the table of relative positions is copied into every block" in out + err
    if "simmim" in str(method):
        beside = ["mask_token", "decoder.* 2", *(["norm.* 2"] if "vit" in str(method) else [])]
        said = next(line for line in (out + err).splitlines() if "  left  " in line)
        assert all(name in said for name in beside) and "rel_pos_bias" not in said
        assert f"(pretrain, {load_file(method / LAST)['model_name']}, epoch 1, step 8)" in out + err
        assert "  new      " in out + err and "head.*" in out + err
    learned = {
        name
        for name, tensor in load_file(tmp_path / "run" / LAST)["model"].items()
        if name in (kept := load_state(str(method))["model"])
        and not torch.equal(tensor, kept[name])
    }
    if tune == "partial:0.5" and "simmim" in str(method):
        *_, last = models_zoo.load_classifier(str(method))[0].stages
        parts = {name.removeprefix(f"{last}.").split(".")[0] for name in learned
                 if name.startswith(last)}  # fmt: skip
        assert parts == {"norm2", "mlp"} | ({"gamma_2"} if "vit" in str(method) else set())
        assert all(name.startswith((last, "norm.")) for name in learned)
    say_what_it_sees(KNOWN, tmp_path / "run" / LAST, tmp_path, run_main)
    shown = [*KNOWN, f"--checkpoint={tmp_path / 'run'}", "--dataset=ramps", "--device=cpu"]
    code, _, err = run_main("main_visualize", [*shown, f"--output_dir={tmp_path / 'seen'}"])
    assert code == 2 and "encoder-only weights cannot reconstruct" in err
    again = [*KNOWN, "--eval", f"--resume={tmp_path / 'run' / LAST}", *RUN, "--batch_size=6"]
    code, _, err = run_main("main_finetune", [*again, f"--output_dir={tmp_path / 'again'}"])
    assert code == 0, err


@pytest.mark.smoke
def test_its_features_are_measured_and_its_pictures_drawn(
    method: Path, tmp_path: Path, run_main: Any
) -> None:
    for main, flags in {
        "main_knn": ["--k=3", "--num_workers=0"],
        "main_visualize": ["--num_images=2"],
    }.items():
        words = [*KNOWN, f"--checkpoint={method}", "--dataset=ramps", "--device=cpu", *flags]
        code, _, err = run_main(main, [*words, f"--output_dir={tmp_path / main}"])
        assert code == 0, (main, err)


@pytest.mark.smoke
def test_a_probe_behind_an_early_block(trained: Path, tmp_path: Path, run_main: Any) -> None:
    """The head reads the mean of block 2's tokens, as a model of two blocks computes them."""
    words = [*KNOWN, f"--finetune={trained}", *RUN, "--batch_size=6", "--epochs=1",
             "--warmup_epochs=0", "--global_pool", "--tune=linear"]  # fmt: skip
    code, _, err = run_main(
        "main_finetune", [*words, "--probe_block=2", f"--output_dir={tmp_path / 'run'}"]
    )
    if "swin" in str(trained):
        assert code == 2 and "of several widths" in err
        return
    assert code == 0, err
    state = load_file(tmp_path / "run" / LAST)
    assert state["model_args"]["depth"] == 2
    whole, _, _ = models_zoo.load_classifier(str(trained), head="none")
    probe = RelativeVisionTransformer(**state["model_args"])
    probe.load_state_dict(state["model"])
    images = torch.randn(2, 3, 32, 32)
    tokens: list[Tensor] = []
    whole.blocks[1].register_forward_hook(lambda *a: tokens.append(a[2]))
    with torch.inference_mode():
        whole.eval()(images)
        expected = nn.functional.layer_norm(tokens[0][:, 1:].mean(1), (32,), eps=1e-6)
        expected = probe.eval().head(expected)
        assert (probe(images) - expected).abs().max() < 1e-6
    for more, message in (
        (["--probe_block=4"], "has 3 blocks"),
        (["--probe_block=2", "--tune=full"], "it is for --tune linear"),
    ):
        code, _, err = run_main("main_finetune", [*words, *more, f"--output_dir={tmp_path / 'b'}"])
        assert code == 2 and message in err, err


@pytest.mark.smoke
def test_another_size_resizes_the_tables(trained: Path) -> None:
    """Twice the side: Swin's windows grow with it, the transformer's grid is twice as fine."""
    small, _, _ = models_zoo.load_classifier(str(trained), head="none")
    model, arguments, _ = models_zoo.load_classifier(str(trained), head="none", img_size=(64, 64))
    name = "blocks.0.attn.relative_position_bias_table"
    old, new = (8, 8), (16, 16)
    if isinstance(model, SwinTransformer):
        name, old, new = f"layers.0.{name}", (4, 4), (8, 8)
        assert arguments["window_size"] == 8
    before, after = (dict(m.named_parameters())[name] for m in (small, model))
    assert torch.equal(after, resize_bias(before, old, new))
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, model.num_features)
    with pytest.raises(BadInput, match="is not a multiple of"):
        models_zoo.load_classifier(str(trained), img_size=(30, 30))


SEGMENT = [
    "--dataset=ramp_pairs", "--input_size=32", "--resize", "32", "32", "--window=32", "--stride=32",
    "--channels=8", "--aux_channels=8", "--batch_size=2", "--iterations=2",
    "--warmup_iterations=1", "--train_images=4", "--val_images=4", "--num_workers=0",
    "--device=cpu",
]  # fmt: skip


@pytest.mark.smoke
def test_it_segments(tmp_path: Path, run_main: Any) -> None:
    """Encoders of four stages or blocks: trained, resumed in the same bits, and evaluated."""
    for model in ("simmim_swin_four", "simmim_vit_four"):
        start = pretrain(model, tmp_path / model, run_main)
        words = [*KNOWN, f"--finetune={tmp_path / model}", *SEGMENT]
        whole, part = tmp_path / f"{model} whole", tmp_path / f"{model} part"
        code, out, err = run_main("main_segment", [*words, f"--output_dir={whole}"])
        assert code == 0 and "decode_head.*" in out + err, err
        assert f"(pretrain, {start['model_name']}, epoch 1, step 8)" in out + err
        with stopping(1):
            assert run_main("main_segment", [*words, f"--output_dir={part}"])[0] == 75
        assert run_main("main_segment", [*words, f"--output_dir={part}"])[0] == 0
        first, second = (load_file(folder / LAST)["model"] for folder in (whole, part))
        assert all(torch.equal(first[name], second[name]) for name in first)
        again = [*KNOWN, "--eval", f"--resume={whole / LAST}", *SEGMENT]
        code, _, err = run_main("main_segment", [*again, f"--output_dir={tmp_path / 'eval'}"])
        assert code == 0, err
        encoder, _, _ = models_zoo.load_classifier(str(whole / LAST), head="none")
        assert encoder(torch.randn(1, 3, 32, 32)).shape == (1, encoder.num_features)
        code, _, err = run_main(
            "main_segment", [*words, "--num_heads=2", f"--output_dir={tmp_path / 'heads'}"]
        )
        assert code == 2 and "says its own sizes" in err
        code, _, err = run_main(
            "main_segment", [*words, "--lscale_init=.5", f"--output_dir={tmp_path / 'scales'}"]
        )
        own = "has no LScale" if "swin" in model else "takes its scales from the file"
        assert code == 2 and own in err


@pytest.mark.smoke
def test_a_swin_in_three_stages_does_not_segment(
    trained: Path, tmp_path: Path, run_main: Any
) -> None:
    words = [*KNOWN, f"--finetune={trained}", *SEGMENT, f"--output_dir={tmp_path / 'r'}"]
    code, _, err = run_main("main_segment", words)
    reason = "four maps" if "swin" in str(trained) else "reads four blocks"
    assert code == 2 and reason in err


# ---- Files -------------------------------------------------------------------------------------

# Of the file or folder of each target, where it is not .pth.
ENDS = {"timm": ".safetensors", "transformers": "", "onnx": ".onnx"}


@pytest.mark.smoke
@pytest.mark.parametrize("part", ["encoder", "head"])
@pytest.mark.parametrize("to", ["timm", "transformers", "official", "onnx", "mmae"])
def test_it_is_exported_and_read_again(
    to: str, part: str, trained: Path, tmp_path: Path, run_main: Any
) -> None:
    """Each target compares the outputs itself; read again the features are the same."""
    source = trained
    if part == "head":
        words = [*KNOWN, f"--finetune={trained}", *RUN, "--batch_size=6", "--epochs=1"]
        source = tmp_path / "tuned"
        assert run_main("main_finetune", [*words, f"--output_dir={source}"])[0] == 0
    place = tmp_path / f"out{ENDS.get(to, '.pth')}"
    words = [*KNOWN, f"--checkpoint={source}", f"--to={to}", f"--part={part}"]
    code, out, err = run_main("main_export", [*words, f"--output={place}"])
    assert code == 0 and "verified" in out, err
    ours, _, _ = models_zoo.load_classifier(str(source), head="none")
    again, _, _ = models_zoo.load_classifier(str(place), head="none")
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert (ours.eval()(images) - again.eval()(images)).abs().max() < 1e-4


@pytest.mark.smoke
@pytest.mark.parametrize("to", ["official", "transformers", "timm", "onnx", "mmae"])
def test_the_whole_pretrained_model_is_exported(
    to: str, trained: Path, tmp_path: Path, run_main: Any
) -> None:
    """With token and head, to where such a model is; read again it predicts the same."""
    place = tmp_path / f"out{ENDS.get(to, '.pth')}"
    words = [*KNOWN, f"--checkpoint={trained}", f"--to={to}", "--part=decoder"]
    code, out, err = run_main("main_export", [*words, f"--output={place}"])
    if to in ("timm", "onnx") or (to == "transformers" and "vit" in str(trained)):
        assert code == 2 and ("takes no decoder" in err or "has no such model" in err), err
        assert "--to official or mmae" in err or "choose official, mmae" in err
        return
    assert code == 0 and "loss, pred" in out, err
    assert "lost      the optimiser's state" in out and "what predicts" not in out
    ours, theirs = (models_zoo.load_pretrained(str(path))[0].eval() for path in (trained, place))
    images = torch.randn(2, 3, 32, 32)
    mask = torch.rand(2, ours.num_places).argsort(dim=1) > 20
    with torch.inference_mode():
        assert (ours(images, mask)["pred"] - theirs(images, mask)["pred"]).abs().max() < 1e-5
    if to == "official":
        keys = load_file(place)["model"].keys()
        assert {"encoder.mask_token", "decoder.0.weight", "encoder.norm.weight"} <= keys
    if to != "transformers":  # pictures of it have the masks of the run
        masks = load_file(place)["arithmetic"]
        own = load_file(trained / LAST)["arithmetic"]
        assert masks["mask_ratio"] == 0.6 and masks.items() <= own.items()


@pytest.mark.smoke
@pytest.mark.parametrize("to", ["official", "transformers", "timm", "onnx", "mmae"])
def test_all_that_a_target_takes_is_exported(
    to: str, trained: Path, tmp_path: Path, run_main: Any
) -> None:
    """Without --part; and what is left behind is said."""
    place = tmp_path / f"out{ENDS.get(to, '.pth')}"
    words = [*KNOWN, f"--checkpoint={trained}", f"--to={to}", f"--output={place}"]
    code, out, err = run_main("main_export", words)
    whole = to in ("official", "mmae") or (to == "transformers" and "swin" in str(trained))
    assert code == 0, err
    assert f"{'decoder' if whole else 'encoder'} to {to}" in out
    assert ("the mask token and what predicts are left out" in out) != whole
    assert "the optimiser's state" in out and "lost      nothing" not in out
    if to == "timm":
        plain = tmp_path / "plain"
        plain.touch()
        assert place.stat().st_mode == plain.stat().st_mode
    if to == "onnx":
        assert "in the graph" not in out  # neither LScale nor a probe
        assert "onnxruntime" not in err


def save_segmenter(path: Path) -> None:
    """A segmenter of a Swin whose last map is half of a window."""
    model = models_zoo.create_segmenter("swin_micro_patch2_window4", 4, in_chans=3)
    said = {"task": "segment", "step": 0, "epoch": 0, "model_args": model.arguments}
    write_signed(path, {**said, "model": model.state_dict(), "data": {}})


@pytest.mark.smoke
@pytest.mark.parametrize("to", ["timm", "transformers", "official"])
def test_a_segmenters_swin_goes_where_it_computes_the_same(
    to: str, tmp_path: Path, run_main: Any
) -> None:
    """Its windows shift in every map, and are padded first: at 32 pixels no other program's do."""
    save_segmenter(tmp_path / "segmenter.pth")
    place = tmp_path / ("out" if to == "transformers" else "out.pth")
    words = [f"--checkpoint={tmp_path / 'segmenter.pth'}", f"--to={to}", "--part=encoder"]
    code, _, err = run_main("main_export", [*words, f"--output={place}"])
    assert code == 2 and not place.exists()
    assert "it is a segmenter's" in err and "--input_size" in err and "--to onnx or mmae" in err
    code, out, err = run_main("main_export", [*words, "--input_size=128", f"--output={place}"])
    assert code == 0 and "verified" in out, err


def official(model: SimMIM) -> dict[str, Tensor]:
    """The weights of a model under the names of SimMIM's code, with what it saves beside them."""
    weights = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "mask_token":
            name, tensor = "encoder.mask_token", tensor.reshape(1, 1, -1)
        elif "downsample" in parts:
            parts[2] = str(int(parts[2]) - 1)
            name = ".".join(parts)
        weights[name] = tensor
        if name.endswith("relative_position_bias_table"):
            stem = name.removesuffix("bias_table")
            weights[f"{stem}index"] = torch.zeros(3, 3, dtype=torch.int64)
    if model.encoder.kind == "swin":
        weights["encoder.layers.0.blocks.1.attn_mask"] = torch.zeros(16, 16, 16)
    return weights


class CfgNode(dict[str, Any]):
    """Stands for yacs' settings: a dict with attributes of its own."""


@pytest.fixture
def yacs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class is in a module that only writes: whoever reads has no yacs."""
    module = types.ModuleType("yacs.config")
    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module.CfgNode = CfgNode  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)


def save_official(path: Path, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    config = CfgNode(MODEL=CfgNode(TYPE="swin", DROP_PATH_RATE=0.0), TAG="x")
    config.__dict__["__immutable__"] = True
    beside = {"epoch": 99, "max_accuracy": 0.0, "lr_scheduler": {"t_initial": 5}}
    optimizer: dict[str, Any] = {"state": {}, "param_groups": []}
    state = {"model": weights, "config": config, "optimizer": optimizer, **beside}
    torch.save(state, path)
    monkeypatch.delitem(sys.modules, "yacs")
    monkeypatch.delitem(sys.modules, "yacs.config")


@pytest.mark.parametrize("kind", ["swin", "vit_relative"])
def test_official_pretraining_files(
    kind: str, tmp_path: Path, yacs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its pickled settings, which are not run; the same loss and picture, and features."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}
    if kind == "swin":
        sizes = {"patch_size": 2, "embed_dim": 16, "depths": [2, 2, 2], "num_heads": [2, 2, 4],
                 "window_size": 4}  # fmt: skip
    model = SimMIM(kind, img_size=32, **sizes).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    path = tmp_path / "official.pth"
    save_official(path, official(model), monkeypatch)
    again, state = models_zoo.load_pretrained(str(path))
    side = model.mask_grid[0]
    images, mask = torch.randn(2, 3, 32, 32), torch.rand(2, side * side).argsort(1) > 20
    if kind == "swin":  # its file does not say that the last map is one window of 16 x 16 pixels
        assert again.input.size == (32, 32)
    with torch.inference_mode():
        ours, theirs = model(images, mask), again.eval()(images, mask)
        assert torch.equal(ours["pred"], theirs["pred"]) and ours["loss"] == theirs["loss"]
        encoder, _, _ = models_zoo.load_classifier(str(path), head="none")
        expected = model.encoder.pool(model.encoder.forward_features(images), encoder.global_pool)
        assert (encoder.eval()(images) - expected).abs().max() < 1e-5
    assert state["epoch"] == 99


def test_a_hostile_pickle_in_that_layout_does_not_run(tmp_path: Path, yacs: None) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    path = tmp_path / "hostile.pth"
    torch.save({"model": {"a": torch.zeros(1)}, "config": CfgNode(x=Hostile())}, path)
    with pytest.raises(BadInput, match="could run code"):
        load_state(str(path))
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Hostile()))
    assert (tmp_path / "ran").exists()  # it could have run


def test_a_swin_file_is_no_vit(trained: Path) -> None:
    name = "vit_base_patch16"
    with pytest.raises(BadInput, match=f"and {name} is none"):
        models_zoo.load_classifier(str(trained), name)
    other = "swin_base_patch4_window7" if "swin" in str(trained) else "vit_relative_base_patch16"
    with pytest.raises(BadInput, match=r"has a different architecture: .*embed_dim"):
        models_zoo.load_classifier(str(trained), other)
