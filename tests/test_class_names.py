"""Classes of train, of val and of a checkpoint that differ, as a user meets them."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from util.data.class_names import check_splits
from util.errors import BadInput
from util.train.checkpoint import load_file

CLASSES = {"ant": (200, 40, 40), "bee": (40, 200, 40), "cat": (40, 40, 200)}
TRAIN = [
    "--model=vit_micro_patch4", "--input_size=16", "--batch_size=6", "--epochs=1", "--blr=0.05",
    "--layer_decay=1", "--warmup_epochs=0", "--num_workers=0", "--device=cpu", "--aa=none",
]  # fmt: skip


def write(root: Path, classes: dict[str, int]) -> Path:
    """So many pictures of each class, its colour with some noise."""
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            colour = tuple(v + 17 * i % 50 for v in CLASSES.get(name, (0, 0, 0)))
            Image.new("RGB", (20, 20), colour).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def run(tmp_path, run_main) -> Path:
    """A classifier of three classes; its data lie in `data`, its result in `run`."""
    write(tmp_path / "data/train", dict.fromkeys(CLASSES, 6))
    write(tmp_path / "data/val", {"ant": 3, "bee": 4, "cat": 5})
    argv = [*TRAIN, f"--data_path={tmp_path / 'data'}", f"--output_dir={tmp_path / 'run'}"]
    code, _, err = run_main("main_finetune", argv)
    assert code == 0, err
    return tmp_path / "run"


def measure(run_main, run: Path, data: Path, checkpoint: Path | None = None):
    argv = [f"--resume={checkpoint or run / 'checkpoint-last.pth'}", f"--data_path={data}"]
    argv += [f"--output_dir={run.parent / 'measured'}", "--device=cpu", "--num_workers=0"]
    return run_main("main_finetune", ["--eval", *argv, "--batch_size=6"])


def rows(path: Path) -> dict[str, list[str]]:
    with path.open(newline="") as file:
        return {row[0]: row[1:] for row in csv.reader(file)}


@pytest.mark.smoke
def test_a_part_of_the_classes_is_measured_by_name(run, tmp_path, run_main):
    part = tmp_path / "part"
    for name in ("bee", "cat"):
        shutil.copytree(tmp_path / "data/val" / name, part / "val" / name)
    code, out, err = measure(run_main, run, part)
    assert code == 0 and "imagefolder val, 2 of 3 classes: top-1" in out, err + out
    measured = tmp_path / "measured"
    result = json.loads((measured / "result-eval.json").read_text())
    assert (result["classes"], result["classes_of_head"], result["images"]) == (2, 3, 9)
    # The logits of the whole head decide, so the rows are those of the whole measurement.
    whole, found = rows(run / "confusion.csv"), rows(measured / "confusion-eval.csv")
    assert found["bee"] == whole["bee"] and found["cat"] == whole["cat"]
    assert found["ant"] == ["0", "0", "0"]
    right = int(whole["bee"][1]) + int(whole["cat"][2])
    assert result["top1"] == pytest.approx(100 * right / 9)


@pytest.mark.smoke
def test_all_classes_say_nothing_of_a_part(run, tmp_path, run_main):
    code, out, err = measure(run_main, run, tmp_path / "data")
    result = json.loads((tmp_path / "measured/result-eval.json").read_text())
    assert code == 0 and "imagefolder val: top-1" in out and "classes" not in result, err


@pytest.mark.smoke
def test_classes_that_the_checkpoint_does_not_know_are_named(run, tmp_path, run_main):
    write(tmp_path / "other/val", {"bee": 1, "dog": 1, "eel": 1})
    code, _, err = measure(run_main, run, tmp_path / "other")
    assert code == 2 and "does not know 2 of the 3 in the data: dog, eel;" in err, err
    assert "was trained for 3 classes (ant, bee, cat)" in err and len(err.splitlines()) == 1


@pytest.mark.smoke
def test_a_file_without_names_takes_those_of_train(run, tmp_path, run_main):
    foreign, part = tmp_path / "foreign.pth", tmp_path / "part"
    torch.save({"model": load_file(run / "checkpoint-last.pth")["model"]}, foreign)
    shutil.copytree(tmp_path / "data/val/cat", part / "val/cat")
    code, _, err = measure(run_main, run, part, foreign)
    assert code == 2 and "3 outputs, the data set 1 classes" in err and "does not name" in err, err
    shutil.copytree(tmp_path / "data/train", part / "train")
    code, out, err = measure(run_main, run, part, foreign)
    assert code == 0 and "val, 1 of 3 classes" in out, err
    found = rows(tmp_path / "measured/confusion-eval.csv")
    assert found["cat"] == rows(run / "confusion.csv")["cat"]


@pytest.mark.smoke
@pytest.mark.parametrize("module", ["main_finetune", "main_knn"])
def test_train_and_val_that_differ_are_told_apart(module, run, tmp_path, run_main):
    data = tmp_path / "differing"
    write(data / "train", {"ant": 6, "bee": 6, "cat": 6})
    write(data / "val", {"ant": 2, "Bee": 2, "eel": 2, "cat": 2})
    argv = [f"--data_path={data}", f"--output_dir={tmp_path / 'out'}", "--device=cpu"]
    more = [f"--checkpoint={run / 'checkpoint-last.pth'}"] if module == "main_knn" else TRAIN
    code, _, err = run_main(module, [*argv, *more])
    assert code == 2 and len(err.splitlines()) == 1, err
    assert "has 3 classes, val 4: in train alone 1 (bee); in val alone 2 (Bee, eel)" in err
    assert "head" not in err and "--finetune" not in err


def test_long_lists_are_cut_and_orders_are_told():
    many = [f"c{i}" for i in range(9)]
    with pytest.raises(BadInput, match=r"in train alone 9 \(c0, c1, c2, c3, c4 and 4 more\);"):
        check_splits(many, ["x"], "x")
    with pytest.raises(BadInput, match="2 classes, val 2: in another order"):
        check_splits(["a", "b"], ["b", "a"], "x")


def test_an_image_beside_the_class_folders_is_named(tmp_path, run_main):
    """It makes a set without labels of them, and the message must not say that there are none."""
    root = write(tmp_path / "data", dict.fromkeys(CLASSES, 6))
    Image.new("RGB", (20, 20)).save(root / "thumb.png")
    argv = [*TRAIN, f"--data_path={root}", f"--output_dir={tmp_path / 'r'}", "--val_fraction=.2"]
    code, _, err = run_main("main_finetune", argv)
    assert code == 2 and f"1 image in {root} beside the class folders (thumb.png)" in err
    (root / "thumb.png").unlink()
    code, _, err = run_main("main_finetune", argv)
    assert code == 0, err
