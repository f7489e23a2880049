"""Data sets of Hugging Face, from folders on this machine; nothing is downloaded."""

import io
import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from util.data.datasets import build_dataset
from util.data.hub import HubSource
from util.data.images import BadImage
from util.data.segmentation_sets import build_segmentation_set
from util.errors import EXIT_BAD_INPUT, BadInput

datasets.disable_progress_bars()
NAMES = ["ape", "bee", "cat"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    """Its own, and no network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def encoded(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20 + seed, 30, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG" if seed % 2 else "PNG")
    return buffer.getvalue()


def split(count: int, first: int = 0, **labels) -> datasets.Dataset:
    """Images and labels; without a description, classes by name."""
    labels = labels or {"label": datasets.ClassLabel(names=NAMES)}
    features = datasets.Features({"image": datasets.Image(), **labels})
    rows = {"image": [{"bytes": encoded(first + i), "path": None} for i in range(count)]}
    for name, feature in labels.items():
        kind = getattr(feature, "dtype", "int64")
        rows[name] = [str(i % 3) if kind == "string" else i % 3 for i in range(count)]
    return datasets.Dataset.from_dict(rows, features=features)


def save(root: Path, **splits: datasets.Dataset) -> Path:
    datasets.DatasetDict(splits).save_to_disk(root)
    return root


@pytest.mark.parametrize("held_out", ["validation", "val", "test"])
def test_what_save_to_disk_wrote(tmp_path, held_out):
    root = save(tmp_path / "saved", train=split(7), **{held_out: split(4, first=7)})
    for name, count, first in (("train", 7, 0), ("val", 4, 7)):
        source = build_dataset("imagefolder", name, f"hf:{root}")
        assert len(source) == count and source.classes == NAMES and source.labelled
        for i in range(count):
            image, label = source[i]
            expected = Image.open(io.BytesIO(encoded(first + i))).convert("RGB")
            assert np.array_equal(np.asarray(image), np.asarray(expected)) and label == i % 3
            assert source.encoded(i) == (encoded(first + i), i % 3)
        fast = build_dataset("imagefolder", name, f"hf:{root}").with_decoder("torchvision")
        for i in range(count):
            assert torch.equal(fast[i][0], v2.functional.pil_to_tensor(source[i][0]))
        with pytest.raises(IndexError):
            source[count]


def test_folders_of_images_and_of_parquet(tmp_path):
    for name, seeds in (("train", range(6)), ("test", range(6, 9))):
        for seed in seeds:
            path = (
                tmp_path
                / "images"
                / name
                / NAMES[seed % 3]
                / f"{seed}.{'jpg' if seed % 2 else 'png'}"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(seed))
    (tmp_path / "parquet/data").mkdir(parents=True)
    split(6).to_parquet(tmp_path / "parquet/data/train-00000-of-00001.parquet")
    split(3, first=6).to_parquet(tmp_path / "parquet/data/validation-00000-of-00001.parquet")
    for root in ("images", "parquet"):
        sizes = {}
        for name, count in (("train", 6), ("val", 3)):
            source = build_dataset("imagefolder", name, f"hf:{tmp_path / root}")
            assert len(source) == count and source.classes == NAMES
            sizes[name] = sorted((source[i][0].height - 20, source[i][1]) for i in range(count))
        assert sizes["train"] == [(i, i % 3) for i in range(6)]
        assert sizes["val"] == [(i, i % 3) for i in range(6, 9)]


def test_columns_and_splits_by_name(tmp_path):
    two = {"fine": datasets.ClassLabel(names=NAMES), "coarse": datasets.ClassLabel(names=NAMES)}
    data = split(5, **two).rename_column("image", "picture")
    root = save(tmp_path / "two", everything=data, rest=data.select([1, 2]))
    with pytest.raises(BadInput, match=r"no split train .* everything, rest"):
        build_dataset("imagefolder", "train", f"hf:{root}")
    place = f"hf:{root}?train=everything&val=rest"
    with pytest.raises(BadInput, match=r"several columns of classes \(fine, coarse\)"):
        build_dataset("imagefolder", "train", place)
    place += "&image=picture&label=fine"
    assert len(build_dataset("imagefolder", "train", place)) == 5
    val = build_dataset("imagefolder", "val", place)  # of selected rows
    assert [val[i][1] for i in range(2)] == [1, 2] and val[0][0].height == 21


def test_labels_of_other_kinds(tmp_path):
    numbers = save(tmp_path / "n", train=split(5, label=datasets.Value("int64")))
    assert build_dataset("imagefolder", "train", f"hf:{numbers}").classes == ["0", "1", "2"]
    texts = save(tmp_path / "t", train=split(5, kind=datasets.Value("string")))
    source = build_dataset("imagefolder", "train", f"hf:{texts}")
    assert not source.labelled and source[2][1] == -1
    with pytest.raises(BadInput, match="class_encode_column"):
        build_dataset("imagefolder", "train", f"hf:{texts}?label=kind")


@pytest.mark.parametrize(
    "place, message",
    [
        ("", "is not hf:NAME_OR_DIR"), ("{root}?", None), ("{root}?picture=x", "the keys are"),
        ("{root}?image=label", "columns of images image, not label"),
        ("{root}?label=kind", "no column kind"), ("no/such_set", "cannot load no/such_set"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said(tmp_path, place, message):
    root = save(tmp_path / "saved", train=split(3))
    place = "hf:" + place.format(root=root)
    if message is None:
        assert len(build_dataset("imagefolder", "train", place)) == 3
        return
    with pytest.raises(BadInput, match=message):
        build_dataset("imagefolder", "train", place)


def test_a_broken_image_is_a_bad_image(tmp_path):
    data = split(3).cast_column("image", datasets.Image(decode=False)).to_dict()
    data["image"][1]["bytes"] = b"nothing"
    features = split(1).features
    root = save(tmp_path / "saved", train=datasets.Dataset.from_dict(data, features=features))
    for decoder in ("pil", "torchvision"):
        source = build_dataset("imagefolder", "train", f"hf:{root}").with_decoder(decoder)
        with pytest.raises(BadImage, match=f"hf:{root}-train-1"):
            source[1]


def test_a_source_pickles_small(tmp_path):
    source = build_dataset("imagefolder", "train", f"hf:{save(tmp_path / 's', train=split(200))}")
    data = pickle.dumps(source)
    assert len(data) < 20_000 and sum(len(encoded(i)) for i in range(200)) > 500_000
    again = pickle.loads(data)
    assert isinstance(again, HubSource) and again[5][0] == source[5][0]


def test_commands_train_on_it_and_pack_it(run_main, tmp_path):
    root = save(tmp_path / "saved", train=split(16), test=split(4, first=16))
    place = f"--data_path=hf:{root}"
    flags = [
        "--model=mae_vit_micro_patch4", "--input_size=16", "--batch_size=8", "--epochs=1",
        "--device=cpu", "--decoder_depth=1", "--num_workers=1", "--warmup_epochs=0",
    ]  # fmt: skip
    code, _, err = run_main("main_pretrain", [*flags, place, f"--output_dir={tmp_path / 'run'}"])
    assert code == 0, err
    target = tmp_path / "packed"
    code, _, err = run_main("main_pack", [place, f"--output_dir={target}", "--format=keep"])
    assert code == 0, err
    source = build_dataset("imagefolder", "val", f"packed:{target}")
    assert source.encoded(2) == (encoded(18), 2) and source.classes == NAMES
    code, _, err = run_main("main_pretrain", [*flags, "--data_path=hf:no/such"])
    assert code == EXIT_BAD_INPUT and "cannot load no/such" in err


# ---- Pairs of image and label map --------------------------------------------------------------


def mask_of(seed: int) -> np.ndarray:
    """[H, W] of the image that `encoded` makes: 0 ignored or background, 1 to 3, and once 255."""
    mask = np.random.default_rng(100 + seed).integers(0, 4, (20 + seed, 30), np.uint8)
    mask[0, 0] = 255
    return mask


def pairs(count: int, first: int = 0, columns: tuple[str, str] = ("image", "annotation")) -> Any:
    """Rows with a third column of images, which is neither."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in (*columns, "depth")}
    for seed in range(first, first + count):
        buffer = io.BytesIO()
        Image.fromarray(mask_of(seed)).save(buffer, "PNG")
        for name, data in zip(rows, (encoded(seed), buffer.getvalue(), encoded(9)), strict=True):
            rows[name].append({"bytes": data, "path": None})
    features = datasets.Features(dict.fromkeys(rows, datasets.Image()))
    return datasets.Dataset.from_dict(rows, features=features)


def test_pairs_are_the_stored_ones(tmp_path: Path) -> None:
    root = save(tmp_path / "saved", train=pairs(5), validation=pairs(3, 5))
    for split_name, count, first in (("train", 5, 0), ("val", 3, 5)):
        source = build_segmentation_set("ade20k", split_name, f"hf:{root}")
        assert len(source) == count and source.classes == [f"class {i}" for i in range(4)]
        shifted = build_segmentation_set("ade20k", split_name, f"hf:{root}?first=1")
        assert shifted.classes == ["class 0", "class 1", "class 2"] and shifted.target == "mask"
        for i in range(count):
            image, label = source[i]
            expected = Image.open(io.BytesIO(encoded(first + i))).convert("RGB")
            assert np.array_equal(np.asarray(image), np.asarray(expected))
            assert np.array_equal(label, mask_of(first + i))
            ignored = np.isin(mask_of(first + i), (0, 255))
            assert np.array_equal(shifted[i][1], np.where(ignored, 255, mask_of(first + i) - 1))
    mapped = ["0:ignore", "255:0", "1:1", "2:1", "3:1"]
    source = build_segmentation_set("ade20k", "val", f"hf:{root}", label_map=mapped)
    assert len(source.classes) == 2 and set(np.unique(source[0][1])) == {0, 1, 255}
    other = save(tmp_path / "other", train=pairs(2, columns=("photo", "classes")))
    named = build_segmentation_set("ade20k", "train", f"hf:{other}?image=photo&mask=classes")
    assert np.array_equal(named[1][1], mask_of(1))


BAD_PAIRS = {
    "no mask": (
        lambda root: (save(root, validation=pairs(2, columns=("a", "b"))), "")[1],
        {},
        r"columns of images a, b, depth; expected an image and its mask; name them",
    ),
    "no split": (lambda root: (save(root, train=pairs(2)), "?val=x")[1], {}, "no split x"),
    "key": (lambda root: (save(root, train=pairs(2)), "?label=x")[1], {}, "the keys are image"),
    "first": (
        lambda root: (save(root, validation=pairs(2)), "?first=-1")[1],
        {},
        "first=-1 is not",
    ),
    "classes": (
        lambda root: (save(root, validation=pairs(2)), "")[1],
        {"num_classes": 2},
        r"saved-train-|saved-val-|holds the value [23]",
    ),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_pairs_that_are_not_there(case: str, tmp_path: Path) -> None:
    make, options, message = BAD_PAIRS[case]
    query = make(tmp_path / "saved")
    with pytest.raises(BadInput, match=message):
        place = f"hf:{tmp_path / 'saved'}{query}"
        source = build_segmentation_set("ade20k", "val", place, **options)
        source[0]


def test_a_segmenter_learns_from_pairs_of_the_hub(tmp_path: Path, run_main: Any) -> None:
    """And goes on, measures and holds out, as from folders."""
    root = save(tmp_path / "saved", train=pairs(6), validation=pairs(2, 6))
    flags = [
        f"--data_path=hf:{root}?first=1", "--model=vit_micro_patch8", "--input_size=32",
        "--resize", "48", "48", "--window=32", "--stride=32", "--channels=8", "--aux_channels=8",
        "--batch_size=2", "--iterations=4", "--warmup_iterations=1", "--eval_every=2",
        "--num_workers=1", "--device=cpu", "--check_data",
    ]  # fmt: skip
    code, out, err = run_main("main_segment", [*flags, f"--output_dir={tmp_path / 'run'}"])
    assert code == 0, err
    assert "checked 6 pairs" in out + err and "mIoU" in out + err
    last = tmp_path / "run" / "checkpoint-last.pth"
    more = [f"--data_path=hf:{root}?first=1", "--eval", f"--resume={last}", "--device=cpu"]
    code, out, err = run_main("main_segment", [*more, f"--output_dir={tmp_path / 'eval'}"])
    assert code == 0, err
    held = ["--val_fraction=0.4", f"--output_dir={tmp_path / 'held'}"]
    assert run_main("main_segment", [*flags, *held])[0] == 0
    code, _, err = run_main("main_segment", [*flags, "--dataset=folder"])
    assert code == EXIT_BAD_INPUT and "leave --dataset folder out" in err
