"""Damaged and odd files of weights: refused by what checksums they have, never a traceback."""

import io
import json
import os
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from launch import TINY
from runs import records
from trained import Trained

from util.errors import BadInput
from util.runs.curves import read_curve
from util.train.checkpoint import LAST, load_file, newest, save_checkpoint
from util.train.checksums import COMMENT
from util.train.results import set_others_aside
from util.weights.files import read_json

WEIGHTS = {"model": {"a": torch.randn(40, 50, generator=torch.Generator().manual_seed(0))}}


def state_of(step: int) -> dict:
    return {"task": "pretrain", "step": step, "model": {"w": torch.full((1000,), float(step))}}


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def foreign(path: Path, **options: object) -> bytes:
    torch.save(WEIGHTS, path, **options)
    return path.read_bytes()


# ---- Our own -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bit", range(0, COMMENT * 8, 5))
def test_a_bit_of_our_checksum(bit: int, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state_of(1))
    data = path.read_bytes()
    path.write_bytes(flipped(data, (len(data) - COMMENT) * 8 + bit))
    with pytest.raises(BadInput, match=r"checksum"):
        load_file(path)


@pytest.mark.parametrize("count", [1, 2, 75, 76, 77, 1000, 100_000])
def test_bytes_after_our_checksum(count: int, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state_of(1))
    with path.open("ab") as file:
        file.write(random.Random(count).randbytes(count))
    with pytest.raises(BadInput, match=r"checkpoint-last\.pth"):
        load_file(path)


def test_our_checkpoint_written_anew_by_another_program(tmp_path: Path) -> None:
    path = tmp_path / LAST
    torch.save(state_of(1), path)
    with pytest.raises(BadInput, match="no checksum of ours"):
        load_file(path)


# ---- Other programs' -----------------------------------------------------------------------------


def test_every_bit_of_a_foreign_zip(tmp_path: Path) -> None:
    """One flipped bit loads the right values or is refused."""
    path = tmp_path / "weights.pth"
    data = foreign(path)
    loaded = 0
    for bit in range(0, len(data) * 8, 41):
        path.write_bytes(flipped(data, bit))
        try:
            state = load_file(path)
        except BadInput as error:
            assert str(path) in str(error)
            continue
        loaded += 1
        assert torch.equal(state["model"]["a"], WEIGHTS["model"]["a"]), bit
    assert loaded < len(data) * 8 // 41 / 4  # some bits mean nothing


def test_a_zip_without_checksums_is_no_damaged_one(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        foreign(tmp_path / "weights.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    with zipfile.ZipFile(tmp_path / "weights.pth") as archive:
        assert archive.testzip() is not None  # its checksums are all 0, and wrong
    assert torch.equal(load_file(tmp_path / "weights.pth")["model"]["a"], WEIGHTS["model"]["a"])


def test_files_of_before_zip_load(tmp_path: Path) -> None:
    foreign(tmp_path / "weights.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(load_file(tmp_path / "weights.pth")["model"]["a"], WEIGHTS["model"]["a"])


def safetensors_file(path: Path) -> tuple[dict, bytes]:
    """Header and tensors' bytes of a good file."""
    save = pytest.importorskip("safetensors.torch").save_file
    save({"a": torch.arange(6.0), "b": torch.arange(3)}, path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def safetensors_bytes(header: dict, tensors: bytes, more: int = 0) -> bytes:
    text = json.dumps(header).encode()
    return (len(text) + more).to_bytes(8, "little") + text + tensors


@pytest.mark.parametrize(
    "case", ["short", "long", "length", "not JSON", "hole", "overlap", "beyond", "empty"]
)
def test_a_safetensors_header_that_does_not_fit_its_file(case: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    header, tensors = safetensors_file(path)
    name = min(header, key=lambda key: header[key].get("data_offsets", [99])[0])
    first, last = header[name]["data_offsets"]
    changed = {"hole": [first + 8, last + 8], "overlap": [first, last + 8], "beyond": [999, 1023]}
    if case in changed:
        header[name]["data_offsets"] = changed[case]
    data = safetensors_bytes(header, tensors, 1_000_000 if case == "length" else 0)
    data = {
        "short": data[:-1], "long": data + b"\0", "empty": b"",
        "not JSON": data.replace(b'"', b"'"),
    }.get(case, data)  # fmt: skip
    path.write_bytes(data)
    with pytest.raises(BadInput, match=r"weights\.safetensors is not readable: SafetensorError"):
        load_file(path)


# ---- Odd entries in a run folder -----------------------------------------------------------------


def make_odd(kind: str, path: Path) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "link to nothing":
        path.symlink_to("nowhere")
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "empty":
        path.write_text("")
    else:
        buffer = io.BytesIO()
        torch.save([1, 2], buffer)
        path.write_bytes(buffer.getvalue())


KINDS = ["folder", "link to nothing", "link to itself", "pipe", "empty", "a list"]


@pytest.fixture(scope="module")
def finished(trained: Trained) -> Path:
    return trained("main_pretrain", SHORT)


SHORT = [*TINY, "--epochs=2", "--train_images=8", "--batch_size=4", "--save_every=1"]


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["checkpoint-7.pth", LAST])
@pytest.mark.parametrize("kind", KINDS)
def test_an_odd_entry_is_skipped_with_a_note(
    kind: str, name: str, finished: Path, tmp_path: Path, run_main
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "checkpoint-1.pth").unlink()
    (folder / LAST).unlink()
    make_odd(kind, folder / name)
    code, out, err = run_main("main_pretrain", [*SHORT, f"--output_dir={folder}"])
    assert code == 0, err
    assert f"skipped a checkpoint: {name}" in out
    assert f"going on from {folder / 'checkpoint-0.pth'}, 2 steps done" in out
    mine, theirs = load_file(folder / LAST), load_file(finished / LAST)
    assert all(torch.equal(mine["model"][k], v) for k, v in theirs["model"].items())


def test_what_cannot_be_opened_is_skipped(tmp_path: Path, monkeypatch) -> None:
    """Root may read anything: the refusal is made."""
    save_checkpoint(tmp_path, state_of(1), 1)
    save_checkpoint(tmp_path, state_of(2), 2)
    (tmp_path / LAST).unlink()
    original = Path.open

    def refused(path: Path, *rest: object, **named: object) -> object:
        if path.name == "checkpoint-2.pth":
            raise PermissionError(13, "Permission denied")
        return original(path, *rest, **named)

    monkeypatch.setattr(Path, "open", refused)
    found = newest(tmp_path, "pretrain")
    assert found.path == tmp_path / "checkpoint-1.pth"
    assert "Permission denied" in found.skipped[0]


# ---- Records -------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("left", [0, 1, 0.4, 0.8])
def test_records_that_are_missing_are_said(
    left: float, finished: Path, tmp_path: Path, run_main
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    path = folder / "metrics.jsonl"
    size = path.stat().st_size
    os.truncate(path, int(left * size) if left != 1 else 1)
    for name in (LAST, "checkpoint-1.pth"):  # so that the first epoch's is gone on from
        (folder / name).unlink()
    before = load_file(folder / "checkpoint-0.pth")["log_bytes"]
    code, out, _ = run_main("main_pretrain", [*SHORT, f"--output_dir={folder}"])
    lines = [json.loads(line) for line in path.read_text().splitlines()]  # each is whole
    assert code == 0 and [r["step"] for r in lines if r["kind"] == "train"][-1] == 4
    short = int(left * size) < before or left == 1
    assert ("records up to step 2 are missing" in out) == short
    assert (records(folder, "train")[0]["step"] == 1) == (not short or left == 0.4)


@pytest.mark.smoke
def test_another_folders_checkpoint_says_nothing_of_this_ones_records(
    finished: Path, tmp_path: Path, run_main
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    # Of a start that was killed before its first checkpoint.
    (folder / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    flags = [*SHORT, f"--output_dir={folder}", f"--resume={finished / 'checkpoint-0.pth'}"]
    code, out, _ = run_main("main_pretrain", flags)
    assert code == 0 and "missing" not in out
    assert [r["step"] for r in records(folder, "train")] == [3, 4]


# ---- JSON beside weights and runs ---------------------------------------------------------------

# Deeper than Python reads, and a number longer than it reads: no JSONDecodeError.
ODD_JSON = {"deep": "[" * 100_000, "long": "9" * 5000}


@pytest.mark.parametrize("case", ODD_JSON)
def test_odd_json_is_bad_input(case: str, tmp_path: Path) -> None:
    for name, read in (("config.json", read_json), ("metrics.jsonl", read_curve)):
        (tmp_path / name).write_text(ODD_JSON[case])
        with pytest.raises(BadInput):
            read(tmp_path / name)


@pytest.mark.parametrize("case", ODD_JSON)
def test_an_odd_earlier_measurement_is_set_aside(case: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(ODD_JSON[case])
    set_others_aside(tmp_path, ["result.json"], {})
    assert (tmp_path / "result-1.json").read_text() == ODD_JSON[case]
