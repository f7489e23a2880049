"""Files of a user that register models, encoders, masks, data sets and targets."""

import importlib
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch import launch, until, wait
from PIL import Image
from registries import registered_apart
from runs import records

import main_pretrain
import submitit_pretrain
from models_zoo import load_classifier, load_pretrained
from util import plugins
from util.errors import BadInput
from util.names import Registry
from util.train.checkpoint import LAST, load_file

HERE = Path(__file__).parent / "plugins"
RUN = [
    "--batch_size=6", "--epochs=2", "--warmup_epochs=1", "--log_every=1", "--num_workers=0",
    "--device=cpu",
]  # fmt: skip
PRETRAIN = [*RUN, "--picture_every=1", "--eval_every=1", "--eval_images=8"]


@pytest.fixture(autouse=True)
def apart() -> Iterator[None]:
    """What a test registers is gone after it."""
    with registered_apart():
        yield


def with_plugins(*names: str) -> list[str]:
    return ["--plugin", *(str(HERE / f"{name}.py") for name in names)]


# name of a plugin, its model, further plugins, the data set, and what it may not do
METHODS = {
    "tokens": ("tokens", ("pieces",), "ramps"),
    "clips": ("clips", (), "made_clips"),
    "cnn": ("conv_model", ("pieces",), "ramps"),
}


def pretrain(plugin: str, folder: Path, run_main: Any, *more: str) -> Path:
    model, others, dataset = METHODS[plugin]
    flags = [*with_plugins(plugin, *others), f"--model={model}", f"--dataset={dataset}", *PRETRAIN]
    code, _, err = run_main("main_pretrain", [*flags, *more, f"--output_dir={folder}"])
    assert code == 0, err
    return folder / LAST


@pytest.mark.smoke
@pytest.mark.parametrize("plugin", METHODS)
def test_a_method_of_a_user_is_one_file(plugin: str, tmp_path: Path, run_main: Any) -> None:
    """It trains, is measured and drawn, is planned, and its checkpoint knows its file."""
    path = pretrain(plugin, tmp_path / "run", run_main)
    measured = records(tmp_path / "run", "eval")
    assert len(measured) == 2 and all(r["model_psnr"] > 0 for r in measured)
    assert (tmp_path / "run" / "pictures" / "epoch-1.png").is_file()
    state = load_file(path)
    assert state["plugins"][0]["name"] == plugin and len(state["plugins"][0]["sha256"]) == 64
    model, others, dataset = METHODS[plugin]
    flags = [*with_plugins(plugin, *others), f"--model={model}", f"--dataset={dataset}"]
    code, out, err = run_main("main_pretrain", [*flags, "--dry_run", "--batch_size=4"])
    assert (code == 0 and "TFLOP" in out) or "FLOP" in out, err
    again = load_pretrained(str(path))[0]
    own = again.state_dict()
    assert all(torch.equal(own[k], v) for k, v in state["model"].items())


@pytest.mark.smoke
@pytest.mark.parametrize("plugin", METHODS)
def test_it_resumes_in_the_same_bits(plugin: str, tmp_path: Path, run_main: Any) -> None:
    whole = load_file(pretrain(plugin, tmp_path / "whole", run_main, "--save_every=1"))
    part = tmp_path / "part"
    part.mkdir()
    shutil.copy(tmp_path / "whole" / "checkpoint-0.pth", part / "checkpoint-0.pth")
    resumed = load_file(pretrain(plugin, part, run_main, "--save_every=1"))
    assert resumed["step"] == whole["step"]
    for name, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][name]), name


@pytest.mark.dist
@pytest.mark.parametrize("plugin", ["tokens", "clips"])
def test_it_trains_alike_however_a_batch_is_divided(plugin: str, tmp_path: Path) -> None:
    """On two processes, in micro-batches, and compiled: as at once, up to rounding."""
    model, others, dataset = METHODS[plugin]
    ways = {
        "at once": (1, ["--batch_size=6"]),
        "processes": (2, ["--batch_size=3"]),
        "micro-batches": (1, ["--batch_size=2", "--accum_iter=3"]),
        "compiled": (1, ["--batch_size=6", "--compile"]),
    }
    losses = {}
    for name, (world, own) in ways.items():
        flags = [*with_plugins(plugin, *others), f"--model={model}", f"--dataset={dataset}"]
        flags += [*RUN, *own, f"--output_dir={tmp_path / name}"]
        assert set(wait(launch(flags, tmp_path / f"out {name}", world))) == {0}
        losses[name] = [r["loss"] for r in records(tmp_path / name, "train")]
    assert len(losses["at once"]) == 8
    for name in ways:
        assert losses["at once"] == pytest.approx(losses[name], rel=1e-3), name


@pytest.mark.smoke
def test_a_vision_transformer_in_it_goes_everywhere(tmp_path: Path, run_main: Any) -> None:
    path, known = pretrain("tokens", tmp_path / "run", run_main), with_plugins("tokens", "pieces")
    commands = {
        "main_finetune": ["--finetune", str(path), *RUN, "--dataset=ramps"],
        "main_knn": ["--checkpoint", str(path), "--dataset=ramps", "--device=cpu", "--k", "3"],
        "main_visualize": ["--checkpoint", str(path), "--dataset=ramps", "--device=cpu"],
        "main_segment": [
            "--finetune", str(path), "--dataset=ramp_pairs", "--input_size=32",
            "--resize", "32", "32", "--window=32", "--stride=32", "--channels=8",
            "--aux_channels=8", "--batch_size=2", "--iterations=2", "--warmup_iterations=1",
            "--train_images=4", "--val_images=4", "--num_workers=0", "--device=cpu",
        ],
    }  # fmt: skip
    for main, flags in commands.items():
        folder = f"--output_dir={tmp_path / main}"
        code, _, err = run_main(main, [*known, *flags, folder])
        assert code == 0, (main, err)
    say_what_it_sees(known, tmp_path / "main_finetune" / LAST, tmp_path, run_main)
    code, _, err = run_main(
        "main_export",
        [*known, f"--checkpoint={path}", "--to=timm", f"--output={tmp_path / 'a.safetensors'}"],
    )
    assert code == 0, err


def say_what_it_sees(known: list[str], tuned: Path, tmp_path: Path, run_main: Any) -> None:
    """A classifier of a plugin names the class of a user's files."""
    folder = tmp_path / "own"
    folder.mkdir()
    for seed in range(3):
        pixels = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    flags = [f"--checkpoint={tuned}", f"--data_path={folder}", "--device=cpu"]
    flags += [f"--output_dir={tmp_path / 'said'}"]
    code, _, err = run_main("main_predict", [*known, *flags])
    assert code == 0, err
    rows = (tmp_path / "said" / "predictions.csv").read_text().splitlines()
    assert len(rows) == 4 and all("right" in row and "down" in row for row in rows[1:])


@pytest.mark.smoke
def test_a_method_without_an_encoder_says_so(tmp_path: Path, run_main: Any) -> None:
    path, known = pretrain("clips", tmp_path / "run", run_main), with_plugins("clips")
    for main, flags in {
        "main_finetune": [f"--finetune={path}", *RUN],
        "main_knn": [f"--checkpoint={path}", "--device=cpu"],
        "main_segment": [f"--finetune={path}", "--dataset=garments", "--device=cpu"],
        "main_export": [f"--checkpoint={path}", "--to=timm", f"--output={tmp_path}/a.pth"],
    }.items():
        more = [] if main in ("main_export", "main_segment") else ["--dataset=made_clips"]
        code, _, err = run_main(main, [*known, *flags, *more])
        assert code == 2 and "ClipModel" in err, (main, err)


@pytest.mark.smoke
def test_an_encoder_of_another_kind(tmp_path: Path, run_main: Any) -> None:
    """It is fine-tuned, goes on, is measured and probed; the rest refuses it with the reason."""
    path, known = pretrain("cnn", tmp_path / "run", run_main), with_plugins("cnn", "pieces")
    tune = [*known, f"--finetune={path}", *RUN, "--dataset=ramps"]
    for name, more in (("full", []), ("half", ["--tune=partial:1"])):
        code, _, err = run_main(
            "main_finetune", [*tune, *more, f"--output_dir={tmp_path / name}", "--save_every=1"]
        )
        assert code == 0, err
    tuned = tmp_path / "full" / LAST
    assert load_file(tuned)["encoder_kind"] == "cnn"
    model, arguments, _ = load_classifier(str(tuned), head="own")
    assert type(model).__name__ == "ConvEncoder" and arguments["num_classes"] == 2
    frozen = load_file(tmp_path / "half" / LAST)["model"]["stem.weight"]
    assert torch.equal(frozen, load_file(path)["model"]["encoder.stem.weight"])
    measure = ["--eval", f"--resume={tuned}", "--dataset=ramps", "--device=cpu"]
    assert run_main("main_finetune", [*known, *measure, f"--output_dir={tmp_path / 'm'}"])[0] == 0
    say_what_it_sees(known, tuned, tmp_path, run_main)
    scratch = ["--model=small_cnn", *RUN, "--dataset=ramps", f"--output_dir={tmp_path / 's'}"]
    assert run_main("main_finetune", [*known, *scratch])[0] == 0
    for main, flags, reason in (
        ("main_segment", [f"--finetune={path}", "--dataset=garments"], "of kind cnn"),
        ("main_export", [f"--checkpoint={path}", "--to=timm", f"--output={tmp_path}/a.pth"],
         "of kind cnn"),
    ):  # fmt: skip
        code, _, err = run_main(main, [*known, *flags])
        assert code == 2 and reason in err, err


@pytest.mark.smoke
def test_a_mask_a_set_and_a_target(tmp_path: Path, run_main: Any) -> None:
    flags = [*with_plugins("pieces"), "--model=mae_vit_micro_patch4", "--input_size=16", *PRETRAIN]
    flags += ["--dataset=ramps", "--mask=stripes", "--target=contrast"]
    states = {}
    for name, more in (("a", []), ("b", ["--stripe_width=2"]), ("c", ["--contrast_by=3"])):
        code, _, err = run_main("main_pretrain", [*flags, *more, f"--output_dir={tmp_path / name}"])
        assert code == 0, err
        states[name] = load_file(tmp_path / name / LAST)
    assert states["a"]["model_args"]["target_settings"] == {"contrast_by": 2.0}
    for other in "bc":
        weights = states[other]["model"]["decoder_pred.weight"]
        assert not torch.equal(weights, states["a"]["model"]["decoder_pred.weight"])
    model = load_pretrained(str(tmp_path / "a" / LAST))[0]
    assert model.note.startswith("Contrast alone") and model.target.by == 2.0
    x = torch.randn(2, 3, 16, 16)
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(2, 16, 48)
    back = model.target.to_pixels(model.target(patches), patches)
    torch.testing.assert_close(back, patches)


def test_a_file_that_is_missing_or_has_changed(tmp_path: Path, run_main: Any) -> None:
    for name in ("tokens", "pieces"):
        shutil.copy(HERE / f"{name}.py", tmp_path)
    known = ["--plugin", str(tmp_path / "tokens.py"), str(tmp_path / "pieces.py")]
    flags = ["--model=tokens", "--dataset=ramps", *RUN, "--picture_every=0"]
    run = ["main_pretrain", [*known, *flags, f"--output_dir={tmp_path / 'run'}"]]
    assert run_main(*run)[0] == 0
    knn = ["--checkpoint", str(tmp_path / "run" / LAST), "--dataset=digits", "--device=cpu"]
    plugins.LOADED.clear()
    code, _, err = run_main("main_knn", knn)
    assert code == 2 and "made with the plugin tokens" in err and "--plugin FILE.py" in err
    for name in ("tokens", "pieces"):
        sys.modules.pop(name, None)
    with (tmp_path / "tokens.py").open("a") as file:
        file.write("\n# another version\n")
    longer = [*run[1], "--epochs=3"]
    code, _, err = run_main("main_pretrain", longer)
    assert code == 2 and "plugins" in err and "--allow_changes" in err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("broken.py", "import nothing_of_that_name", "line 1"),
        ("wrong.py", "def f(:\n", "SyntaxError"),
        ("torch.py", "", "there is a module 'torch' already"),
        ("two words.py", "", "must be a .py file"),
        ("notes.txt", "", "must be a .py file"),
        (
            "taken.py",
            "from util.mask.strategies import STRATEGIES\nSTRATEGIES.add('random', object)",
            "'random' is there already, of the framework itself",
        ),
        (
            "no_model.py",
            "from models_zoo import register_model\nregister_model('mine', int)",
            "must be a subclass of models_protocols.PretrainModel",
        ),
    ],
)
def test_a_plugin_that_cannot_be(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(BadInput) as error:
        plugins.load_plugin(path)
    assert message in str(error.value) and Registry.owner is None
    with pytest.raises(BadInput, match="cannot be read"):
        plugins.load_plugin(tmp_path / "nowhere.py")


def test_flags_are_those_of_the_model_that_is_named() -> None:
    known = with_plugins("tokens")
    mine = main_pretrain.build_parser([*known, "--model=tokens"])
    assert {"dim_by", "mask", "mask_ratio"} <= {a.dest for a in mine._actions}
    assert not {"lscale_init", "decoder", "pca_components"} & {a.dest for a in mine._actions}
    args = mine.parse([*known, "--model=tokens", "--dim_by=0.3"])
    assert args.method == "tokenmodel" and args.mask == "random" and args.dim_by == 0.3
    recipe = HERE.parent / "plugins"
    assert main_pretrain.build_parser([]).parse([]).method == "mmae", recipe


@pytest.mark.parametrize(
    "command",
    ["main_tables", "main_pack", "main_export", "lab.bench.command", "lab.study.command"],
)
def test_every_command_loads_them(command: str, tmp_path: Path, run_main: Any) -> None:
    """None takes the flag and does nothing with it."""
    (tmp_path / "refuses.py").write_text("raise ValueError('read')")
    module = importlib.import_module(command)
    with pytest.raises(BadInput, match=r"refuses\.py .*ValueError: read \(line 1\)"):
        module.main.__wrapped__([f"--plugin={tmp_path / 'refuses.py'}"])


def test_a_draw_with_a_name_that_is_taken_is_refused_by_the_plan(
    tmp_path: Path, run_main: Any
) -> None:
    text = (HERE / "tokens.py").read_text().replace('"dim": (1,)', '"noise": (1,)')
    (tmp_path / "own_draw.py").write_text(text)
    flags = [f"--plugin={tmp_path / 'own_draw.py'}", "--model=tokens", "--dataset=digits"]
    for more in (["--dry_run"], [*RUN]):
        code, _, err = run_main("main_pretrain", [*flags, *more, f"--output_dir={tmp_path}"])
        assert code == 2 and "cannot draw noise" in err, err


def test_nothing_else_names_what_the_plugins_register() -> None:
    root = HERE.parent.parent
    words = ("conv_model", "made_clips", "ramp_pairs", "TokenModel", "stripe_width", "contrast_by")
    for path in [*root.glob("*.py"), *(root / "util").rglob("*.py")]:
        text = path.read_text()
        assert not [word for word in words if word in text], path


@pytest.mark.dist
def test_a_job_has_the_plugin_as_it_was_submitted(tmp_path: Path, capsys: Any) -> None:
    """It travels with the code: what happens to the user's file afterwards is not the job's."""
    for name in ("tokens", "pieces"):
        shutil.copy(HERE / f"{name}.py", tmp_path / f"own_{name}.py")
    own = [str(tmp_path / f"own_{name}.py") for name in ("tokens", "pieces")]
    flags = ["--model=tokens", "--dataset=ramps", *PRETRAIN, f"--output_dir={tmp_path / 'run'}"]
    job = ["--local", "--ngpus=0", "--cpu_tasks=1", f"--job_dir={tmp_path / 'job'}"]
    submitit_pretrain.main([*job, *flags, "--plugin", *own])
    for path in own:
        Path(path).unlink()
    number = re.search(r"^job +(\d+):", capsys.readouterr().out, re.MULTILINE)[1]
    logs = tmp_path / "job"
    until(
        lambda: list(logs.glob(f"{number}_*_result.pkl")),
        lambda: "\n".join(p.read_text() for p in logs.glob("*.err")),
    )
    state = load_file(tmp_path / "run" / LAST)
    code = next(logs.glob("code-*"))
    assert [Path(one["path"]).parent for one in state["plugins"]] == [code / "plugins"] * 2


def test_a_job_of_a_missing_plugin_is_not_submitted(tmp_path: Path, run_main: Any) -> None:
    job = ["--local", "--ngpus=0", f"--job_dir={tmp_path / 'job'}", "--plugin", "/no/such.py"]
    code, _, err = run_main("submitit_pretrain", [*job, "--dataset=synthetic"])
    assert code == 2 and "--plugin /no/such.py cannot be read" in err
    assert not (tmp_path / "job").exists()
