"""main_visualize.py: from a checkpoint and images to pictures that do not lie."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch import OF_DIGITS
from PIL import Image
from runs import records
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trained import Trained

from engine_pretrain import build_masker, make_fills, reconstruct
from models_zoo import create_model, load_pretrained
from util.data.images import IMAGENET_MEAN, IMAGENET_STD
from util.errors import EXIT_FAILED
from util.mask.patches import masked_patches
from util.mask.strategies import STANDARD
from util.measure.metrics import masked_psnr
from util.measure.visualize import panels, picture_grid
from util.train.checkpoint import LAST, load_file, save_checkpoint

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def run(trained: Trained) -> Path:
    """A run folder of a normalised-pixel model of digits."""
    return trained("main_pretrain", [*OF_DIGITS, "--norm_pix_loss"])


@pytest.fixture()
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in (("wide.png", (90, 40)), ("tall.jpg", (33, 70)), ("gray.png", (50, 50))):
        pixels = np.random.default_rng(len(name)).integers(0, 255, (*size[::-1], 3), np.uint8)
        image = Image.fromarray(pixels)
        (image.convert("L") if "gray" in name else image).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.mark.parametrize("flags", [["--images"], ["--measure", "--dataset=digits"]])
def test_weights_that_diverged_are_no_reconstruction(
    flags: list[str], run: Path, photos: Path, tmp_path: Path, run_main
) -> None:
    state, out = load_file(run / LAST), tmp_path / "out"
    state["model"]["decoder_pred.bias"].fill_(torch.nan)
    save_checkpoint(tmp_path, state)
    images = [str(photos)] if flags == ["--images"] else []
    argv = [f"--checkpoint={tmp_path / LAST}", f"--output_dir={out}", "--num_images=4"]
    code, text, err = run_main("main_visualize", [*argv, *flags, *images])
    assert code == EXIT_FAILED and "is not finite numbers" in err, (text, err)
    assert not out.exists()


def test_some_of_many_images_are_said_to_be_some(
    run: Path, photos: Path, tmp_path: Path, run_main
) -> None:
    argv = [f"--checkpoint={run / LAST}", f"--images={photos}", f"--output_dir={tmp_path / 'out'}"]
    code, text, err = run_main("main_visualize", [*argv, "--num_images=2"])
    assert code == 0 and "2 of 3 images, evenly spaced (--num_images)" in text, (text, err)


def test_files_and_folders_of_images(run: Path, photos: Path, tmp_path: Path, run_main) -> None:
    out = tmp_path / "out"
    code, text, err = run_main(
        "main_visualize",
        [f"--checkpoint={run}/checkpoint-last.pth", f"--output_dir={out}", "--images",
         str(photos), str(photos / "wide.png"), "--mask=block", "--mask_ratio=0.5"],
    )  # fmt: skip
    assert code == 0, err
    assert len(re.findall(r"model [\d.]+, mean [\d.]+, nearest [\d.]+ dB", text)) == 4
    assert "evenly spaced" not in text
    grid = Image.open(out / "grid.png")
    assert grid.width > 3 * 160 and grid.height > 4 * 160
    panels = sorted(p.name for p in (out / "panels").iterdir())
    assert len(panels) == 12 and panels[0] == "000-gray-masked.png"
    original, masked, restored = (
        np.asarray(Image.open(out / "panels" / f"000-gray-{kind}.png")).astype(int)
        for kind in ("original", "masked", "reconstruction")
    )
    hidden = masked == 128
    assert hidden.mean() == pytest.approx(0.5, abs=0.02)
    assert np.array_equal(original[~hidden], masked[~hidden])
    assert np.array_equal(original[~hidden], restored[~hidden])
    assert not np.array_equal(original[hidden], restored[hidden])


def test_the_seed_decides_the_masks(run: Path, tmp_path: Path, run_main) -> None:
    def masked(seed: int, folder: str) -> bytes:
        code, _, err = run_main(
            "main_visualize",
            [f"--checkpoint={run}/checkpoint-last.pth", "--dataset=digits", "--num_images=1",
             f"--seed={seed}", f"--output_dir={tmp_path / folder}"],
        )  # fmt: skip
        assert code == 0, err
        return next((tmp_path / folder / "panels").glob("*masked.png")).read_bytes()

    assert masked(1, "a") == masked(1, "b") != masked(2, "c")


def official(path: Path, keep: str = "") -> Path:
    """A file as the official code writes it, of a small model."""
    model = create_model("mae_vit_micro_patch8")
    weights = {k: v for k, v in model.state_dict().items() if not (keep and k.startswith(keep))}
    flags = argparse.Namespace(model="mae_vit_micro_patch8", norm_pix_loss=True, input_size=64)
    torch.save({"model": weights, "args": flags, "epoch": 3}, path)
    return path


def test_official_weights_say_what_they_are(tmp_path: Path) -> None:
    path = official(tmp_path / "official.pth")
    model, _ = load_pretrained(str(path))
    assert model.norm_pix_loss and model.img_size == (64, 64)
    saved = load_file(path)["model"]
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())


def test_perfect_predictions_restore_the_image() -> None:
    """With the target for a prediction, the picture is the image: the way back is exact."""
    for norm_pix_loss in (False, True):
        model = create_model("mae_vit_micro_patch8", norm_pix_loss=norm_pix_loss).eval()
        images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
        mask = torch.rand(2, 64).argsort(1) >= 16

        def oracle(x, mask, num_visible, model=model):
            return {"pred": model.target(masked_patches(x, mask, model.patch_size))}

        model.forward = oracle
        masker = build_masker(STANDARD, model)
        picture = reconstruct(model, images, mask, masker, IMAGENET_MEAN, IMAGENET_STD)
        assert (picture - images).abs().max() < 1e-3
        psnr = masked_psnr(images, picture, mask, model.patch_size)
        fills = make_fills(model, images, mask, masker, IMAGENET_MEAN, IMAGENET_STD)
        assert all(
            (psnr > masked_psnr(images, f, mask, model.patch_size)).all() for f in fills.values()
        )


@pytest.fixture(scope="module")
def blocks(trained: Trained) -> Path:
    """A run folder of a model that trained under masks of its own, and measured itself."""
    flags = ["--mask=block", "--mask_ratio=0.5", "--picture_every=1", "--eval_every=1"]
    return trained("main_pretrain", [*OF_DIGITS, *flags, "--eval_images=20"])


RANDOM = ["--mask=random", "--mask_ratio=0.75"]
OWN_MASK = ["--mask=block", "--mask_ratio=0.5"]


def test_pictures_take_the_masks_of_the_run_unless_told(
    blocks: Path, tmp_path: Path, run_main, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers: list[str] = []

    def spy(*args: Any, **more: Any) -> Image.Image:
        headers.append(more["headers"][1])
        return picture_grid(*args, **more)

    monkeypatch.setattr("main_visualize.picture_grid", spy)

    def shown(*flags: str) -> tuple[str, list[bytes]]:
        """The header, and the panels of masks."""
        out = tmp_path / "out"
        last = f"--checkpoint={blocks}/checkpoint-last.pth"
        own = [last, "--dataset=digits", "--num_images=3", f"--output_dir={out}"]
        code, text, err = run_main("main_visualize", [*own, *flags])
        assert code == 0 and headers[-1] in text, err
        return headers[-1], [p.read_bytes() for p in sorted((out / "panels").glob("*masked.png"))]

    assert shown() == shown(*OWN_MASK) != shown(*RANDOM)
    assert shown()[0] == "masked 50% block" and shown(*RANDOM)[0] == "masked 75% random"
    # One flag alone changes what it names.
    assert shown("--mask_ratio=0.75")[0] == "masked 75% block"


def test_weights_that_do_not_say_their_masks_are_shown_under_maes(tmp_path: Path, run_main) -> None:
    path, out = official(tmp_path / "a.pth"), f"--output_dir={tmp_path / 'out'}"
    flags = [f"--checkpoint={path}", "--dataset=digits", "--num_images=1", out]
    code, text, err = run_main("main_visualize", flags)
    assert code == 0 and "masked 75% random" in text, err


def test_measured_under_random_masks_and_under_the_runs_own(
    blocks: Path, tmp_path: Path, run_main
) -> None:
    def measured(*flags: str) -> dict[str, Any]:
        last = f"--checkpoint={blocks}/checkpoint-last.pth"
        own = [last, "--dataset=digits", "--num_images=20", "--measure", *flags]
        code, _, err = run_main("main_visualize", [*own, f"--output_dir={tmp_path}"])
        assert code == 0, err
        return json.loads((tmp_path / "reconstruction.json").read_text())

    both, random, own = measured(), measured(*RANDOM), measured(*OWN_MASK)
    names = [f"{a}_{m}" for a in ("model", "mean", "nearest") for m in ("psnr", "ssim")]
    assert {n: both[n] for n in names} == {n: random[n] for n in names}
    assert {n: both[f"own_mask_{n}"] for n in names} == {n: own[n] for n in names}
    assert (both["mask"], both["mask_ratio"], both["own_mask"]) == ("random", 0.75, "50% block")
    assert (own["mask"], own["mask_ratio"]) == ("block", 0.5)
    assert not [key for key in random | own if key.startswith("own_mask")]
    assert both["model_psnr"] != both["own_mask_model_psnr"]
    assert json.loads((tmp_path / "reconstruction-1.json").read_text()) == both
    # The run's own records have the same.
    (record,) = records(blocks, "eval")
    for name in [*names, *(f"own_mask_{n}" for n in names)]:
        assert record[name] == pytest.approx(both[name], rel=1e-5)
    assert record["own_mask"] == "50% block"
    events = EventAccumulator(str(blocks)).Reload()
    assert {"eval/model_psnr", "eval/own_mask_model_psnr"} <= set(events.Tags()["scalars"])


def test_training_draws_its_own_masks_and_says_both(
    tmp_path: Path, run_main, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers: list[str] = []
    hidden: list[float] = []

    def spy(images: torch.Tensor, mask: torch.Tensor, *more: Any) -> Any:
        hidden.append(float(mask.float().mean()))
        return panels(images, mask, *more)

    def grid(*args: Any, **more: Any) -> Image.Image:
        headers.append(more["headers"][1])
        return picture_grid(*args, **more)

    monkeypatch.setattr("eval_pretrain.panels", spy)
    monkeypatch.setattr("eval_pretrain.picture_grid", grid)
    flags = ["--dataset=digits", "--model=mae_vit_micro_patch4", "--batch_size=750", "--epochs=1",
             "--warmup_epochs=0", "--picture_every=1", "--eval_every=1", "--eval_images=20",
             "--num_workers=0", "--device=cpu"]  # fmt: skip
    for masks, words in ((OWN_MASK, "50% block"), (RANDOM, "75% random")):
        out = f"--output_dir={tmp_path / masks[0]}"
        code, text, err = run_main("main_pretrain", [*flags, *masks, out])
        assert code == 0, err
        assert headers.pop() == f"masked {words}" and hidden.pop() == float(words[:2]) / 100
        assert "held-out reconstruction, 75% random masks" in text
        assert ("the run's own 50% block masks" in text) == (masks == OWN_MASK)


BAD = {
    "no checkpoint": (["--images=."], "--checkpoint"),
    "missing checkpoint": (["--checkpoint=/nowhere.pth", "--images=."], "/nowhere.pth"),
    "no images": (["--checkpoint={last}"], "--images"),
    "both": (["--checkpoint={last}", "--images=.", "--dataset=photos"], "or"),
    "missing image": (["--checkpoint={last}", "--images=/nowhere"], "/nowhere"),
    "not an image": (["--checkpoint={last}", "--images={tmp}/a.txt"], "a.txt"),
    "empty folder": (["--checkpoint={last}", "--images={tmp}/empty"], "no image"),
    "not a checkpoint": (["--checkpoint={tmp}/a.txt", "--images=."], "a.txt"),
    "other name": (
        ["--checkpoint={last}", "--model=mae_vit_base_patch16", "--images=."],
        "mae_vit_micro_patch4",
    ),
    "encoder only": (["--checkpoint={tmp}/encoder.pth", "--images=."], "decoder"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, run: Path, tmp_path: Path, run_main) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    official(tmp_path / "encoder.pth", keep="decoder")
    flags, named = BAD[case]
    flags = [f.format(last=run / "checkpoint-last.pth", tmp=tmp_path) for f in flags]
    code, _, err = run_main("main_visualize", [*flags, f"--output_dir={tmp_path / 'out'}"])
    assert code == 2 and named in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_of_data_is_measured_and_shown_without_a_dataset(
    run: Path, tmp_path: Path, run_main
) -> None:
    held_out = tmp_path / "data" / "val" / "a"
    held_out.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (20, 20), np.uint8)
    Image.fromarray(pixels).save(held_out / "x.png")
    common = [f"--checkpoint={run}/checkpoint-last.pth", f"--data_path={tmp_path / 'data'}"]
    out = tmp_path / "out"
    code, _, err = run_main("main_visualize", [*common, f"--output_dir={out}", "--measure"])
    assert code == 0, err
    assert json.loads((out / "reconstruction.json").read_text())["images"] == 1
    code, text, err = run_main("main_visualize", [*common, f"--output_dir={out}"])
    assert code == 0 and "x.png: model" in text, err
