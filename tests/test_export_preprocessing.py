"""Exported models bring how their images are prepared: other programs classify as main_predict.py.

On photographs of scikit-image. timm's transform gives our pixels; so does transformers' processor
with Pillow, but of an odd margin around the crop it rounds the half down, where torchvision's crop,
which is ours, rounds to the even number: one pixel to the side, of every other odd margin. Its
default backend, torchvision, rounds some pixels to the next gray level.
"""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import skimage.data
import timm
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from test_classifier import micro_mae, save_pretrained
from test_predict import ALONE, predicted, table, write_images
from trained import Trained

import main_export
from models_zoo import load_classifier
from util.data.images import IMAGENET_MEAN
from util.data.preprocessing import find_preprocessing
from util.data.transforms import EvalTransform, normalize
from util.train.checkpoint import LAST

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
SIZE, SHORT = 56, 64
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for name in PHOTOS:
        Image.fromarray(getattr(skimage.data, name)()).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that reads the class token, as transformers' do."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "data")
    flags = [
        "--model=vit_micro_patch8", f"--input_size={SIZE}", "--epochs=1", "--warmup_epochs=0",
        "--batch_size=12", "--blr=2e-2", "--aa=none", "--reprob=0", "--global_pool=cls",
        "--mean", *map(str, MEAN), "--std", *map(str, STD), *ALONE,
    ]  # fmt: skip
    return trained("main_finetune", [*flags, f"--data_path={folder / 'data'}"]) / LAST


@pytest.fixture
def expected(checkpoint: Path, photographs: Path, tmp_path: Path, run_main) -> dict[str, list]:
    """Classes and probabilities by main_predict, of each file."""
    predicted(run_main, checkpoint, photographs, tmp_path / "ours")
    return {
        row["file"]: [(row[f"class{i}"], float(row[f"probability{i}"])) for i in ("", "_2", "_3")]
        for row in table(tmp_path / "ours")
    }


def export(checkpoint: Path, to: str, output: Path, capfd: Any) -> str:
    capfd.readouterr()
    main_export.main([f"--checkpoint={checkpoint}", f"--to={to}", f"--output={output}"])
    return capfd.readouterr().out


def said(shares: torch.Tensor, classes: list[str]) -> list[tuple[str, float]]:
    order = shares.argsort(descending=True)
    return [(classes[i], pytest.approx(float(shares[i]), rel=1e-4, abs=1e-6)) for i in order]


def ours(file: Path) -> torch.Tensor:
    """Pixel values [3, h, w] of evaluation."""
    pixels = EvalTransform((SIZE, SIZE))(Image.open(file).convert("RGB"))[None]
    return normalize(pixels, MEAN, STD)[0]


# ---- timm --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit.pth", "vit.safetensors", "vit"])
def test_timm_prepares_and_classifies_as_we_do(
    name: str, checkpoint: Path, photographs: Path, expected: dict, tmp_path: Path, capfd
) -> None:
    out = export(checkpoint, "timm", tmp_path / name, capfd)
    model = eval(out.strip().splitlines()[-1], {"timm": timm, "functools": functools}).eval()
    config = timm.data.resolve_model_data_config(model)
    assert (tuple(config["mean"]), tuple(config["std"])) == (MEAN, STD)
    assert tuple(config["input_size"]) == (3, SIZE, SIZE)
    assert (config["crop_pct"], config["interpolation"]) == (0.875, "bicubic")
    transform = timm.data.create_transform(**config, is_training=False)
    classes = load_classifier(str(checkpoint), head="own")[2]["classes"]
    for file in sorted(photographs.iterdir()):
        image = transform(Image.open(file).convert("RGB"))
        torch.testing.assert_close(image, ours(file), rtol=0, atol=1e-6)
        assert expected[file.name] == said(model(image[None])[0].softmax(0), classes)


def test_what_timms_files_say(
    checkpoint: Path, photographs: Path, expected: dict, tmp_path: Path, capfd, run_main
) -> None:
    """A folder as on the hub, the same in a file's metadata; and both are read again."""
    export(checkpoint, "timm", tmp_path / "vit", capfd)
    export(checkpoint, "timm", tmp_path / "vit.safetensors", capfd)
    config = json.loads((tmp_path / "vit/config.json").read_text())
    with safe_open(tmp_path / "vit.safetensors", "pt") as file:
        assert json.loads(file.metadata()["timm"]) == config
    assert config["pretrained_cfg"]["mean"] == list(MEAN) and config["num_classes"] == 3
    assert config["label_names"] == load_classifier(str(checkpoint), head="own")[2]["classes"]
    (tmp_path / "again").mkdir()
    for kind in ("vit", "vit/model.safetensors"):
        # Heads of attention are in no file of timm's.
        predicted(run_main, tmp_path / kind, photographs, tmp_path / "again", "--num_heads=4")
        for row in table(tmp_path / "again"):
            label, share = expected[row["file"]][0]
            assert (row["class"], float(row["probability"])) == (label, pytest.approx(share, 1e-4))


@torch.no_grad()
def test_timm_of_gray_and_oblong_images(tmp_path: Path, capfd) -> None:
    model, arguments = micro_mae(in_chans=1, img_size=(48, 64))
    path = save_pretrained(tmp_path, model, arguments)
    out = export(path, "timm", tmp_path / "vit", capfd)
    assert "48 x 64 / 1, centre crop" in out and "ImageNet's, for the file says none" in out
    theirs = timm.create_model(f"local-dir:{tmp_path / 'vit'}", pretrained=True)
    config = timm.data.resolve_model_data_config(theirs)
    assert config["input_size"] in ((1, 48, 64), [1, 48, 64])
    assert tuple(config["mean"]) == pytest.approx([sum(IMAGENET_MEAN) / 3])


# ---- transformers ------------------------------------------------------------------------------


@torch.no_grad()
def test_transformers_prepares_and_classifies_as_we_do(
    checkpoint: Path, photographs: Path, expected: dict, tmp_path: Path, capfd, run_main
) -> None:
    export(checkpoint, "transformers", tmp_path / "vit", capfd)
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "vit").eval()
    exact = transformers.AutoImageProcessor.from_pretrained(tmp_path / "vit", backend="pil")
    usual = transformers.AutoImageProcessor.from_pretrained(tmp_path / "vit")
    predicted(run_main, tmp_path / "vit", photographs, tmp_path / "again")  # ours, of what it says
    for row in table(tmp_path / "again"):
        label, share = expected[row["file"]][0]
        assert (row["class"], float(row["probability"])) == (label, pytest.approx(share, 1e-4))
    level = 1 / 255 / torch.tensor(STD)[:, None, None]  # one gray level of each channel
    aside = 0
    for file in sorted(photographs.iterdir()):
        image = Image.open(file).convert("RGB")
        found = exact(image, return_tensors="pt")["pixel_values"]
        near = usual(image, return_tensors="pt")["pixel_values"]
        assert ((near - found).abs() <= 1.01 * level).all()
        sides = [SHORT * side // min(image.size) - SIZE for side in image.size]
        right, down = (round(side / 2) - side // 2 for side in sides)
        if right or down:
            part, whole = found[0, :, down:, right:], ours(file)[:, : SIZE - down, : SIZE - right]
            torch.testing.assert_close(part, whole, rtol=0, atol=1e-5)
            aside += 1
            continue
        torch.testing.assert_close(found[0], ours(file), rtol=0, atol=1e-5)
        names = [model.config.id2label[i] for i in range(3)]
        assert expected[file.name] == said(model(found).logits[0].softmax(0), names)
    assert 0 < aside < len(PHOTOS)


def test_a_pretrained_model_has_its_processor_too(tmp_path: Path, capfd) -> None:
    model, arguments = micro_mae(img_size=64)
    path = save_pretrained(tmp_path, model, arguments)
    export(path, "transformers", tmp_path / "mae", capfd)
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path / "mae")
    pixels = theirs(Image.new("RGB", (90, 70)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 64, 64)
    assert theirs.image_mean == (0.5, 0.5, 0.5) != IMAGENET_MEAN  # its checkpoint's


# ---- Numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "size", "share"),
    [
        ({}, (224, 224), 0.875),
        ({}, (256, 256), 1.0),
        ({"dataset": "digits"}, (32, 32), 1.0),
        ({"dataset": "imagefolder"}, (32, 32), 0.875),
        ({"dataset": "imagefolder", "eval_margin": False}, (32, 32), 1.0),
    ],
)
def test_the_margin_is_evaluations(data: dict, size: tuple[int, int], share: float) -> None:
    seen, known = find_preprocessing(data, size, 3)
    assert seen.share == share and not known
    short = EvalTransform(size, margin=share < 1).cover[0]
    assert seen.for_transformers()["size"] == {"shortest_edge": short}
    assert int(size[0] / seen.for_timm()["crop_pct"]) == short
