"""Packed data sets: what is in them, that they are whole, and that runs on them are exact."""

import errno
import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import ROOT, launch, until, wait
from PIL import Image
from runs import different, records, weights
from torchvision.transforms import v2

import util.data.packing
from util.data.datasets import build_dataset
from util.data.images import read_image
from util.data.manifest import read_manifest, sealed
from util.data.packed import PackedSource, checksum
from util.data.packing import Recipe
from util.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_STOPPED, BadInput
from util.train.agreement import Agreement, Wish

PER_SHARD = util.data.packing.FEWEST
IMAGES = {"train": 150, "val": 9}  # three shards and one


def picture(seed: int, width: int, height: int) -> Image.Image:
    """A smooth image with some noise, which JPEG keeps within a few levels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    planes = [128 + 100 * np.sin(x / 17 + seed + c) * np.cos(y / 13 - c) for c in range(3)]
    noisy = np.stack(planes, axis=-1) + rng.normal(0, 3, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """JPEG files of several sizes in two classes, one PNG, and two that are broken."""
    root = tmp_path_factory.mktemp("files")
    for split, count in IMAGES.items():
        for name in ("ape", "bee"):
            (root / split / name).mkdir(parents=True)
        for i in range(count):
            exif = Image.Exif()
            exif[0x0112] = 6 if i == 2 else 1
            path = root / split / ("ape", "bee")[i % 2] / f"{i:03d}.jpg"
            picture(i, 40 + i % 7, 30 + i % 5).save(path, quality=95, exif=exif.tobytes())
        picture(99, 50, 40).save(root / split / "bee" / "last.png")
    (root / "train/ape/004.jpg").write_bytes(b"no image")
    cut = root / "train/ape/100.jpg"
    cut.write_bytes(cut.read_bytes()[:400])
    return root


def pack(run_main, data: Path | str, target: Path, *more: str) -> tuple[int, str, str]:
    flags = [f"--data_path={data}", f"--output_dir={target}", "--num_workers=0", *more]
    return run_main("main_pack", flags)


@pytest.fixture
def packed(run_main, folder, tmp_path) -> Path:
    """The folder, packed as JPEG of short side 24."""
    code, out, err = pack(run_main, folder, tmp_path / "packed", "--short_side=24")
    assert code == 0, err
    assert "149 of 151 images, 3 shards" in out and "bad_images.txt" in out
    return tmp_path / "packed"


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def tensor(image: Image.Image | torch.Tensor) -> torch.Tensor:
    return image if isinstance(image, torch.Tensor) else v2.functional.pil_to_tensor(image)


def originals(folder: Path, split: str) -> list[tuple[str, int]]:
    source = build_dataset("imagefolder", split, folder)
    broken = ("004.jpg", "100.jpg")
    pairs = [(source.file_name(i), int(source.labels[i])) for i in range(len(source))]
    return [p for p in pairs if split == "val" or not p[0].endswith(broken)]


# --- What is in it ---


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", ["jpeg", "raw", "keep"])
def test_it_holds_the_images_of_the_folder(run_main, folder, tmp_path, kind, split):
    assert pack(run_main, folder, tmp_path, f"--format={kind}", "--short_side=24")[0] == 0
    source = build_dataset("imagefolder", split, f"packed:{tmp_path}")
    expected = originals(folder, split)
    assert len(source) == len(expected) and source.classes == ["ape", "bee"]
    original = build_dataset("imagefolder", split, folder)
    assert (source.mean, source.std, source.channels) == (original.mean, original.std, 3)
    assert source.eval_margin and source.labelled and source.name == "imagefolder"
    for index, (path, label) in enumerate(expected):
        image, found = source[index]
        assert found == label and source.file_name(index).endswith(path[len(str(folder)) + 7 :])
        whole = read_image(path, 3)
        if kind == "keep":
            assert np.array_equal(np.asarray(image), np.asarray(whole))
            assert source.encoded(index) == (Path(path).read_bytes(), label)
            continue
        assert min(image.size) == 24
        shape = tuple(max(24, round(side * 24 / min(whole.size))) for side in whole.size)
        small = np.asarray(whole.resize(shape, Image.Resampling.BICUBIC))
        if kind == "raw":
            assert np.array_equal(np.asarray(image), small)
        else:
            again = io.BytesIO()
            Image.fromarray(small).save(again, "JPEG", quality=90)
            assert np.array_equal(np.asarray(image), np.asarray(Image.open(again)))


@pytest.mark.parametrize("kind", ["jpeg", "raw"])
@pytest.mark.parametrize("channels", [1, 3])
def test_both_decoders_give_the_same(run_main, folder, tmp_path, kind, channels):
    assert pack(run_main, folder, tmp_path, f"--format={kind}")[0] == 0
    by_pil = build_dataset("imagefolder", "val", f"packed:{tmp_path}", channels=channels)
    place = f"packed:{tmp_path}"
    fast = build_dataset("imagefolder", "val", place, channels=channels).with_decoder("torchvision")
    for index in range(len(fast)):
        image = fast[index][0]
        assert isinstance(image, torch.Tensor) and image.shape[0] == channels
        assert torch.equal(image, tensor(by_pil[index][0]))


def test_nothing_is_enlarged_and_nothing_shrunk_where_not_asked(run_main, folder, tmp_path):
    for side in (0, 1000):
        target = tmp_path / str(side)
        assert pack(run_main, folder, target, "--format=raw", f"--short_side={side}")[0] == 0
        source = build_dataset("imagefolder", "val", f"packed:{target}")
        for index, (path, _) in enumerate(originals(folder, "val")):
            assert np.array_equal(np.asarray(source[index][0]), np.asarray(read_image(path, 3)))


@pytest.mark.parametrize("dataset", ["digits", "photos", "synthetic"])
def test_any_set_can_be_packed(run_main, tmp_path, dataset):
    flags = [f"--dataset={dataset}", f"--output_dir={tmp_path}", "--split", "val"]
    code, _, err = run_main("main_pack", [*flags, "--format=raw", "--short_side=0"])
    assert code == 0, err
    original = build_dataset(dataset, "val")
    source = build_dataset("imagefolder", "val", f"packed:{tmp_path}")
    assert (source.mean, source.std) == (original.mean, original.std)
    assert source.classes == original.classes and source.labelled == original.labelled
    assert source.eval_margin == original.eval_margin and len(source) == len(original)
    for index in range(0, len(source), 7):
        assert torch.equal(tensor(source[index][0]), tensor(original[index][0]))
        assert source[index][1] == original[index][1]
    code, _, err = run_main(
        "main_pack", [*flags[:1], f"--output_dir={tmp_path}/x", "--format=keep"]
    )
    assert code == EXIT_BAD_INPUT and "no image files to keep" in err


def test_images_of_five_channels(tmp_path):
    source = build_dataset("synthetic", "val", channels=5)
    util.data.packing.pack(
        source, tmp_path / "val", Recipe("raw", 0, 90), {}, num_workers=0, max_bad_images=0
    )
    again = build_dataset("imagefolder", "val", f"packed:{tmp_path}")
    assert again.channels == 5 and torch.equal(again[3][0], source[3][0])
    with pytest.raises(BadInput, match="--format raw --short_side 0"):
        Recipe("jpeg", 0, 90)(source, 0)


# --- Bad images ---


def test_bad_images_are_listed_or_too_many(run_main, folder, tmp_path):
    code, _, err = pack(run_main, folder, tmp_path, "--max_bad_images=1")
    assert code == EXIT_FAILED and "2 images cannot be decoded" in err
    lines = (tmp_path / "train/bad_images.txt").read_text().splitlines()
    assert [line.split(": ")[0][-7:] for line in lines] == ["004.jpg", "100.jpg"]
    assert "no image of a known kind" in lines[0]
    assert pack(run_main, folder, tmp_path, "--max_bad_images=2")[0] == 0


# --- Whole, whatever happens ---


def test_workers_do_not_change_the_files(run_main, folder, tmp_path):
    for workers in (0, 2):
        pack(run_main, folder, tmp_path / str(workers), f"--num_workers={workers}")
    assert files(tmp_path / "0") == files(tmp_path / "2")


def test_killed_again_and_again_it_ends_in_the_same_files(run_main, folder, tmp_path):
    """kill -9 as soon as something new is there: a temporary file, or one more shard."""
    slow = (
        "import sys, time; sys.path.insert(0, '.'); import util.data.packing as p, main_pack\n"
        "call = p.Recipe.__call__\n"
        "p.Recipe.__call__ = lambda *a: (time.sleep(0.004), call(*a))[1]\n"
        "main_pack.main(sys.argv[1:])"
    )
    target = tmp_path / "cut"
    flags = [f"--data_path={folder}", f"--output_dir={target}", "--num_workers=1"]
    shards = []
    for kill in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", slow, *flags], cwd=ROOT, stderr=subprocess.DEVNULL
        )
        until(
            lambda: len(list(target.glob("*/shard-*.bin"))) > kill or child.poll() is not None  # noqa: B023
        )
        time.sleep(0.05)  # into the next one
        child.send_signal(signal.SIGKILL)
        child.wait()
        shards.append({p: p.stat().st_ino for p in target.glob("*/shard-*.bin")})
        if kill == 0:
            with pytest.raises(BadInput, match="its packing has not ended"):
                build_dataset("imagefolder", "train", f"packed:{target}")
    assert len(shards[0]) >= 1 and pack(run_main, folder, target)[0] == 0
    assert all(path.stat().st_ino == inode for path, inode in shards[0].items())  # not done twice
    assert pack(run_main, folder, tmp_path / "whole")[0] == 0
    kept = {name: data for name, data in files(target).items() if "/." not in name}
    assert kept == files(tmp_path / "whole")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_and_nothing_is_lost(run_main, folder, tmp_path, monkeypatch, code):
    def fsync(handle: int) -> None:
        if ".shard-00001.bin." in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(util.data.packing.os, "fsync", fsync)
        status, _, err = pack(run_main, folder, tmp_path)
    assert status == EXIT_FAILED and "1 of 3 shards" in err and os.strerror(code) in err
    assert "shard-00001.bin" in err and "same command" in err
    assert sorted(p.name for p in (tmp_path / "train").glob("shard*bin")) == ["shard-00000.bin"]
    assert not list((tmp_path / "train").glob(".*"))
    assert pack(run_main, folder, tmp_path)[0] == 0


def test_a_real_limit_on_file_size(folder, tmp_path):
    limit = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),)[0]
    flags = [f"--data_path={folder}", f"--output_dir={tmp_path}", "--num_workers=1"]
    command = [sys.executable, "main_pack.py", *flags]
    run = subprocess.run(command, cwd=ROOT, preexec_fn=limit, capture_output=True, text=True)
    assert run.returncode == EXIT_FAILED and "File too large" in run.stderr, run.stderr
    assert "Traceback" not in run.stderr


def test_other_settings_or_images_are_refused(run_main, packed, folder, tmp_path):
    before = files(packed)
    code, _, err = pack(run_main, folder, packed, "--short_side=24", "--quality=80")
    assert code == EXIT_BAD_INPUT and "quality: was 90, is 80" in err
    code, _, err = run_main("main_pack", ["--dataset=digits", f"--output_dir={packed}"])
    assert code == EXIT_BAD_INPUT and "dataset: was imagefolder, is digits" in err
    assert files(packed) == before
    (tmp_path / "full/train").mkdir(parents=True)
    (tmp_path / "full/train/mine.txt").write_text("mine")
    code, _, err = pack(run_main, folder, tmp_path / "full")
    assert code == EXIT_BAD_INPUT and "holds other files" in err
    code, _, err = run_main("main_pack", ["--dataset=digits"])
    assert code == EXIT_BAD_INPUT and "--output_dir is missing" in err


# --- Damage ---


def test_verify_sees_every_damage_and_a_new_start_mends_it(run_main, packed, folder):
    before = files(packed)
    code, out, _ = run_main("main_pack", [f"--output_dir={packed}", "--verify"])
    assert code == 0 and "149 images" in out and "10 images" in out
    for name in [n for n in before if n.endswith((".bin", ".npy"))]:
        path = packed / name
        damaged = bytearray(before[name])
        damaged[len(damaged) // 2] ^= 4
        path.write_bytes(damaged)
        code, _, err = run_main("main_pack", [f"--output_dir={packed}", "--verify"])
        assert code == EXIT_BAD_INPUT and str(path) in err, name
        path.unlink()
        assert pack(run_main, folder, packed, "--short_side=24")[0] == 0
        assert files(packed) == before, name


TRAIN = [
    "--model=mae_vit_micro_patch4", "--input_size=16", "--batch_size=24", "--epochs=1",
    "--device=cpu", "--decoder_depth=1", "--num_workers=0", "--picture_every=0",
    "--warmup_epochs=0",
]  # fmt: skip


@pytest.mark.parametrize(
    "damage, name",
    [
        ("flip", "shard-00001.bin"), ("cut", "shard-00001.bin"), ("gone", "shard-00002.bin"),
        ("gone", "records.npy"), ("flip", "records.npy"), ("cut", "names.npy"),
        ("gone", "packed.json"), ("cut", "packed.json"),
    ],
)  # fmt: skip
def test_damage_ends_a_run_with_the_files_name(run_main, packed, tmp_path, damage, name):
    path = packed / "train" / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        flipped = content[:900] + bytes(b ^ 255 for b in content[900:990]) + content[990:]
        path.write_bytes(flipped if damage == "flip" else content[:-7])
    flags = [f"--data_path=packed:{packed}", f"--output_dir={tmp_path / 'run'}"]
    code, _, err = run_main("main_pretrain", [*TRAIN, "--epochs=4", *flags])
    assert code == EXIT_BAD_INPUT and str(path) in err, err


def test_no_packed_set_there(run_main, tmp_path):
    code, _, err = run_main("main_pretrain", [*TRAIN, f"--data_path=packed:{tmp_path}"])
    assert code == EXIT_BAD_INPUT and str(tmp_path / "train/packed.json") in err
    flags = ["--dataset=digits", f"--data_path=packed:{tmp_path}"]
    code, _, err = run_main("main_pretrain", [*TRAIN, *flags])
    assert code == EXIT_BAD_INPUT and "leave --dataset digits out" in err


# --- Memory ---


def test_a_source_pickles_small_and_reads_on(packed):
    source = build_dataset("imagefolder", "train", f"packed:{packed}")
    first = [np.asarray(source[i][0]) for i in range(5)]
    data = pickle.dumps(source)
    assert len(data) < 2000
    again = pickle.loads(data)
    assert all(np.array_equal(np.asarray(again[i][0]), first[i]) for i in range(5))
    assert isinstance(again, PackedSource)
    assert isinstance(again.records.base, np.memmap)  # read when touched, not copied


# --- Runs ---


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in records(folder, "train")]


@pytest.mark.parametrize("crops", [1, 2])
def test_a_run_on_it_stops_and_goes_on_to_the_same_bits(
    run_main, packed, tmp_path, monkeypatch, crops
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = [*TRAIN, "--epochs=3", "--log_every=1", f"--crops_per_decode={crops}"]
    flags += [f"--data_path=packed:{packed}"]
    assert run_main("main_pretrain", [*flags, f"--output_dir={whole}"])[0] == 0
    asked = []

    def stop(self, *args):
        asked.append(1)
        return Wish(save=False, stop=15 if len(asked) == 8 else 0)  # of 6 steps an epoch

    with monkeypatch.context() as patch:
        patch.setattr(Agreement, "after_step", stop)
        assert run_main("main_pretrain", [*flags, f"--output_dir={cut}"])[0] == EXIT_STOPPED
    more = [f"--output_dir={cut}", "--num_workers=2", "--prefetch_factor=3"]
    assert run_main("main_pretrain", [*flags, *more])[0] == 0
    assert not different(weights(whole), weights(cut)) and losses(whole) == losses(cut)


def test_going_on_with_other_pixels_is_refused(run_main, packed, folder, tmp_path):
    flags = [*TRAIN, f"--output_dir={tmp_path / 'run'}"]
    assert run_main("main_pretrain", [*flags, f"--data_path=packed:{packed}"])[0] == 0
    target = tmp_path / "raw"
    assert pack(run_main, folder, target, "--format=raw", "--short_side=24")[0] == 0
    code, _, err = run_main("main_pretrain", [*flags, f"--data_path=packed:{target}"])
    assert code == EXIT_BAD_INPUT
    assert "stored: was jpeg, quality 90, short side 24, is raw, short side 24" in err


@pytest.mark.dist
def test_two_processes_train_as_one(packed, tmp_path):
    """18 steps in float32: rounding alone, 1e-4 relative."""
    for world in (1, 2):
        out = tmp_path / str(world)
        out.mkdir()
        flags = [*TRAIN, "--epochs=3", "--log_every=1", "--crops_per_decode=2"]
        flags += [f"--data_path=packed:{packed}", f"--output_dir={out}"]
        flags += [f"--batch_size={24 // world}"]
        assert wait(launch(flags, out / "out", world)) == [0] * world, (out / "out").read_text()
    one, two = (np.array(losses(tmp_path / str(world))) for world in (1, 2))
    assert len(one) == 18 and np.allclose(one, two, rtol=1e-4)


def test_every_other_command_reads_it(run_main, packed, tmp_path):
    place = f"--data_path=packed:{packed}"
    run = tmp_path / "run"
    more = ["--picture_every=1", "--eval_every=1", "--eval_images=4", f"--output_dir={run}"]
    assert run_main("main_pretrain", [*TRAIN, *more, place])[0] == 0
    checkpoint = run / "checkpoint-last.pth"
    flags = [f"--finetune={checkpoint}", "--batch_size=8", "--epochs=1", "--warmup_epochs=0"]
    flags += [f"--output_dir={tmp_path / 'ft'}", "--num_workers=0", "--device=cpu", place]
    code, _, err = run_main("main_finetune", flags)
    assert code == 0, err
    flags = [f"--checkpoint={checkpoint}", "--k", "3", "--num_workers=0", "--device=cpu", place]
    code, _, err = run_main("main_knn", [*flags, f"--output_dir={tmp_path / 'knn'}"])
    assert code == 0, err
    flags = [f"--checkpoint={checkpoint}", f"--output_dir={tmp_path / 'p'}", "--device=cpu", place]
    code, _, err = run_main("main_visualize", flags)
    assert code == 0, err


def test_a_packed_set_can_be_packed_again(run_main, packed, tmp_path):
    target = tmp_path / "again"
    assert pack(run_main, f"packed:{packed}", target, "--format=keep")[0] == 0
    a, b = (build_dataset("imagefolder", "val", f"packed:{root}") for root in (packed, target))
    assert [a.encoded(i) for i in range(len(a))] == [b.encoded(i) for i in range(len(b))]


# --- The index ---


@pytest.fixture(scope="module")
def packed_once(folder, tmp_path_factory) -> Path:
    """The held-out images, packed."""
    root = tmp_path_factory.mktemp("once") / "val"
    described = {"dataset": "imagefolder", "data_path": str(folder), "split": "val"}
    source = build_dataset("imagefolder", "val", folder)
    util.data.packing.pack(
        source, root, Recipe("jpeg", 24, 90), described, num_workers=0, max_bad_images=0
    )
    return root


@pytest.fixture
def split(packed_once, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(packed_once, tmp_path / "p/val"))


def manifest_flips(content: bytes, count: int) -> list[bytes]:
    """The index with one bit changed, at so many places."""
    rng = np.random.default_rng(0)
    flipped = []
    for at in rng.choice(8 * len(content), count, replace=False):
        changed = bytearray(content)
        changed[at // 8] ^= 1 << (at % 8)
        flipped.append(bytes(changed))
    return flipped


def test_every_bit_of_the_index_is_refused_or_without_effect(split):
    path = split / "packed.json"
    content = path.read_bytes()
    whole = json.loads(content)
    refused = 0
    for changed in manifest_flips(content, 400):
        path.write_bytes(changed)
        try:
            about = read_manifest(split)
        except BadInput as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert about == whole  # a space that became another kind of space
    assert refused > 390


WRONG = {
    "version": 2, "name": 3, "format": "png", "images": "9", "channels": True, "mean": [0.4, 0.4],
    "std": [0.0, 0.2, 0.2], "eval_margin": 1, "labelled": None, "classes": ["ape", 2],
    "settings": {"format": "jpeg"}, "shards": [{"file": "x", "bytes": 1, "sha256": "0"}],
    "tables": {"records.npy": "0"},
}  # fmt: skip


@pytest.mark.parametrize("key", WRONG)
@pytest.mark.parametrize("checked", [True, False])
def test_wrong_values_in_the_index_are_refused(split, key, checked):
    path = split / "packed.json"
    about = json.loads(path.read_bytes())
    del about["checksum"]
    for changed in (about | {key: WRONG[key]}, {k: v for k, v in about.items() if k != key}):
        path.write_bytes(sealed(changed) if checked else json.dumps(changed).encode())
        with pytest.raises(BadInput, match=key) as caught:
            PackedSource(split, "val")
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "5", "{}", "[" * 100_000, '{"version": 1' + "0" * 5000, '{"mean": NaN}', "\xff"],
)
def test_what_is_no_index_is_refused(split, text):
    path = split / "packed.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(BadInput, match=r"packed\.json"):
        PackedSource(split, "val")


def test_statistics_cannot_change_unseen(packed, run_main):
    path = packed / "val/packed.json"
    content = path.read_text()
    assert content.count("0.485") == 1
    path.write_text(content.replace("0.485", "0.985"))
    code, _, err = run_main("main_pack", [f"--output_dir={packed}", "--verify"])
    assert code == EXIT_BAD_INPUT and "checksum does not match" in err


def test_an_index_without_checksum_opens_and_verify_says_so(packed, folder, run_main):
    path = packed / "val/packed.json"
    content = path.read_bytes()
    about = json.loads(content)
    del about["checksum"]
    path.write_text(json.dumps(about, indent=1))
    assert len(PackedSource(packed / "val", "val")) == IMAGES["val"] + 1
    code, out, _ = run_main("main_pack", [f"--output_dir={packed}", "--verify"])
    assert code == 0 and out.count("has no checksum") == 1 and "val: 10 images" in out
    path.unlink()
    assert pack(run_main, folder, packed, "--short_side=24")[0] == 0
    assert path.read_bytes() == content


def test_tables_of_another_packing_are_refused(split):
    root = split
    about = json.loads((root / "packed.json").read_bytes())
    records = np.load(root / "records.npy")
    for field, value in (("shard", 7), ("start", 1 << 40), ("size", -1), ("label", 2)):
        changed = records.copy()
        changed[field][3] = value
        np.save(root / "records.npy", changed)
        tables = about["tables"] | {"records.npy": checksum(root / "records.npy")}
        (root / "packed.json").write_bytes(sealed(about | {"tables": tables}))
        with pytest.raises(BadInput, match="of another packing: image 3"):
            PackedSource(root, "val")


def test_a_damaged_part_is_packed_once_more(packed, folder, run_main):
    before = files(packed)
    part = packed / "train/shard-00001.bin.json"
    content = part.read_bytes()
    at = content.index(b'"records": [[1, 0, ') + 14
    part.write_bytes(content[:at] + b"0" + content[at + 1 :])
    (packed / "train/packed.json").unlink()
    assert pack(run_main, folder, packed, "--short_side=24")[0] == 0
    assert files(packed) == before


def test_an_odd_packing_json_is_refused(packed, folder, run_main):
    for text in ("[]", "3", "{", "\0"):
        (packed / "train/packing.json").write_text(text)
        code, _, err = pack(run_main, folder, packed, "--short_side=24")
        assert code == EXIT_BAD_INPUT and "packing.json" in err
