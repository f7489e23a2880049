"""Folders of images as people have them: every layout, by the commands that a user would run."""

import json
import os
from pathlib import Path

import pytest
from launch import TINY, launch, wait
from PIL import Image
from runs import records

from util.data.datasets import build_dataset
from util.errors import BadInput

FLAT = ["c.jpg", "a.jpg", "b.png", "notes.txt", "labels.csv"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MMAE_CACHE", str(tmp_path / "cache"))


def write(root: Path, names: list[str]) -> Path:
    """Small pictures of those names; files of other endings hold a text."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith((".txt", ".csv", ".DS_Store", ".json")):
            path.write_text("no image")
        else:
            colour = (40 * number % 256, 90, 200 - 30 * number % 200)
            kind = "JPEG" if name.endswith("jpg") else None
            Image.new("RGB", (20, 24), colour).save(path, kind)
    return root


def age(root: Path) -> Path:
    """Let each folder have changed long ago: the listing of what just changed is not kept."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, (1e9, 1e9))
    return root


def many(folder: str, count: int = 6) -> list[str]:
    return [f"{folder}{i}.jpg" for i in range(count)]


def listed(root: Path, split: str = "train") -> tuple[list[str], list[int], list[str], bool]:
    """Names relative to root, labels, classes, and whether there are labels."""
    source = build_dataset("imagefolder", split, root)
    names = [str(Path(source.file_name(i)).relative_to(root)) for i in range(len(source))]
    return names, [source[i][1] for i in range(len(source))], source.classes, source.labelled


# ---- Layouts -----------------------------------------------------------------------------------

# What is in the folder, then: images of train, labels, classes, the line that says it.
LAYOUTS = {
    "split": (
        ["train/cat/1.jpg", "train/ant/2.jpg", "val/ant/3.jpg", "val/cat/4.jpg", "other/5.jpg"],
        ["train/ant/2.jpg", "train/cat/1.jpg"], [0, 1], ["ant", "cat"],
        "data/train: 2 images in 2 class folders",
    ),
    "classes alone": (
        ["cat/1.jpg", "ant/2.jpg", "ant/deep/3.jpg", "labels/1.txt", "readme.txt"],
        ["ant/2.jpg", "ant/deep/3.jpg", "cat/1.jpg"], [0, 0, 1], ["ant", "cat"],
        "data: 3 images in 2 class folders",
    ),
    "flat": (
        FLAT, ["a.jpg", "b.png", "c.jpg"], [-1] * 3, [],
        "data: 3 images, no class folders: taken without labels",
    ),
    "flat and deep": (
        ["b.jpg", "a.jpg", "x/1.jpg", "x/y/2.jpg"],
        ["a.jpg", "b.jpg", "x/1.jpg", "x/y/2.jpg"], [-1] * 4, [],
        "data: 4 images, 2 of them directly in it and so of no class: taken without labels",
    ),
    "flat split": (
        ["train/1.jpg", "train/2.jpg", "val/3.jpg", "test/4.jpg"],
        ["train/1.jpg", "train/2.jpg"], [-1] * 2, [],
        "data/train: 2 images, no class folders: taken without labels",
    ),
    "strays beside classes": (
        ["train/all.jpg", "train/ant/1.jpg", "train/cat/2.jpg"],
        ["train/ant/1.jpg", "train/cat/2.jpg"], [0, 1], ["ant", "cat"],
        "left out in {data}/train: 1 beside the class folders, so of no class, such as all.jpg",
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_taken_and_said(layout, tmp_path, capsys):
    names, images, labels, classes, line = LAYOUTS[layout]
    root = age(write(tmp_path / "data", names))
    for _ in range(2):  # listed, then from the cache
        assert listed(root) == (images, labels, classes, bool(classes))
    assert line.format(data=root) in capsys.readouterr().out


@pytest.mark.parametrize(
    "names, message",
    [
        (["training/1.jpg", "validation/2.jpg"], "has no train/ but training/, validation/, by"),
        (["train2017/1.jpg", "val2017/2.jpg"], "has no train/ but train2017/, val2017/, by"),
        (["1.jpg", "test_images/2.jpg"], "has no train/ but test_images/, by"),
        (["ant/1.jpg", "Test/2.jpg"], "has no train/ but Test/, by"),
        (["val/ant/1.jpg"], "no folder .*/train; expected"),
        (["val/1.jpg", "training/1.jpg"], "/train; if training/ is it, rename it to train/; exp"),
        (["train/1.jpg", "bus/2.jpg", "car/3.jpg"], r"or a class beside bus, car\? For the first"),
        (["train/ant/a.txt", "train/cat/1.jpg"], "no image in the class folders ant of"),
    ],
)
def test_what_can_be_meant_in_two_ways_is_refused(names, message, tmp_path):
    with pytest.raises(BadInput, match=message):
        build_dataset("imagefolder", "train", write(tmp_path / "data", names))


def test_no_val_says_how_to_hold_images_out(tmp_path):
    root = write(tmp_path / "data", ["train/ant/1.jpg", "valid/ant/2.jpg"])
    with pytest.raises(
        BadInput, match=r"no val/ in .*; if valid/ is it, rename it to val/; --val_"
    ):
        build_dataset("imagefolder", "val", root)


# ---- Commands ----------------------------------------------------------------------------------

PRETRAIN = [*TINY, "--dataset=imagefolder", "--epochs=1", "--batch_size=4", "--picture_every=1"]


def pretrained(run_main, root: Path, folder: Path, *flags: str) -> str:
    """Pretrain on a folder; what was printed."""
    argv = [*PRETRAIN, f"--data_path={root}", f"--output_dir={folder}", *flags]
    code, out, err = run_main("main_pretrain", argv)
    assert code == 0, err
    return out


@pytest.mark.smoke
@pytest.mark.parametrize("decode", ["torchvision", "pil"])
def test_a_flat_folder_pretrains_and_has_pictures(decode, tmp_path, run_main, monkeypatch):
    titles = []
    grid = __import__("eval_pretrain").picture_grid
    monkeypatch.setattr(
        "eval_pretrain.picture_grid",
        lambda *rest, **more: titles.append(more["title"]) or grid(*rest, **more),
    )
    root, run = write(tmp_path / "photos", [*many("", 5), "more/x.png"]), tmp_path / "run"
    out = pretrained(run_main, root, run, f"--decode={decode}")
    assert out.count(f"{root}: 6 images, 5 of them directly in it") == 1
    assert f"pictures show training images: no val/ in {root}" in out
    assert titles and titles[0].endswith("after 1 epoch, training images")
    assert (run / "pictures/epoch-0.png").is_file()
    assert "6 images of imagefolder" in out


@pytest.mark.smoke
def test_held_out_pictures_stay_held_out(tmp_path, run_main):
    root = write(tmp_path / "photos", [*many("train/"), "val/x.jpg"])
    out = pretrained(run_main, root, tmp_path / "run")
    assert f"{root}/val: 1 image, no class folders" in out and "training images" not in out


@pytest.mark.smoke
def test_measuring_without_val_is_refused(tmp_path, run_main):
    root = write(tmp_path / "photos", many(""))
    argv = [*PRETRAIN, f"--data_path={root}", f"--output_dir={tmp_path / 'run'}", "--eval_every=1"]
    code, _, err = run_main("main_pretrain", argv)
    assert code == 2 and "--val_fraction" in err and len(err.splitlines()) == 1, err


@pytest.mark.smoke
def test_a_share_of_a_flat_folder_is_held_out(tmp_path, run_main):
    root = write(tmp_path / "photos", [*many("", 8), "x/1.jpg", "x/2.jpg"])
    flags = ["--val_fraction=0.3", "--eval_every=1"]
    out = pretrained(run_main, root, tmp_path / "run", *flags)
    assert "training images" not in out and out.count(f"{root}: 10 images") == 1
    assert "7 images of imagefolder" in out
    (record,) = records(tmp_path / "run", "eval")
    assert record["images"] == 3 and (tmp_path / "run/pictures/epoch-0.png").is_file()
    out = ["--device=cpu", f"--data_path={root}", f"--output_dir={tmp_path / 'shown'}"]
    out += [f"--checkpoint={tmp_path / 'run/checkpoint-last.pth'}", *flags[:1]]
    assert run_main("main_visualize", out)[0] == 0
    assert len(list((tmp_path / "shown/panels").glob("*original*"))) == 3


@pytest.mark.dist
def test_many_processes_say_it_once(tmp_path):
    root = write(tmp_path / "photos", [*many("", 8), "._x.jpg"])
    log, run = tmp_path / "out", tmp_path / "run"
    argv = [*PRETRAIN, "--batch_size=2", f"--data_path={root}", f"--output_dir={run}"]
    assert wait(launch(argv, log, 2)) == [0, 0], log.read_text()
    text = log.read_text() + (tmp_path / "out.1").read_text()
    for line in (f"{root}: 8 images", "pictures show training images", "1 under hidden names"):
        assert text.count(line) == 1, line


@pytest.fixture
def checkpoint(tmp_path, run_main) -> str:
    pretrained(run_main, write(tmp_path / "first", many("")), tmp_path / "run", "--picture_every=0")
    return str(tmp_path / "run/checkpoint-last.pth")


@pytest.mark.smoke
def test_commands_that_need_val_or_labels_say_so(checkpoint, tmp_path, run_main):
    flat, out = tmp_path / "first", f"--output_dir={tmp_path / 'out'}"
    by_class = write(tmp_path / "second", ["ant/1.jpg", "cat/2.jpg"])
    for module, flags, data, message in (
        ("main_visualize", [f"--checkpoint={checkpoint}"], flat, "--val_fraction"),
        ("main_knn", [f"--checkpoint={checkpoint}"], by_class, "--val_fraction"),
        ("main_finetune", [f"--finetune={checkpoint}"], by_class, "--val_fraction"),
        ("main_finetune", [f"--finetune={checkpoint}"], flat, f"train of {flat} has no class fol"),
    ):
        argv = [*flags, f"--data_path={data}", out, "--device=cpu", "--batch_size=4"]
        if module == "main_visualize":
            argv.remove("--batch_size=4")
        code, _, err = run_main(module, argv)
        assert code == 2 and message in err and len(err.splitlines()) == 1, (module, err)


@pytest.mark.smoke
def test_class_folders_alone_fine_tune(checkpoint, tmp_path, run_main):
    root = write(tmp_path / "second", [*many("ant/"), *many("cat/")])
    argv = [f"--finetune={checkpoint}", f"--data_path={root}", f"--output_dir={tmp_path / 'ft'}"]
    argv += ["--device=cpu", "--batch_size=4", "--epochs=1", "--eval_every=0", "--num_workers=0"]
    code, out, err = run_main("main_finetune", argv)
    assert code == 0 and f"{root}: 12 images in 2 class folders" in out, err


@pytest.mark.smoke
def test_a_run_among_the_images_of_a_flat_folder_is_refused(tmp_path, run_main):
    root = write(tmp_path / "photos", many(""))
    for inside in ("run", "deep/run", "."):
        argv = [*PRETRAIN, f"--data_path={root}", f"--output_dir={root / inside}"]
        code, _, err = run_main("main_pretrain", argv)
        assert code == 2 and "would become data" in err, err
    assert not (root / "run").exists()


@pytest.mark.smoke
def test_dry_run_counts_a_flat_folder(tmp_path, run_main):
    root = write(tmp_path / "photos", many(""))
    argv = [*PRETRAIN, f"--data_path={root}", "--dry_run"]
    code, out, err = run_main("main_pretrain", argv)
    assert code == 0 and "6 images of imagefolder (counted)" in out, err + out


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["jpeg", "keep"])
def test_a_flat_folder_is_packed_and_pretrains(kind, tmp_path, run_main):
    root = write(tmp_path / "photos", many(""))
    argv = [f"--data_path={root}", f"--output_dir={tmp_path / 'packed'}", f"--format={kind}"]
    code, out, err = run_main("main_pack", [*argv, "--num_workers=0"])
    assert code == 0 and f"val is not packed: no val/ in {root}" in out, err
    manifest = json.loads((tmp_path / "packed/train/packed.json").read_text())
    assert (manifest["images"], manifest["classes"], manifest["labelled"]) == (6, [], False)
    out = pretrained(run_main, Path(f"packed:{tmp_path / 'packed'}"), tmp_path / "run")
    assert "6 images" in out and "pictures show training images" in out
    code, _, err = run_main("main_pack", [*argv, "--split", "train", "val"])
    assert code == 2 and "no val/" in err


# ---- Hidden names ------------------------------------------------------------------------------

HIDDEN = [
    "train/ant/._1.jpg", "train/ant/.DS_Store", "train/.ipynb_checkpoints/1-checkpoint.jpg",
    "train/__MACOSX/ant/2.jpg", "train/ant/.thumbs/deep/3.jpg", "train/.DS_Store", "train/.x/a.txt",
]  # fmt: skip


def test_hidden_names_are_no_images_and_no_classes(tmp_path, capsys):
    root = age(write(tmp_path / "data", ["train/ant/1.jpg", "train/cat/1.jpg", *HIDDEN]))
    line = f"left out in {root}/train: 4 under hidden names, such as .ipynb_checkpoints/1-"
    for _ in range(2):
        assert listed(root) == (
            ["train/ant/1.jpg", "train/cat/1.jpg"],
            [0, 1],
            ["ant", "cat"],
            True,
        )
    assert line in capsys.readouterr().out
    flat = write(tmp_path / "flat", ["1.jpg", "._1.jpg", "2.jpg", ".git/3.jpg"])
    assert listed(flat)[0] == ["1.jpg", "2.jpg"]
    assert f"left out in {flat}: 2 under hidden names, such as ._1.jpg" in capsys.readouterr().out


def test_hidden_names_without_images_are_not_worth_a_word(tmp_path, capsys):
    write(tmp_path / "data", ["1.jpg", ".DS_Store", ".git/config.txt"])
    listed(tmp_path / "data")
    assert "left out" not in capsys.readouterr().out


@pytest.mark.smoke
def test_hidden_names_are_not_packed_nor_shown(checkpoint, tmp_path, run_main):
    root = write(tmp_path / "data", ["train/ant/1.jpg", *HIDDEN])
    argv = [f"--data_path={root}", f"--output_dir={tmp_path / 'packed'}", "--num_workers=0"]
    code, out, err = run_main("main_pack", argv)
    assert code == 0 and "1 of 1 image" in out and out.count("4 under hidden") == 1, err
    argv = [f"--checkpoint={checkpoint}", f"--images={root}", f"--output_dir={tmp_path / 'v'}"]
    code, out, err = run_main("main_visualize", [*argv, "--device=cpu"])
    assert code == 0 and f"left out in {root}: 4 under hidden names" in out, err
    assert len(list((tmp_path / "v/panels").glob("*original*"))) == 1
