"""`--max_pixels`: large images are taken or refused by the source that they are of, everywhere."""

import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_segment import NEW, SMALL
from test_segment_data import write_pairs

import util.data.pixel_limits
from util.data.datasets import build_dataset
from util.data.images import BadImage, read_image
from util.data.jpeg import read_pixels
from util.data.pixel_limits import MOST_PIXELS
from util.data.replace import find_fault
from util.data.segmentation_sets import build_segmentation_set
from util.data.source import Source, Subset

SMALL_SIDE, LARGE_SIDE = 30, 60
BETWEEN = SMALL_SIDE * SMALL_SIDE
LARGE = 1  # of the four images of a split, the large one
ALONE = ["--device=cpu", "--num_workers=0", "--input_size=32"]


def write_folders(root: Path, kind: str = "jpg") -> Path:
    """DATA/{train,val}/{a,b}/{0,1}.jpg, of which a/1 is large."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for i in (0, 1):
                side = LARGE_SIDE if (name, i) == ("a", LARGE) else SMALL_SIDE
                pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.{kind}")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folders(tmp_path_factory.mktemp("folders"))


def faults(source: Source) -> list[str]:
    """Why each image cannot be read, or nothing."""
    found = []
    for index in range(len(source)):
        try:
            source[index]
            found.append("")
        except BadImage as error:
            found.append(error.reason)
    return found


# ---- Sources and readers -----------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["pil", "torchvision"])
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_both_decoders_refuse_what_the_source_refuses(
    decoder: str, kind: str, tmp_path: Path
) -> None:
    root = write_folders(tmp_path, kind)
    for limit in (BETWEEN, None):
        source = build_dataset("imagefolder", "train", root, max_pixels=limit)
        for one in (source, Subset(source, range(4)), pickle.loads(pickle.dumps(source))):
            reasons = faults(one.with_decoder(decoder))
            refused = [index for index, reason in enumerate(reasons) if reason]
            assert refused == ([LARGE] if limit else [])
            if limit:
                assert reasons[LARGE] == (
                    f"an image of {LARGE_SIDE**2:,} pixels exceeds limit of {BETWEEN:,}; "
                    "--max_pixels N allows more"
                )
    later = Subset(source, range(4)).with_max_pixels(BETWEEN)
    assert sum(map(bool, faults(later))) == 1


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loading_processes_have_the_limit_however_they_start(data: Path, method: str) -> None:
    source = build_dataset("imagefolder", "train", data, max_pixels=BETWEEN)
    with multiprocessing.get_context(method).Pool(1) as pool:
        found = pool.starmap(find_fault, [(source, index) for index in range(4)])
    assert ["exceeds limit" in reason for reason in found] == [0, 1, 0, 0]


def test_the_default_is_pillows_and_a_raised_limit_goes_beyond(tmp_path: Path) -> None:
    """A real image above the limit, by both decoders; what a crop of it would run into as well."""
    assert Image.MAX_IMAGE_PIXELS is not None and MOST_PIXELS == 2 * 89_478_485
    width, height = 60_000, MOST_PIXELS // 60_000 + 1
    path = tmp_path / "large.jpg"
    Image.new("L", (width, height), 100).save(path)
    for read in (read_image, read_pixels):
        with pytest.raises(BadImage, match=r"exceeds limit of .*--max_pixels N allows more"):
            read(path, 1)
        with pytest.raises(BadImage, match=f"exceeds limit of {width * height - 1:,}"):
            read(path, 1, max_pixels=width * height - 1)
    assert read_pixels(path, 1, max_pixels=width * height).shape == (1, height, width)
    image = read_image(path, 1, max_pixels=width * height)
    assert image.crop((0, 0, width, height)).size == (width, height)


def test_a_raised_limit_lets_larger_files_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9), dtype=np.uint8)).save(path)
    monkeypatch.setattr(util.data.pixel_limits, "MOST_PIXELS", 10)  # and so files of 80 bytes
    with pytest.raises(BadImage, match=r"a file of .* bytes exceeds limit of 80; --max_pixels"):
        read_image(path, 1)
    assert read_image(path, 1, max_pixels=81).size == (9, 9)


def test_images_and_masks_of_segmentation_sets(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    source = build_segmentation_set("folder", "val", tmp_path, max_pixels=10_000)
    image, _ = source[0]
    source = build_segmentation_set("folder", "val", tmp_path, num_classes=4, max_pixels=5)
    with pytest.raises(BadImage, match="--max_pixels"):
        source[0]
    with pytest.raises(BadImage, match=r"masks.*--max_pixels"):  # read to count the classes
        build_segmentation_set("folder", "val", tmp_path, max_pixels=5)
    assert image.size[0] > 5


# ---- Commands ----------------------------------------------------------------------------------


def test_a_pretraining_replaces_large_images_and_says_so(
    data: Path, tmp_path: Path, run_main
) -> None:
    flags = [
        "--model=mae_vit_micro_patch8", "--batch_size=4", "--epochs=1", "--warmup_epochs=0",
        "--picture_every=0", f"--data_path={data}", f"--output_dir={tmp_path}", *ALONE,
    ]  # fmt: skip
    code, _, err = run_main("main_pretrain", [*flags, f"--max_pixels={BETWEEN}"])
    assert code == 0, err
    (line,) = (tmp_path / "bad_images.txt").read_text().splitlines()
    assert "a/1.jpg" in line and "--max_pixels N allows more" in line
    # A run goes on with the limit that it had: another would change which images it learns from.
    code, _, err = run_main("main_pretrain", [*flags, "--epochs=2"])
    assert code == 2 and f"max_pixels: was {BETWEEN}, is None" in err


def test_measurements_refuse_large_images(data: Path, tmp_path: Path, run_main) -> None:
    out = f"--output_dir={tmp_path / 'ft'}"
    common = [f"--data_path={data}", *ALONE, "--batch_size=2"]
    tuned = ["--model=vit_micro_patch8", "--epochs=1", "--warmup_epochs=0", "--aa=none"]
    assert run_main("main_finetune", [*common, *tuned, out])[0] == 0
    checkpoint = tmp_path / "ft/checkpoint-last.pth"
    limit = f"--max_pixels={BETWEEN}"
    flags = ["--eval", f"--resume={checkpoint}", *common, f"--output_dir={tmp_path / 'eval'}"]
    code, _, err = run_main("main_finetune", [*flags, limit])
    assert code == 2 and "1 image of the evaluation set cannot be decoded" in err
    flags = [f"--checkpoint={checkpoint}", *common, "--k=1", f"--output_dir={tmp_path / 'knn'}"]
    code, _, err = run_main("main_knn", [*flags, limit])
    assert code == 2 and "--max_pixels N allows more" in err


def test_pack_visualize_and_segment_take_it(data: Path, tmp_path: Path, run_main) -> None:
    packed = [f"--data_path={data}", f"--output_dir={tmp_path / 'packed'}", "--num_workers=0"]
    assert run_main("main_pack", [*packed, f"--max_pixels={BETWEEN}"])[0] == 0
    assert "a/1.jpg" in (tmp_path / "packed/train/bad_images.txt").read_text()
    write_pairs(tmp_path / "pairs", count=2)
    flags = [*SMALL, *NEW, f"--data_path={tmp_path / 'pairs'}", f"--output_dir={tmp_path / 's'}"]
    code, _, err = run_main("main_segment", [*flags, "--nb_classes=4", "--max_pixels=5"])
    assert code == 2 and "--max_pixels N allows more" in err
    flags = ["--model=mae_vit_micro_patch8", "--epochs=1", "--warmup_epochs=0", *ALONE]
    flags += ["--dataset=synthetic", "--batch_size=128", "--picture_every=0"]
    assert run_main("main_pretrain", [*flags, f"--output_dir={tmp_path}"])[0] == 0
    shown = [f"--checkpoint={tmp_path}/checkpoint-last.pth", "--device=cpu"]
    shown += [f"--output_dir={tmp_path / 'pictures'}", f"--max_pixels={BETWEEN}"]
    for more in (f"--images={data / 'val'}", f"--data_path={data}"):
        code, _, err = run_main("main_visualize", [*shown, more])
        assert code == 2 and "--max_pixels N allows more" in err
