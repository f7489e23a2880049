"""Image files by their endings: read where there is a decoder, else counted and said."""

import sys
from pathlib import Path

import pytest
from launch import TINY
from odd_files import good_files
from PIL import Image

import util.endings as endings
from util.data.datasets import build_dataset
from util.data.segmentation_sets import build_segmentation_set
from util.errors import BadInput

GOOD = good_files()
# Each new ending, in any case, by a file that has it.
NEW = {
    "a.JFIF": "plain.jfif", "b.jpe": "plain.jpe", "c.gif": "animated.gif", "d.avif": "exif.avif",
    "e.HEIC": "rgb10.heic", "f.heif": "exif.heif", "g.jp2": "plain.jp2", "h.jpg": "plain.jpg",
}  # fmt: skip
NO_HEIF = "2 .heic, 1 .heif: no decoder; pip install pillow-heif"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MMAE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def no_heif(monkeypatch) -> None:
    """pillow-heif is not installed."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    endings.register_heif.cache_clear()


def write(root: Path, names: dict[str, str]) -> Path:
    for name, kind in names.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(GOOD[kind][0] if kind else b"no image")
    return root


def run_on(root: Path, folder: Path, *flags: str) -> list[str]:
    argv = [*TINY, "--dataset=imagefolder", f"--data_path={root}", f"--output_dir={folder}"]
    return [*argv, "--batch_size=4", "--epochs=1", *flags]


@pytest.mark.smoke
@pytest.mark.parametrize("decode", ["torchvision", "pil"])
def test_every_ending_pretrains(decode, tmp_path, run_main):
    root = write(tmp_path / "data", NEW | {"x.txt": "", "y.json": "", "z.md": ""})
    argv = run_on(root, tmp_path / "run", f"--decode={decode}", "--batch_size=8")
    code, out, err = run_main("main_pretrain", argv)
    assert code == 0 and f"{root}: 8 images" in out and "left out" not in out, err + out
    assert not (tmp_path / "run/bad_images.txt").exists()
    assert out.count("of several frames or pages the first alone is read (1 image so far") == 1
    assert out.count("more than 8 bits a channel are made 8 (1 image so far") == 1


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["jpeg", "keep"])
def test_every_ending_is_packed(kind, tmp_path, run_main):
    root = write(tmp_path / "data", NEW)
    argv = [f"--data_path={root}", f"--output_dir={tmp_path / 'p'}", f"--format={kind}"]
    code, out, err = run_main("main_pack", [*argv, "--num_workers=0", "--split=train"])
    assert code == 0 and "8 of 8 images" in out, err
    source = build_dataset("imagefolder", "train", f"packed:{tmp_path / 'p'}")
    assert [source[i][0].size for i in range(8)] == [(64, 32)] * 8


@pytest.mark.smoke
def test_without_a_decoder_they_are_counted(tmp_path, run_main, no_heif):
    names = {"a.jpg": "plain.jpg", "b.png": "gray.png", "c.jpg": "plain.jpg", "d.gif": "plain.gif"}
    names |= {"e.heic": "plain.heic", "f.HEIC": "plain.heic", "g.heif": "plain.heif", "h.nef": ""}
    root = write(tmp_path / "data", names)
    code, out, err = run_main("main_pretrain", run_on(root, tmp_path / "run"))
    assert code == 0 and f"{root}: 4 images" in out, err
    assert out.count(f"note: images left out in {root}: {NO_HEIF}") == 1
    assert out.count(f"left out in {root}: 1 .nef: no decoder; save them as JPEG or PNG") == 1


def test_nothing_but_what_cannot_be_decoded_is_refused(tmp_path, no_heif):
    names = {"ant/a.heic": "plain.heic", "ant/b.heic": "plain.heic", "cat/c.heif": "plain.heif"}
    root = write(tmp_path / "data", names)
    with pytest.raises(BadInput, match=f"no image in the class folders ant, cat .*{NO_HEIF}"):
        build_dataset("imagefolder", "train", root)
    root = write(tmp_path / "flat", {Path(name).name: kind for name, kind in names.items()})
    with pytest.raises(BadInput, match=f"no images in .*{NO_HEIF}"):
        build_dataset("imagefolder", "train", root)


def test_a_class_that_cannot_be_decoded_is_not_lost_in_silence(tmp_path, no_heif):
    root = write(tmp_path / "data", {"ant/a.jpg": "plain.jpg", "cat/c.heif": "plain.heif"})
    with pytest.raises(BadInput, match=r"class folders cat of .*pip install pillow-heif"):
        build_dataset("imagefolder", "train", root)


def test_a_decoder_that_was_installed_since_is_used_at_once(tmp_path, monkeypatch):
    root = write(tmp_path / "data", {"a.jpg": "plain.jpg", "b.heic": "plain.heic"})
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pillow_heif", None)
        assert len(build_dataset("imagefolder", "train", root)) == 1
    assert len(build_dataset("imagefolder", "train", root)) == 2


@pytest.mark.parametrize("library, ending", [("avif", ".avif"), ("jpg_2000", ".jp2")])
def test_what_pillow_was_built_without_is_counted(library, ending, tmp_path, monkeypatch, capsys):
    check = endings.features.check
    monkeypatch.setattr(endings.features, "check", lambda name: name != library and check(name))
    root = write(tmp_path / "data", {"a.jpg": "plain.jpg", f"b{ending}": f"plain{ending}"})
    assert len(build_dataset("imagefolder", "train", root)) == 1
    line = f"left out in {root}: 1 {ending}: no decoder; pip install --upgrade pillow"
    assert line in capsys.readouterr().out


@pytest.mark.smoke
def test_files_that_a_flag_names(tmp_path, run_main, no_heif):
    root = write(tmp_path / "data", {"a.gif": "plain.gif", "b.jfif": "plain.jfif", "d.nef": ""})
    argv = run_on(root, tmp_path / "run", "--batch_size=2")
    assert run_main("main_pretrain", argv)[0] == 0
    write(root, {"c.heic": "plain.heic", ".d.jpg": "plain.jpg"})
    flags = [f"--checkpoint={tmp_path / 'run/checkpoint-last.pth'}", "--device=cpu"]
    flags += [f"--output_dir={tmp_path / 'shown'}"]
    code, out, err = run_main("main_visualize", [*flags, f"--images={root}"])
    assert code == 0 and len(list((tmp_path / "shown/panels").glob("*original*"))) == 2, err
    assert f"note: images left out in {root}: 1 .heic: no decoder; pip install pillow-heif" in out
    assert f"left out in {root}: 1 under hidden names, such as .d.jpg" in out
    code, _, err = run_main("main_visualize", [*flags, f"--images={root / 'c.heic'}"])
    assert code == 2 and "c.heic" in err and "pip install pillow-heif" in err, err


# ---- Images with masks -------------------------------------------------------------------------


def pairs(root: Path, names: list[str]) -> Path:
    for split in ("train", "val"):
        for name in names:
            write(root / split / "images", {name: f"plain{Path(name).suffix}"})
            mask = root / split / "masks" / f"{Path(name).stem}.png"
            mask.parent.mkdir(parents=True, exist_ok=True)
            label = Image.new("L", (64, 32), 1)
            label.paste(0, (0, 0, 9, 9))
            label.save(mask)
    return root


def test_pairs_take_the_same_endings_and_no_hidden_names(tmp_path, capsys):
    root = pairs(tmp_path / "data", ["a.jpg", "b.gif", "c.avif", "d.heic"])
    images = root / "train/images"
    write(images, {"._a.jpg": "", ".DS_Store": "", "e.nef": "", "f.txt": ""})
    write(root / "train/masks", {"._a.png": ""})
    source = build_segmentation_set("folder", "train", root, num_classes=2)
    names = [Path(source.file_name(i)).name for i in range(len(source))]
    assert names == ["a.jpg", "b.gif", "c.avif", "d.heic"]
    assert all(source[i][0].size == (64, 32) for i in range(4))
    out = capsys.readouterr().out
    assert f"left out in {images}: 1 under hidden names, such as ._a.jpg" in out
    assert f"left out in {images}: 1 .nef: no decoder" in out


def test_of_an_image_and_its_preview_the_usual_kind_is_meant(tmp_path):
    root = pairs(tmp_path / "data", ["a.jpg", "b.webp"])
    write(root / "train/images", {"a.gif": "plain.gif", "b.heic": "plain.heic"})
    source = build_segmentation_set("folder", "train", root, num_classes=2)
    assert [Path(source.file_name(i)).name for i in range(2)] == ["a.jpg", "b.webp"]
    write(root / "train/images", {"a.bmp": "plain.bmp"})
    with pytest.raises(BadInput, match=r"holds both a\.bmp and a\.jpg"):
        build_segmentation_set("folder", "train", root, num_classes=2)
