"""Settings that cannot work together are refused; those that may be meant are said by the run."""

import os
from pathlib import Path

import pytest
from PIL import Image

import main_finetune
from util.errors import BadInput
from util.train.advice import (
    Published,
    check_settings,
    need_two,
    warn_of_course,
    warn_of_flags,
    warn_of_shards,
    warn_of_start,
)

TINY = [
    "--dataset=digits", "--input_size=16", "--batch_size=30", "--epochs=1", "--num_workers=0",
    "--device=cpu", "--save_every=0", "--log_every=1",
]  # fmt: skip
PRETRAIN = [*TINY, "--model=mae_vit_micro_patch4", "--picture_every=0", "--warmup_epochs=0"]
FINETUNE = [*TINY, "--model=vit_micro_patch4", "--eval_every=0", "--warmup_epochs=0"]
SEGMENT = [
    "--dataset=garments", "--train_images=4", "--model=vit_micro_patch8", "--input_size=32",
    "--resize", "48", "32", "--window=32", "--stride=24", "--channels=8", "--aux_channels=8",
    "--batch_size=2", "--iterations=1", "--warmup_iterations=0", "--eval_every=0", "--lr=1e-3",
    "--save_every=0", "--log_every=1", "--num_workers=0", "--device=cpu", "--layer_decay=1",
]  # fmt: skip
RUNS = {"main_pretrain": PRETRAIN, "main_finetune": FINETUNE, "main_segment": SEGMENT}


def warnings_in(text: str) -> list[str]:
    return [line.partition("warning: ")[2] for line in text.splitlines() if "warning: " in line]


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("module", "flags", "expected"),
    [
        ("main_pretrain", [], []),
        ("main_pretrain", ["--warmup_epochs=40"], ["the warm-up of 40 epochs is as long"]),
        ("main_pretrain", ["--lr=1e-5", "--min_lr=1e-3"], ["--min_lr 0.001 is above the peak"]),
        ("main_pretrain", ["--lr=0"], ["the peak lr is 0"]),
        ("main_pretrain", ["--data_path=."], ["--data_path . is not used"]),
        (
            "main_pretrain",
            ["--mask=random", "--avg_share=.3", "--pca_patches=9", "--shard"],
            ["--avg_share has no", "--pca_patches has no", "--shard has no effect"],
        ),
        ("main_finetune", ["--layer_decay=1"], []),
        ("main_finetune", [], ["there is no --finetune"]),
        (
            "main_finetune",
            ["--tune=linear", "--warmup_epochs=10"],
            ["the warm-up of 10 epochs", "there is no --finetune"],
        ),
        ("main_segment", [], []),
        (
            "main_segment",
            ["--warmup_iterations=9", "--layer_decay=.9"],
            ["the warm-up of 9 iterations", "there is no --finetune"],
        ),
    ],
)
def test_the_run_says_what_its_dry_run_says(
    module: str, flags: list[str], expected: list[str], tmp_path: Path, run_main, few
) -> None:
    """On the screen and in the run's log; the same texts in the same order."""
    words = [*RUNS[module], *flags, f"--output_dir={tmp_path}"]
    _, planned, err = run_main(module, [*words, "--dry_run", "--dry_run_images=60"])
    code, out, err = run_main(module, words)
    assert code == 0, err
    said = warnings_in(out)
    assert len(said) == len(expected)
    for text, start in zip(said, expected, strict=True):
        assert text.startswith(start)
    assert said == [w for w in warnings_in(planned) if "checkpoints need" not in w]
    assert warnings_in((tmp_path / "log-rank0.txt").read_text()) == said


@pytest.mark.smoke
def test_a_start_from_a_checkpoint_is_no_start_from_scratch(tmp_path: Path, few, run_main) -> None:
    flags = [*FINETUNE, f"--output_dir={tmp_path}"]
    assert run_main("main_finetune", flags)[0] == 0
    code, out, err = run_main("main_finetune", [*flags, "--epochs=2", "--allow_changes"])
    assert code == 0, err
    assert not [w for w in warnings_in(out) if "--finetune" in w]


# ---- Refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--ema_decay=1"], "never move"),
        (["--smoothing=1"], "no label would be left"),
        (["--drop_path=1"], "at least 0 and below 1"),
        (["--betas", "0.9", "1"], "below 1"),
        (["--crop_scale", "1e-9", "1e-9"], "at least 0.0001"),
        (["--crop_scale", "0.9", "0.2"], "--crop_scale 0.9 0.2: MIN is above MAX"),
        (["--cutmix_minmax", "0.9", "0.2"], "MIN is above MAX"),
        (["--output_dir="], "output_dir: is empty"),
        (["--log_dir="], "log_dir: is empty"),
        (["--std", "0"], "above 0"),
        (["--mean", "nan"], "not a finite number"),
        (["--mean", "1", "2"], "mean has 2 numbers"),
        (["--mixup=.8", "--batch_size=15"], "must be even"),
        (["--tune=linear", "--batch_size=1"], "BatchNorm of the linear probe needs two images"),
    ],
)
def test_what_can_never_be_meant(flags: list[str], expected: str, tmp_path: Path, run_main) -> None:
    words = [*FINETUNE, f"--output_dir={tmp_path / 'run'}", *flags]
    for dry in ([], ["--dry_run"]):
        if dry and "even" in expected:
            continue  # a plan draws no batch
        code, _, err = run_main("main_finetune", [*words, *dry])
        assert code == 2 and expected in err and err.count("\n") == 1, err


def test_batches_for_batchnorm() -> None:
    need_two(2, "here")
    with pytest.raises(BadInput, match="BatchNorm here needs two"):
        need_two(1, "here")
    words = [*FINETUNE, "--tune=linear", "--batch_size=1", "--dry_run_images=60"]
    args = main_finetune.build_parser().parse(words)
    main_finetune.resolve_tune(args)
    assert main_finetune.plan_run(args, 2).global_batch == 2  # their statistics are shared


# ---- The run folder and the images -------------------------------------------------------------


def make_set(root: Path) -> Path:
    for split in ("train", "val"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (16, 16)).save(root / split / name / f"{i}.png")
    return root


@pytest.mark.parametrize("flag", ["output_dir", "log_dir"])
@pytest.mark.parametrize(
    "inside", ["train", "train/runs/1", "val/a/run", "link/run", "train/l/run"]
)
@pytest.mark.parametrize("module", ["main_pretrain", "main_finetune", "main_knn", "main_pack"])
def test_no_run_among_its_images(
    module: str, flag: str, inside: str, tmp_path: Path, run_main, monkeypatch: pytest.MonkeyPatch
) -> None:
    if flag == "log_dir" and module in ("main_knn", "main_pack"):
        return  # they have none
    data = make_set(tmp_path / "data")
    (data / "link").symlink_to(data / "train" / "a")
    (tmp_path / "far").mkdir()
    (data / "train" / "l").symlink_to(tmp_path / "far")
    monkeypatch.chdir(tmp_path)
    more = {"main_knn": ["--checkpoint=x.pth"], "main_finetune": ["--model=vit_micro_patch8"]}
    flags = ["--data_path=data", f"--{flag}=data/{inside}", *more.get(module, [])]
    code, _, err = run_main(module, flags)
    assert code == 2 and f"--{flag} data/{inside} lies in" in err and "outside of it" in err, err
    assert not (data / inside / "config.yaml").exists()


def test_a_run_beside_its_images_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_set(tmp_path)
    (tmp_path / "training").mkdir()
    monkeypatch.chdir(tmp_path)
    for folder in ("./output_dir", "training", "train2/run", "images/run"):
        check_settings({"dataset": "imagefolder", "data_path": ".", "output_dir": folder})
    check_settings({"dataset": "digits", "data_path": ".", "output_dir": "train/run"})
    check_settings({"dataset": "imagefolder", "data_path": None, "output_dir": "train/run"})
    check_settings({"dataset": "imagefolder", "data_path": "none", "output_dir": "none/train/run"})
    with pytest.raises(BadInput, match="lies in"):
        check_settings({"data_path": "hf:train?image=x", "output_dir": "train/run"})


def test_links_in_circles_among_images(tmp_path: Path) -> None:
    make_set(tmp_path)
    os.symlink(tmp_path / "train" / "x", tmp_path / "train" / "x")
    os.symlink(tmp_path / "round", tmp_path / "round")
    check_settings({"data_path": str(tmp_path), "output_dir": str(tmp_path / "round")})


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        ("main_visualize", ["--checkpoint=x.pth", "--images=photos"]),
        ("main_segment", ["--predict", "photos", "--resume=x.pth"]),
    ],
)
def test_no_pictures_among_the_pictures(
    module: str, flags: list[str], tmp_path: Path, run_main, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    code, _, err = run_main(module, [*flags, "--output_dir=photos/out"])
    assert code == 2 and "lies in photos" in err


# ---- Texts by themselves -----------------------------------------------------------------------

COURSE = {
    "global_batch": 4096, "images": 1_281_167, "length": 800, "warmup": 40.0, "unit": "epochs",
    "lr": 2.4e-3, "min_lr": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"warmup": 799.0}, None),
        ({"warmup": 800.0}, "shorten it by --warmup_epochs"),
        ({"lr": 2.5e-2}, "10.4 x the published"),
        ({"lr": 2.5e-2, "images": 50_000}, None),  # small sets have rates of their own
        ({"global_batch": 512, "lr": 3e-4}, "far below the published recipe's 4,096"),
        ({"global_batch": 800, "lr": 4.7e-4}, None),  # the published command of M-MAE
        ({"min_lr": 2.4e-3}, None),
        ({"min_lr": 2.5e-3}, "the rate rises"),
        ({"images": 4095}, "there would be no step"),
    ],
)
def test_course(changes: dict, expected: str | None) -> None:
    found = warn_of_course(Published(1.5e-4, 4096), **COURSE | changes)
    assert len(found) == (expected is not None)
    assert expected is None or expected in found[0]


def test_flags_without_effect() -> None:
    values = {"mask": "random", "avg_share": 0.5, "aa": None, "color_jitter": 0.4, "mixup": 0.0,
              "cutmix": 1.0, "mixup_prob": 0.5, "reprob": 0.0, "recount": 2}  # fmt: skip
    assert warn_of_flags(values, []) == []
    found = warn_of_flags(values, list(values))
    assert found == [
        "--avg_share has no effect with --mask random", "--recount has no effect with --reprob 0.0",
    ]  # fmt: skip
    assert warn_of_flags({"mask": "mixed", "avg_share": 0.5}, ["avg_share"]) == []
    assert warn_of_shards(True, 2) == warn_of_shards(False, 1) == []


def test_starts() -> None:
    assert warn_of_start("x.pth", "linear", 0.5) == warn_of_start(None, "full", 1.0) == []
    assert "--layer_decay 0.75" in warn_of_start(None, "full", 0.75)[0]
    assert "--tune partial:4" in warn_of_start(None, "partial:4", 1.0)[0]
