"""What the flags of every training main do alike, for the tables over each of them."""

from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every_flag import Row, Runner, add_small_models
from PIL import Image

import models_zoo
from util.checkpoint import LAST, save_checkpoint, write_signed
from util.dist import Processes


class Enough(Exception):
    """A run has come to what a test asks of it."""


def write_images(root: Path, seed: int = 0) -> None:
    """Twelve JPEG files to train on, six to measure, in three classes; one is larger."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", 4), ("val", 2)):
        for name in "abc":
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                side = 60 if (name, i) == ("b", 1) and split == "train" else 40
                coarse = rng.integers(0, 256, (5, 5, 3), np.uint8)
                image = Image.fromarray(coarse).resize((side, side - 8), Image.Resampling.BICUBIC)
                image.save(root / split / name / f"{i}.jpg", quality=90)


def write_pairs(root: Path, seed: int = 0) -> None:
    """Twelve images with masks of four classes to train on, six to measure; one is larger."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", 12), ("val", 6)):
        for name in ("images", "masks"):
            (root / split / name).mkdir(parents=True)
        for i in range(count):
            side = 60 if (split, i) == ("train", 4) else 40
            pixels = rng.integers(0, 256, (5, 5, 3), np.uint8)
            image = Image.fromarray(pixels).resize((side, side - 8), Image.Resampling.BICUBIC)
            image.save(root / split / "images" / f"{i:02d}.jpg", quality=90)
            label = rng.integers(0, 4, (5, 5), np.uint8)
            label[0, 0], label[1, 1], label[2:, 2:] = 255, 3, i % 4
            mask = Image.fromarray(label).resize((side, side - 8), Image.Resampling.NEAREST)
            mask.save(root / split / "masks" / f"{i:02d}.png")


# A dry run and what it assumes, alike in all mains that plan.
DRY_RUN: dict[str, Row] = {
    "--dry_run_images": Row("--dry_run_images=4321", "said", "--dry_run", "4,321"),
    "--dry_run_processes": Row("--dry_run_processes=2", "said", "--dry_run", "2 processes"),
    "--images_per_second": Row("--images_per_second=0.5", "said", "--dry_run"),
}


def check_dry_run(runner: Runner) -> None:
    """It writes nothing, and says what a run is."""
    trace = runner("--dry_run")
    assert trace["ends"] == 0 and not trace["files"] and "start" not in trace
    assert "dry run" in trace["text"]


def check_dry_run_measure(runner: Runner) -> None:
    """So many steps are measured: the plan then tells a rate and the hours."""
    before, after = runner("--dry_run"), runner("--dry_run", "--dry_run_measure=1")
    assert after["ends"] == 0 and "images/s" in after["text"] and after["text"] != before["text"]


def check_list_models(runner: Runner, name: str) -> None:
    """The names alone."""
    trace = runner("--list_models")
    assert trace["ends"] == 0 and not trace["files"] and "start" not in trace
    assert name in trace["text"].split()


def check_device(runner: Runner) -> None:
    """The name is looked at: there are none but those of `DEVICES`."""
    trace = runner("--device=meta")
    assert trace["ends"] == 2 and "--device meta cannot be computed on" in trace["text"]


def check_nan_policy(runner: Runner, blows_up: str) -> None:
    """After numbers that are not finite, stop ends the run and skip goes on."""
    stop, skip = runner(blows_up), runner(blows_up, "--nan_policy=skip")
    assert stop["ends"] == 1 and "finite" in stop["text"]
    assert skip["ends"] == 0 and any("checkpoint-last" in name for name in skip["files"])


def check_bad_images(runner: Runner, beside: str = "") -> None:
    """One image is too large: one more than allowed ends the run."""
    words = f"--max_pixels=2200 {beside}"
    few, none = (runner(words, f"--max_bad_images={n}") for n in (1, 0))
    assert few["ends"] == 0 and none["ends"] == 1 and "--max_bad_images" in none["text"]


def check_resume(runner: Runner, longer: str, tmp_path: Path) -> None:
    """auto goes on in the folder, none starts anew elsewhere, a path is another run's."""
    whole = runner(folder=tmp_path)
    again = runner(folder=tmp_path)
    assert "start" not in again and "nothing is left to train" in again["text"]
    refused = runner("--resume=none", folder=tmp_path)
    assert refused["ends"] == 2 and "--resume" in refused["text"]
    last = tmp_path / "run" / "checkpoint-last.pth"
    other = runner(f"--resume={last} {longer} --allow_changes")
    assert other["ends"] == 0 and other["start"] == whole["weights"]


def check_allow_changes(runner: Runner, longer: str, tmp_path: Path) -> None:
    """Other numbers are refused by name unless they are allowed, and then they count."""
    whole = runner(folder=tmp_path)
    refused = runner(f"{longer} --weight_decay=0.3", folder=tmp_path)
    assert refused["ends"] == 2 and "weight_decay: was" in refused["text"]
    assert "start" not in refused
    changed = runner(f"{longer} --weight_decay=0.3 --allow_changes", folder=tmp_path)
    assert changed["ends"] == 0 and changed["start"] == whole["weights"]
    assert "weight_decay: was" in changed["text"]


def check_no_pin_mem(runner: Runner, module: Any) -> None:
    """On a GPU batches are page-locked unless the flag is there: what the loader is asked for."""
    asked = []

    @contextmanager
    def gpu(*rest: Any) -> Any:
        yield Processes(0, 1, 0, 1, torch.device("cuda"))

    def build_loader(*rest: Any, pin_memory: bool, **more: Any) -> Any:
        asked.append(pin_memory)
        raise Enough

    for flags in ("", "--no_pin_mem"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "processes", gpu)
            patch.setattr(module, "build_loader", build_loader)
            patch.setattr(torch.nn.Module, "to", lambda self, *rest, **more: self)
            with pytest.raises(Enough):
                runner("--no-compile", flags)
    assert asked == [True, False]


def write_encoders(root: Path, size: str = "nano") -> dict[str, str]:
    """Files to start from: a pretraining of ours, plain weights, and two in one file."""
    with pytest.MonkeyPatch.context() as patch:
        add_small_models(patch)
        torch.manual_seed(5)
        name = f"mae_vit_{size}_patch4"
        model = models_zoo.create_model(name)
        state = {
            "task": "pretrain", "step": 1, "model": model.state_dict(), "model_name": name,
            "model_args": models_zoo.model_arguments(name),
        }  # fmt: skip
        (root / "pretrained").mkdir()
        save_checkpoint(root / "pretrained", state)
        plain = [
            {k: v for k, v in create().state_dict().items() if not k.startswith("head")}
            for create in [partial(models_zoo.create_model, name[4:], num_classes=0)] * 2
        ]
    write_signed(root / "official.pth", {"model": plain[0]})
    write_signed(root / "nested.pth", dict(zip("ab", plain, strict=True)))
    return {
        "pretrained": str(root / "pretrained" / LAST),
        "official": str(root / "official.pth"),
        "nested": str(root / "nested.pth"),
    }
