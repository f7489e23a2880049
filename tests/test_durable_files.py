"""What the program writes is on the disk before it has its name, and stays after a power cut.

`WRITERS` names every place of the code that opens, saves, renames or links a file, and how it is
made durable, or why it need not be. A new one fails by name. The few functions that all go through
are watched: contents are synced, then renamed, then the folder is synced.
"""

import ast
import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import program_files
from launch import ROOT
from PIL import Image

from util import files
from util.data.listing import list_images
from util.data.manifest import TABLES
from util.data.packing import Recipe, pack
from util.files import build_whole, link, open_whole, save_png, write_bytes, write_text
from util.measure.features import FeatureFiles
from util.slurm import write_code
from util.train import checkpoint as ckpt
from util.train.dist import Processes
from util.weights.export import appearing, save_folder, save_safetensors

WHOLE = "open_whole, or what goes through it"
BUILT = "inside of build_whole, which syncs every file"
MEMORY = "into memory"
GROWS = "grows by records; a checkpoint says how many bytes there were, and what is missing is said"
LEASE = "a lease: true only while its process lives"
BENCH = "pictures and made images of benchmarks and studies, which are made again at will"

# File, function: how.
WRITERS = {
    "engine_segment.py:write_label_maps": WHOLE,
    "util/weights/export_transformers.py:to_transformers_folder": BUILT,
    "util/measure/features.py:FeatureFiles.__init__": "synced in close",
    "util/measure/features.py:FeatureFiles._create": "synced in close",
    "util/measure/features.py:FeatureFiles.write": "synced in close",
    "util/measure/features.py:FeatureFiles.close": "watched below",
    "util/measure/features.py:write_file_names": WHOLE,
    "main_knn.py:save_result": WHOLE,
    "main_predict.py:save_predictions": WHOLE,
    "lab/flags_page.py:main": WHOLE,
    "lab/gpu/command.py:main": WHOLE,
    "lab/gpu/command.py:run_parts.run": WHOLE,
    "lab/gpu/parts.py:run_part": "a log of a part, read at once",
    "lab/gpu/parts.py:save": WHOLE,
    "lab/gpu/parts.py:keep": WHOLE,
    "util/console.py:hang_up_if_lost": "goes nowhere",
    "lab/comparison/command.py:main": WHOLE,
    "lab/study/command.py:write_plan": WHOLE,
    "lab/study/command.py:write_report": WHOLE,
    "main_tables.py:paper_tables": WHOLE,
    "main_tables.py:run_plan.write_tables": WHOLE,
    "main_visualize.py:measure": WHOLE,
    "util/measure/accuracy.py:save_accuracy": WHOLE,
    "util/measure/accuracy.py:write_table": WHOLE,
    "lab/bench/measuring.py:save_json": WHOLE,
    "util/runs/cell_runs.py:start": "what a child says, for people",
    "util/runs/cell_runs.py:write_json": WHOLE,
    "util/train/checkpoint.py:save_checkpoint": WHOLE,
    "util/train/checkpoint.py:set_aside": "a rename; the file that takes the name syncs the folder",
    "util/train/checkpoint.py:keep_best": WHOLE,
    "util/train/checkpoint.py:renew_last": WHOLE,
    "util/train/checkpoint.py:write_signed": WHOLE,
    "util/train/checkpoint.py:local_file": BUILT,
    "util/runs/curves.py:save_curve": WHOLE,
    "util/runs/curves.py:draw_curves": WHOLE,
    "util/train/events.py:EventFile.__init__": GROWS,
    "util/weights/export.py:appearing": BUILT,
    "util/weights/export.py:save_safetensors": BUILT,
    "util/weights/export.py:save_folder": BUILT,
    "util/weights/export.py:save_onnx": BUILT,
    "util/data/fetch.py:download": BUILT,
    "util/files.py:open_whole": "watched below",
    "util/files.py:build_whole": "watched below",
    "util/files.py:write_bytes": WHOLE,
    "util/files.py:write_text": WHOLE,
    "util/files.py:link": "watched below",
    "util/files.py:check_folder": "a probe, removed at once",
    "util/files.py:create_temporary": "under a name that nobody reads",
    "util/files.py:AppendedFile.__init__": GROWS,
    "util/train/lease.py:Lease.__init__": LEASE,
    "util/train/lease.py:acquire": LEASE,
    "util/train/lease.py:put_in_place": LEASE,
    "util/train/lease.py:write_in_place": LEASE,
    "util/data/listing.py:write_cache": WHOLE,
    "util/train/logger.py:RunLogger.__init__": GROWS,
    "util/train/logger.py:RunLogger._drop_after": GROWS,
    "util/train/logger.py:save_settings": WHOLE,
    "util/train/rank_log.py:rank_log": "what is said, for people",
    "util/train/bad_images.py:BadImages.agree": WHOLE,
    "util/train/logger.py:StepLog._report_broken": WHOLE,
    "lab/bench/made_images.py:jpegs_like_imagenet": MEMORY,
    "lab/bench/made_images.py:make_jpegs": BENCH,
    "lab/bench/made_images.py:make_tiny_files": BENCH,
    "util/data/packing.py:Recipe.__call__": MEMORY,
    "util/data/packing.py:claim": WHOLE,
    "util/data/packing.py:Shards.__getitem__": WHOLE,
    "util/data/packing.py:finish": WHOLE,
    "util/data/packing.py:write_bad": WHOLE,
    "util/train/results.py:set_others_aside": "a rename; the next file syncs the folder",
    "util/measure/segmentation_results.py:save_segmentation": WHOLE,
    "util/slurm.py:write_code": BUILT,
    "lab/bench/step_speed.py:draw_sweeps": BENCH,
    "lab/comparison/report.py:draw": BENCH,
    "lab/study/report.py:_draw_effects": BENCH,
    "lab/study/report.py:_draw_training": BENCH,
    "util/files.py:save_png": WHOLE,
}
NAMES = {
    "write_text", "write_bytes", "save", "savez", "savez_compressed", "savetxt", "save_file",
    "savefig", "tofile", "open_memmap", "memmap", "copyfile", "copyfileobj", "copytree", "copy2",
    "truncate", "rename", "link", "symlink", "symlink_to", "hardlink_to", "export",
    "NamedTemporaryFile", "mkstemp", "pwrite", "fdopen", "open_whole", "build_whole",
    "AppendedFile", "create_temporary",
}  # fmt: skip


def writes(call: ast.Call) -> bool:
    """Whether a call is one that makes, changes or renames a file."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    whose = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
    if name == "save":
        return whose not in ("run", "self")  # a Run's own, which goes through save_checkpoint
    if name == "open":
        arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
        inner = [node for argument in arguments for node in ast.walk(argument)]
        texts = [node.value for node in inner if isinstance(node, ast.Constant)]
        modes = [t for t in texts if isinstance(t, str) and set(t) <= set("rwaxbt+")]
        asked = any(set(mode) & set("wax+") for mode in modes)
        return asked or any(
            f"O_{kind}" in ast.unparse(call) for kind in ("WRONLY", "RDWR", "CREAT")
        )
    if name == "replace":  # not of texts, which takes two arguments
        return whose == "os" or (bool(whose) and len(call.args) == 1)
    if name == "memmap":
        return any(
            "'r" not in ast.unparse(k) and "'c'" not in ast.unparse(k) for k in call.keywords
        )
    return name in NAMES or (name == "move" and whose == "shutil")


def writers() -> Iterator[str]:
    def walk(node: ast.AST, path: str, name: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            inner = name
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = f"{name}.{child.name}" if name else child.name
            if isinstance(child, ast.Call) and writes(child):
                yield f"{path}:{name}"
            yield from walk(child, path, inner)

    for path in program_files():
        name = path.relative_to(ROOT).as_posix()
        yield from walk(ast.parse(path.read_text()), name, "")


def test_every_writer_is_known() -> None:
    found = set(writers())
    assert sorted(found - WRITERS.keys()) == [], "say in WRITERS how this file is made durable"
    assert sorted(WRITERS.keys() - found) == [], "no longer there"


# ---- In which order ------------------------------------------------------------------------------


class Watch:
    """Notes what is synced, renamed and linked; `check` sees that the order is safe."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root, self.done = root, list[tuple[str, Any, Any]]()
        self.fsync, self.replace, self.link = os.fsync, os.replace, os.link
        patch.setattr(os, "fsync", self.on_fsync)
        patch.setattr(os, "replace", self.on_replace)
        patch.setattr(os, "link", self.on_link)

    def on_fsync(self, handle: int) -> None:
        """Of a file its content so far is what is safe; of a folder the names in it."""
        about = os.fstat(handle)
        kind = "folder" if stat.S_ISDIR(about.st_mode) else "file"
        self.done.append((kind, about.st_ino, about.st_size))
        self.fsync(handle)

    def on_replace(self, source: Any, target: Any) -> None:
        self.done.append(("replace", self.parts(Path(source)), Path(target)))
        self.replace(source, target)

    def on_link(self, source: Any, target: Any, **rest: Any) -> None:
        self.done.append(("link", Path(source), Path(target)))
        self.link(source, target, **rest)

    @staticmethod
    def parts(path: Path) -> list[tuple[str, int, int]]:
        """What must be safe before a file or folder gets its name."""
        found = []
        for part in (path, *path.rglob("*")):
            about = part.stat()
            kind = "folder" if part.is_dir() else "file"
            found.append((kind, about.st_ino, about.st_size))
        return found

    def check(self, safe: set[int] = frozenset()) -> list[str]:
        """The names that were given, in order.

        Args:
            safe: inodes that are on the disk already.
        """
        names = []
        for number, (what, source, target) in enumerate(self.done):
            if what != "replace":
                continue
            before, after = self.done[:number], self.done[number + 1 :]
            for part in source:
                assert part in before or part[1] in safe, f"{target} is named before it is synced"
            folder = target.parent.stat().st_ino
            assert any(a[:2] == ("folder", folder) for a in after), (
                f"{target}'s folder is not synced"
            )
            names.append(target.relative_to(self.root).as_posix())
        return names


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(tmp_path, monkeypatch)


def write_open(folder: Path) -> None:
    with open_whole(folder / "a") as file:
        file.write(b"1" * 100_000)
        file.write(b"2")  # still in Python's buffer when the block ends


def write_built(folder: Path) -> None:
    with build_whole(folder / "a") as place:
        (place / "inner").mkdir(parents=True)
        (place / "inner/one").write_bytes(b"1" * 1000)
        (place / "two").write_text("2")


def write_built_file(folder: Path) -> None:
    with build_whole(folder / "a") as place:
        place.write_bytes(b"1" * 1000)


def write_features(folder: Path) -> None:
    procs = Processes(0, 1, 0, 1, torch.device("cpu"))
    rows = FeatureFiles(folder, "val", (3, 2), procs)
    rows.write(torch.arange(3), torch.ones(3, 2), torch.arange(3))
    rows.close()


def write_checkpoint(folder: Path) -> None:
    ckpt.save_checkpoint(folder, {"task": "t", "step": 1, "x": torch.ones(9)}, 0)
    ckpt.keep_best(folder, "t")


def write_export(folder: Path) -> None:
    with appearing(folder / "weights") as place:
        save_folder(place, {"w": torch.ones(3)}, {"a": 1})
    with appearing(folder / "weights.safetensors") as place:
        save_safetensors(place, {"w": torch.ones(3)})


def write_packed(folder: Path) -> None:
    pack(Pictures(70), folder, Recipe("raw", 0, 90), {}, num_workers=0, max_bad_images=0)


def write_listing(folder: Path) -> None:
    images = folder / "images" / "a"
    images.mkdir(parents=True)
    Image.new("L", (2, 2)).save(images / "1.png")
    for path in (images, images.parent):
        os.utime(path, (1e9, 1e9))  # what changed a moment ago is not kept
    os.environ["MMAE_CACHE"] = str(folder / "cache")
    list_images(images.parent)


def write_downloaded(folder: Path) -> None:
    os.environ["MMAE_CACHE"] = str(folder)
    ckpt.local_file("https://example.org/weights.pth")


# What writes, and the names that it gives.
ACTIONS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "open_whole": (write_open, ["a"]),
    "build_whole of a folder": (write_built, ["a"]),
    "build_whole of a file": (write_built_file, ["a"]),
    "write_text": (lambda folder: write_text(folder / "a", "text"), ["a"]),
    "write_bytes": (lambda folder: write_bytes(folder / "a", b"text"), ["a"]),
    "checkpoints": (write_checkpoint, ["checkpoint-0.pth", ckpt.LAST, ckpt.BEST]),
    "features": (write_features, ["features-val.npy", "labels-val.npy"]),
    "an export": (write_export, ["weights", "weights.safetensors"]),
    "a packing": (
        write_packed,
        ["packing.json", "shard-00000.bin", "shard-00000.bin.json", "shard-00001.bin",
         "shard-00001.bin.json", *TABLES, "packed.json"],
    ),
    "a listing": (write_listing, ["cache/listing"]),
    "a download": (write_downloaded, ["weights/"]),
    "the code of a job": (lambda folder: write_code(folder / "code", {"a/b.py": b"1"}), ["code"]),
    "a picture": (lambda folder: save_png(folder / "p/a.png", Image.new("L", (2, 2))), ["p/a.png"]),
}  # fmt: skip


class Pictures:
    """A data set of gray images whose every pixel is their number."""

    name, split, channels, classes, labelled = "pictures", "train", 1, ["one"], True
    mean, std, eval_margin, max_pixels = (0.5,), (0.5,), False, None

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(np.full((2, 3), index, np.uint8)), 0

    def file_name(self, index: int) -> str:
        return f"{index:03d}.png"


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads come from memory; the cache is the test's own."""
    monkeypatch.setenv("MMAE_CACHE", os.environ.get("MMAE_CACHE", ""))
    monkeypatch.setattr(ckpt, "download", lambda address, place: place.write_bytes(b"1" * 1000))


@pytest.mark.parametrize("action", ACTIONS)
def test_content_then_name_then_folder(
    action: str, watch: Watch, tmp_path: Path, fetched: None
) -> None:
    write, names = ACTIONS[action]
    write(tmp_path)
    given = watch.check()
    assert len(given) == len(names)
    assert all(a.startswith(b) if b else True for a, b in zip(given, names, strict=True))


def test_a_second_name_needs_its_folder_synced(
    watch: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there are no hard links, and the content is copied."""
    write_text(tmp_path / "a", "content")
    link(tmp_path / "a", tmp_path / "b")
    assert watch.check() == ["a", "b"]

    def refuse(*names: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "c").mkdir()
    link(tmp_path / "a", tmp_path / "c/d")
    assert watch.check() == ["a", "b", "c/d"]
    assert (tmp_path / "c/d").read_text() == "content"


def test_a_sync_that_fails_is_an_error_unless_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for code in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINVAL, errno.ENOTSUP):

        def fail(handle: int, code: int = code) -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            if code in files.NO_SYNC:
                write_open(tmp_path)
                assert (tmp_path / "a").stat().st_size == 100_001
                (tmp_path / "a").unlink()
            else:
                with pytest.raises(OSError, match=os.strerror(code)):
                    write_open(tmp_path)
                assert not list(tmp_path.iterdir())


def test_a_record_that_the_system_takes_in_parts_is_whole(tmp_path: Path) -> None:
    """A write may take less than it was given, and say so."""

    class Slow:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: Any) -> int:
            return self.file.write(bytes(data[:3]))

    appended = files.AppendedFile(tmp_path / "a")
    whole, appended.file = appended.file, Slow(appended.file)
    appended.write(b"a record\n")
    whole.close()
    assert (tmp_path / "a").read_bytes() == b"a record\n"
