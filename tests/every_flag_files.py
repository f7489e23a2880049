"""Small images, masks and files of weights for the tables over flags."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import add_small_models

import models_zoo
from util.train.checkpoint import LAST, save_checkpoint, write_signed


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


def write_all(root: Path, size: str = "nano") -> dict[str, str]:
    """Two sets of images and files of encoders, by name."""
    places = {}
    for seed, name in enumerate(("data", "other")):
        write_images(root / name, seed)
        places[name] = str(root / name)
    return places | write_encoders(root, size)


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
        for place in ("pretrained", "wide"):
            (root / place).mkdir()
            save_checkpoint(root / place, state)
            torch.nn.init.normal_(model.blocks[0].attn.qkv.weight, std=0.5)
        # Of other programs, which say no number of heads: encoders, classifiers, autoencoders.
        makes = {
            "": partial(models_zoo.create_model, name[4:], num_classes=0),
            "head_": partial(models_zoo.create_model, name[4:], num_classes=3),
            "mae_": partial(models_zoo.create_model, name),
        }
        for kind, create in makes.items():
            foreign = [create().state_dict() for _ in range(2)]
            write_signed(root / f"{kind}official.pth", {"model": foreign[0]})
            write_signed(root / f"{kind}nested.pth", dict(zip("ab", foreign, strict=True)))
    return {
        "pretrained": str(root / "pretrained" / LAST),
        "wide": str(root / "wide" / LAST),
        **{path.stem: str(path) for path in root.glob("*.pth")},
    }


def write_tuned(root: Path) -> dict[str, str]:
    """Two fine-tuned classifiers with averaged weights and branch scales."""
    places = {}
    with pytest.MonkeyPatch.context() as patch:
        add_small_models(patch)
        for name in ("tuned", "other_tuned"):
            arguments = models_zoo.model_arguments("vit_nano_patch4")
            arguments |= {"num_classes": 3, "lscale_init": 0.5, "global_pool": "avg"}
            models = [models_zoo.create_model("vit_nano_patch4", **arguments) for _ in range(2)]
            for model in models:
                torch.nn.init.normal_(model.head.weight)
            state = {
                "task": "finetune", "step": 1, "model_name": "vit_nano_patch4",
                "model_args": arguments, "classes": ["a", "b", "c"],
                "model": models[0].state_dict(), "ema": models[1].state_dict(),
                "data": {"dataset": "imagefolder", "mean": [0.5] * 3, "std": [0.3] * 3},
            }  # fmt: skip
            (root / name).mkdir()
            save_checkpoint(root / name, state)
            places[name] = str(root / name / LAST)
    return places
