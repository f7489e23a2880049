"""Checkpoints: written whole or not at all, verified before they are believed.

A checkpoint is a plain `torch.save` file of tensors and plain types, and loads with
`weights_only=True`. It ends in a checksum (`util.train.checksums`), so a file that was cut short,
or in which a single bit changed, is known as such; any tool that reads torch's files reads these.
"""

import hashlib
import os
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch

from util.data.fetch import download
from util.data.file_kinds import is_safetensors, what_it_is
from util.errors import BadInput, CannotWrite, needs
from util.files import build_whole, link, open_whole, reading, sweep, writing
from util.plain_types import known_programs, plain_types
from util.plugins import check_plugins
from util.progress import say_once
from util.train.checksums import Signed, check_bytes, name_kind, verify

LAST, BEST = "checkpoint-last.pth", "checkpoint-best.pth"


def save_checkpoint(
    folder: Path, state: Mapping[str, Any], epoch: int | None = None, keep: int = 0
) -> Path:
    """Write `checkpoint-last.pth`; with an epoch also `checkpoint-{epoch}.pth`, the same file.

    Args:
        keep: numbered checkpoints of this task to keep, the newest; 0: all.

    Raises:
        CannotWrite: the disk is full, the folder not writable ...; earlier ones are untouched.

    Tasks may share a folder: a file of that name that is another task's gets its task into its
    name first, so that no run loses what another one needs to go on.
    """
    path = folder / (LAST if epoch is None else f"checkpoint-{epoch}.pth")
    with writing(path):
        for name in {path, folder / LAST}:
            set_aside(name, state["task"])
        write_signed(path, state)
        if epoch is not None:
            link(path, folder / LAST)
            for old in list_numbered(folder, state["task"])[:-keep] if keep else []:
                old.unlink()
    return path


def set_aside(path: Path, task: str) -> None:
    """Rename what a checkpoint must not take the place of.

    One of another task: `checkpoint-5.pth` to `checkpoint-5-pretrain.pth`. A folder, which no file
    can replace: to `checkpoint-5.pth.aside`.

    Raises:
        OSError: it cannot be renamed.
    """
    if path.is_dir() and not path.is_symlink():
        path.rename(path.with_name(f"{path.name}.aside"))
    elif path.exists() and (head := peek(path)) is not None and head["task"] != task:
        path.replace(path.with_name(f"{path.stem}-{head['task']}{path.suffix}"))


def keep_best(folder: Path, task: str) -> None:
    """Let `checkpoint-best.pth` be what `checkpoint-last.pth` is now.

    Raises:
        CannotWrite: the disk is full or the folder not writable.
    """
    with writing(folder / BEST):
        set_aside(folder / BEST, task)
    link(folder / LAST, folder / BEST)


def best_or_newest(folder: Path, task: str) -> Path | None:
    """The best checkpoint of a task in a run folder, else its newest; None: there is none."""
    for name in (BEST, f"{BEST[:-4]}-{task}.pth"):
        head = peek(folder / name)
        # One that cannot be read is named too: whoever loads it says why.
        if (folder / name).exists() and (head is None or head["task"] == task):
            return folder / name
    return newest(folder, task).path


def list_numbered(folder: Path, task: str) -> list[Path]:
    """The numbered checkpoints of a task, oldest first; unreadable ones are left out."""
    found = []
    for path in list_checkpoints(folder):
        if LAST[:-4] not in path.name and (head := peek(path)) is not None and head["task"] == task:
            found.append((head["step"], path))
    return [path for _, path in sorted(found)]


def renew_last(folder: Path, task: str) -> bool:
    """Let `checkpoint-last.pth` be the newest one of a task, if that is a numbered one.

    A run that was killed after it wrote the one name and before the other goes on from the first.

    Returns:
        whether the folder holds a readable checkpoint of the task.

    Raises:
        CannotWrite: see `link`.
    """
    path = newest(folder, task).path
    if path is not None and LAST[:-4] not in path.name:
        with writing(folder / LAST):
            set_aside(folder / LAST, task)
            link(path, folder / LAST)
    return path is not None


def peek(path: Path) -> dict[str, Any] | None:
    """A checkpoint of ours without its tensors being read; None if it cannot be opened."""
    try:
        if not path.is_file():  # opening a named pipe would wait for its writer
            return None
        # Memory-mapped: only the small pickle is read.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return state if is_ours(state) else None
    except Exception:  # whatever is wrong with it, `verify` puts it into words
        return None


def is_ours(state: object) -> bool:
    """Whether the contents of a file are those of a checkpoint of this program."""
    return isinstance(state, dict) and {"task", "step"} <= state.keys()


def write_signed(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint whole or not at all, with its checksum.

    Raises:
        CannotWrite: the disk is full, the folder not writable ...; what was there is untouched.
    """
    try:
        with open_whole(path) as file:
            signed = Signed(file)
            torch.save(dict(state), signed)  # type: ignore[arg-type]  # write and flush suffice
            signed.sign()
    except (OSError, RuntimeError) as error:
        reason = find_os_error(error)
        if reason is None:
            raise
        raise CannotWrite(
            f"cannot write {path}: {reason.strerror}; earlier checkpoints are untouched, free some "
            "space or choose another --output_dir"
        ) from error


def find_os_error(error: BaseException | None) -> OSError | None:
    """The operating system's error behind an exception: torch wraps it in a RuntimeError."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def load_file(path: str | Path) -> dict[str, Any]:
    """Read a file of weights safely: tensors and plain types, and the Namespace of official files.

    An https URL is fetched first, see `local_file`; `.safetensors` files are read as such. Whatever
    checksums the file has are compared first, see `check_bytes`.

    Raises:
        BadInput: missing, damaged, or holding anything that would run code.
    """
    path = local_file(str(path))
    with reading(path):
        if not path.is_file():
            inside = f", such as its {LAST}" if (path / LAST).is_file() else ""
            raise BadInput(f"checkpoint {path} {name_kind(path)}; expected a file{inside}")
        signed, fault = check_bytes(path)
    if fault:
        raise BadInput(f"checkpoint {path} is not readable: {fault}")
    try:
        if path.suffix == ".safetensors" or is_safetensors(path):
            return needs("safetensors.torch", "safetensors").load_file(path)
        state = unpickle(path)
    except BadInput:
        raise
    except Exception as error:
        with reading(path):
            what = what_it_is(path)
        reason = f"it is {what}" if what else refusal(error)
        raise BadInput(f"checkpoint {path} is not readable: {reason}") from error
    if not isinstance(state, dict):
        raise BadInput(f"checkpoint {path} holds a {type(state).__name__}, expected a dictionary")
    if is_ours(state) and not signed:
        raise BadInput(
            f"checkpoint {path} holds a run of this program, but its end has no checksum of ours: "
            "it was damaged, or written anew by another program; take another checkpoint, or for "
            "its weights alone a file of main_export.py"
        )
    if is_ours(state):
        for text in check_plugins(state.get("plugins", ()), str(path)):
            say_once(f"note: {text}")
    return state


def unpickle(path: Path) -> Any:
    """What torch finds in a file, tensors and what `util.plain_types` lists.

    Raises:
        Exception: whatever torch raises of a file that holds more, or is damaged.
    """
    try:
        with torch.serialization.safe_globals(plain_types()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        allowed = known_programs(path)
        if not allowed:
            raise
        with torch.serialization.safe_globals([*plain_types(), *allowed]):
            return torch.load(path, map_location="cpu", weights_only=True)


def local_file(path: str) -> Path:
    """The path itself, or that of a downloaded copy in `$MMAE_CACHE` or ~/.cache/mmae.

    Raises:
        BadInput: the download failed, or the address is not https.
    """
    scheme, separator, rest = path.partition("://")
    if not separator:
        return Path(path)
    if scheme != "https":
        raise BadInput(f"{path} is neither a path nor an https address")
    root = Path(os.environ.get("MMAE_CACHE") or Path.home() / ".cache/mmae") / "weights"
    # The address is part of the name: two files may both be called checkpoint-last.pth.
    name = f"{hashlib.sha256(path.encode()).hexdigest()[:12]}-{rest.split('?')[0].split('/')[-1]}"
    if not (root / name).exists():
        try:
            root.mkdir(parents=True, exist_ok=True)
            sweep(root)
            with build_whole(root / name) as place:
                download(path, place)
        except (OSError, HTTPException, ValueError) as error:  # the last of odd addresses
            raise BadInput(f"cannot fetch {path}: {error}") from error
    return root / name


def refusal(error: Exception) -> str:
    """Why torch would not read a file, without its advice to read it unsafely."""
    text = " ".join(str(error).split())
    unsafe = re.search(r"Unsupported (?:global|operand|class)[^.:]*:?[^.]*\.[\w.]*", text)
    if unsafe or "weights_only" in text:
        what = f" ({unsafe.group(0)[:160]})" if unsafe else ""
        return (
            f"it holds more than tensors and plain types{what}, and could run code; in the program "
            "that wrote it, save the weights alone: torch.save(model.state_dict(), NEW)"
        )
    return f"{type(error).__name__}: {text[:160]}"


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint to go on from, and what was passed over to get to it."""

    path: Path | None
    skipped: list[str]


def newest(folder: Path, task: str) -> FoundCheckpoint:
    """The newest readable checkpoint of a task in a run folder, by the step inside the files.

    The other tasks' checkpoints are none of its business: pretraining and fine-tuning in one folder
    is how the published commands work. Checksums are verified from the newest down until one holds.
    """
    candidates, skipped = [], []
    with reading(folder):
        paths = list_checkpoints(folder)
    for path in paths:
        head = peek(path)
        if head is None:
            skipped.append(f"{path.name}: {verify(path) or 'not a checkpoint of this program'}")
        elif head["task"] == task:
            candidates.append((head["step"], LAST[:-4] in path.name, path))
    for _, _, path in sorted(candidates, reverse=True):
        fault = verify(path)
        if fault is None:
            return FoundCheckpoint(path, skipped)
        skipped.append(f"{path.name}: {fault}")
    return FoundCheckpoint(None, skipped)


def find_resume(folder: Path, task: str, resume: str) -> tuple[Path | None, list[str]]:
    """Which checkpoint a run starts from: the folder's own newest, else the one that is named.

    Args:
        folder: run folder.
        resume: auto | none | path of a checkpoint.

    Returns:
        the checkpoint, or None to start anew; and notes for the reader.

    Raises:
        BadInput: none is readable, or `none` was asked for in a folder that holds one.
    """
    found = newest(folder, task)
    notes = [f"skipped a checkpoint: {line}" for line in found.skipped]
    if resume == "none" and found.path:
        raise BadInput(
            f"--resume none, but {folder} holds {found.path.name} of an earlier run; choose "
            "another --output_dir, or move the old run away"
        )
    if found.path is None and found.skipped:
        raise BadInput(
            f"{folder} holds checkpoints but none is readable ({'; '.join(found.skipped)}); to "
            "start anew move them away"
        )
    return found.path or (None if resume in ("auto", "none") else Path(resume)), notes


def agree_on_start(
    folder: Path, task: str, resume: str, gather: Callable[[Any], list[Any]]
) -> tuple[Path | None, list[str]]:
    """`find_resume`, the main process's answer on all of them. A collective."""
    path, notes = find_resume(folder, task, resume)
    # A file system may show the others an older state of the folder.
    return gather(path)[0], notes


def load_task(path: Path, task: str) -> dict[str, Any]:
    """A checkpoint of ours of one task.

    Raises:
        BadInput: unreadable, or of another task.
    """
    state = load_file(path)
    if state.get("task") != task:
        raise BadInput(
            f"{path} is a checkpoint of {state.get('task', 'another program')}, not {task}"
        )
    return state


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run folder, by name; the order of training is inside the files.

    Raises:
        OSError: the folder cannot be listed.
    """
    pattern = re.compile(r"checkpoint-(\d+|last)(-[a-z]+)?\.pth")
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(folder / name for name in names if pattern.fullmatch(name))


def load_weights(model: torch.nn.Module, weights: Mapping[str, Any], source: str) -> None:
    """Load strictly: every key of the model and no other, shapes equal.

    Raises:
        BadInput: what does not fit, as lists of missing, unexpected and misshapen keys.
    """
    own = model.state_dict()
    missing = [k for k in own if k not in weights]
    unexpected = [k for k in weights if k not in own]
    misshapen = [
        f"{k} {tuple(weights[k].shape)} where the model has {tuple(own[k].shape)}"
        for k in own
        if k in weights and weights[k].shape != own[k].shape
    ]
    faults = [
        f"{title} {len(keys)}: {', '.join(keys[:8])}{' ...' if len(keys) > 8 else ''}"
        for title, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("other shapes", misshapen),
        )
        if keys
    ]
    if faults:
        raise BadInput(f"the weights of {source} do not fit the model; " + "; ".join(faults))
    model.load_state_dict(weights, strict=True)
