"""Label maps whose values are no class numbers: refused, or said by --label_map."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from util.data.label_values import apply_values
from util.data.segmentation_sets import build_segmentation_set
from util.errors import BadInput
from util.measure.confusion import IGNORE
from util.train.checkpoint import LAST, load_file

RUN = [
    "--dataset=folder", "--input_size=32", "--resize", "48", "32", "--window=32", "--stride=24",
    "--channels=8", "--aux_channels=8", "--batch_size=2", "--iterations=1", "--eval_every=1",
    "--warmup_iterations=1", "--save_every=0", "--log_every=1", "--num_workers=0", "--device=cpu",
    "--pictures=0", "--model=vit_micro_patch8",
]  # fmt: skip
BINARY = ["0:0", "255:1"]


def write_masks(
    root: Path, values: list[int], dtype: type = np.uint8, val: list[int] | None = None
):
    """Two pairs of each split, masks of these values in turn."""
    rng = np.random.default_rng(0)
    for split, stored in (("train", values), ("val", val or values)):
        for i in range(2):
            for kind in ("images", "masks"):
                (root / split / kind).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (24, 32, 3), np.uint8)
            Image.fromarray(pixels).save(root / split / f"images/p{i}.png")
            label = np.resize(np.array(stored, dtype), (24, 32))
            Image.fromarray(label).save(root / split / f"masks/p{i}.png")


def refused(root: Path, split: str = "train", **more) -> str:
    with pytest.raises(BadInput) as caught:
        source = build_segmentation_set("folder", split, root, **more)
        for i in range(len(source)):
            source[i]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("count", [None, 1, 2, 5])
def test_0_and_255_are_refused_with_what_to_do(count: int | None, tmp_path: Path) -> None:
    write_masks(tmp_path, [0, 255])
    text = refused(tmp_path, num_classes=count)
    assert re.search(r"train/masks/p0\.png holds the value 255, which is ignored", text)
    assert "hold the class 0 alone" in text and "--label_map 0:0 255:1" in text
    (tmp_path / "classes.txt").write_text("background\nthing\n")
    assert "--label_map 0:0 255:1" in refused(tmp_path)


def test_0_and_255_of_the_validation_set_alone(tmp_path: Path) -> None:
    write_masks(tmp_path, [0, 1], val=[0, 255])
    assert len(build_segmentation_set("folder", "train", tmp_path).classes) == 2
    assert re.search(r"val/masks/p0\.png holds the value 255", refused(tmp_path, "val"))
    # Unless somebody says that it is ignored.
    said = ["0:0", "1:1", "255:ignore"]
    source = build_segmentation_set("folder", "val", tmp_path, label_map=said)
    assert source.notes == ["all masks of val hold the class 0 alone: mIoU says little"]
    label = source[0][1]
    assert label.dtype == np.uint8 and set(label.flat) <= {0, 255}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ([0], "hold the class 0 alone"),
        ([255], "hold no class"),
        (
            [0, 128],
            r"p0\.png holds the value 128, .* 129 classes, but only 2 values occur \(0, 128\)",
        ),
        ([0, 38, 75, 113], r"113.*--label_map 0:0 38:1 75:2 \.\.\."),
    ],
)
def test_values_that_are_no_numbering_of_classes(
    values: list[int], named: str, tmp_path: Path
) -> None:
    write_masks(tmp_path, values)
    assert re.search(named, refused(tmp_path))


@pytest.mark.parametrize("value", [256, 65535])
def test_values_beyond_a_byte_are_named(value: int, tmp_path: Path) -> None:
    write_masks(tmp_path, [0, 1, value], np.uint16)
    for count in (None, 2):
        text = refused(tmp_path, num_classes=count)
        assert re.search(rf"train/masks/p0\.png holds the value {value}\b", text)
        assert "--label_map" in text
    pairs = ["0:0", "1:1", f"{value}:ignore"]
    source = build_segmentation_set("folder", "train", tmp_path, label_map=pairs)
    assert np.unique(source[0][1]).tolist() == [0, 1, IGNORE] and len(source.classes) == 2


def test_what_is_right_stays(tmp_path: Path) -> None:
    write_masks(tmp_path, [0, 1, 2, 255])
    source = build_segmentation_set("folder", "train", tmp_path)
    assert len(source.classes) == 3 and not source.notes
    assert np.unique(source[0][1]).tolist() == [0, 1, 2, IGNORE]
    write_masks(tmp_path, [0, 1, 3])
    source = build_segmentation_set("folder", "train", tmp_path)
    assert source.notes == ["no training mask holds the class 2"] and len(source.classes) == 4
    write_masks(tmp_path, [0, 128])  # who says how many there are is believed
    assert len(build_segmentation_set("folder", "train", tmp_path, num_classes=129).classes) == 129
    write_masks(tmp_path, [0, 1], val=[1])
    source = build_segmentation_set("folder", "val", tmp_path)
    assert source.notes == ["all masks of val hold the class 1 alone: mIoU says little"]


def test_the_map_says_what_values_stand_for(tmp_path: Path) -> None:
    write_masks(tmp_path, [0, 7, 255, 9])
    pairs = ["0:0", "255:1", "7:2", "9:ignore"]
    source = build_segmentation_set("folder", "train", tmp_path, label_map=pairs)
    assert len(source.classes) == 3
    assert source[0][1][0, :4].tolist() == [0, 2, 1, IGNORE]
    classes = apply_values(np.array([[0, 7], [7, 7]]), {0: 1, 7: 2}, "p0.png")
    assert classes.tolist() == [[1, 2], [2, 2]] and classes.dtype == np.uint8
    text = refused(tmp_path, label_map=BINARY)
    assert re.search(
        r"p0\.png holds the value 7 \(row 0, column 1\).*add 7:CLASS or 7:ignore", text
    )
    assert "names the class 2, but there are 2" in refused(tmp_path, num_classes=2, label_map=pairs)
    assert "two meanings" in refused(tmp_path, label_map=["0:0", "255:1", "0:1"])
    assert "fewer than two classes" in refused(tmp_path, label_map=["0:0", "255:ignore"])
    with pytest.raises(BadInput, match="--label_map is for --dataset folder"):
        build_segmentation_set("ade20k", "train", tmp_path, label_map=BINARY)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_a_label_map_with_loss_is_refused_whatever_its_name(ending: str, tmp_path: Path) -> None:
    write_masks(tmp_path, [0, 1])
    (tmp_path / "train/masks/p1.png").unlink()
    path = tmp_path / f"train/masks/p1.{ending}"
    label = Image.fromarray(np.resize(np.array([0, 1], np.uint8), (24, 32)))
    label.save(path, **({"format": "JPEG"} if ending == "png" else {"compression": "jpeg"}))
    for count in (None, 2):
        text = refused(tmp_path, num_classes=count)
        assert str(path) in text and "lossy compression" in text


@pytest.mark.smoke
def test_a_run_with_a_map_learns_resumes_and_is_measured_with_it(tmp_path: Path, run_main) -> None:
    write_masks(tmp_path / "data", [0, 255])
    flags = [*RUN, f"--data_path={tmp_path / 'data'}", f"--output_dir={tmp_path / 'run'}"]
    code, _, err = run_main("main_segment", flags)
    assert code == 2 and "--label_map 0:0 255:1" in err and len(err.splitlines()) == 1
    given = ["--label_map", *BINARY]
    code, text, err = run_main("main_segment", [*flags, *given, "--check_data"])
    assert code == 0 and "2 classes" in text, err
    state = load_file(tmp_path / "run" / LAST)
    assert state["data"]["label_map"] == state["arithmetic"]["label_map"] == BINARY
    # It must agree on resume.
    code, _, err = run_main("main_segment", [*flags, "--iterations=2", "--allow_changes"])
    assert code == 2
    code, _, err = run_main("main_segment", [*flags, "--label_map", "0:1", "255:0"])
    assert code == 2 and "label_map: was ['0:0', '255:1'], is ['0:1', '255:0']" in err
    # Evaluation takes it from the checkpoint, and says so.
    code, text, err = run_main("main_segment", [*flags, "--eval"])
    assert code == 0 and "--label_map 0:0 255:1" in text, err
    result = json.loads((tmp_path / "run/result-eval.json").read_text())
    assert result["ignored"] == 0 and [row["pixels"] for row in result["per_class"]] == [768, 768]
    images = f"--predict={tmp_path / 'data/val/images'}"
    out = f"--output_dir={tmp_path / 'maps'}"
    last = f"--resume={tmp_path / 'run' / LAST}"
    assert run_main("main_segment", [*RUN, images, out, last])[0] == 0


@pytest.mark.parametrize("word", ["255", "255:", "a:1", "255:255", "-1:0", "255:Ignore"])
def test_words_that_are_no_pair(word: str, run_main) -> None:
    code, _, err = run_main("main_segment", [*RUN, f"--label_map={word}"])
    assert code == 2 and "is not VALUE:CLASS or VALUE:ignore" in err


def test_checking_names_classes_that_no_mask_holds(tmp_path: Path, run_main) -> None:
    write_masks(tmp_path, [0, 2])
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\n")
    flags = [*RUN, f"--data_path={tmp_path}", f"--output_dir={tmp_path / 'run'}", "--check_data"]
    code, text, err = run_main("main_segment", flags)
    assert code == 0 and "note: no mask of train holds road" in text, err
