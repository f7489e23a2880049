"""Whether two commits compute the same, bit for bit: 50 steps of every kind of training.

python -m lab.compare_commits HEAD~5 HEAD
python -m lab.compare_commits main WORKTREE --only mae garments

Both run on this machine in one call, each from a checkout of its own. WORKTREE is the work tree as
it stands. Compared are the losses, rates, gradient norms and measurements that a run records, and
all tensors of its last checkpoint. Exit code 1: something differs, or a run failed.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from util.config.flag_parser import StrictParser
from util.console import print_text
from util.errors import BadInput, RunFailed, command
from util.train.checkpoint import LAST, load_file
from util.train.logger import MACHINE

ROOT = Path(__file__).resolve().parent.parent
WORKTREE = "WORKTREE"
# What a run recorded, and the digests of its last checkpoint's tensors by name.
Results = tuple[list[dict[str, Any]], dict[str, str]]
SMALL = [
    "--device=cpu", "--num_workers=0", "--log_every=1", "--batch_size=24", "--epochs=5",
    "--warmup_epochs=1", "--save_every=0", "--seed=7",
]  # fmt: skip
# 256 drawn images in batches of 24 are 10 steps an epoch.
DRAWN = [
    *SMALL, "--dataset=synthetic", "--model=mae_vit_micro_patch4", "--input_size=16", "--blr=2e-3",
    "--picture_every=0",
]  # fmt: skip
DIGITS = [*SMALL, "--dataset=digits", "--train_images=240", "--finetune={mmae}"]


@dataclass(frozen=True)
class Setup:
    """A training of 50 steps.

    Attributes:
        main: the command.
        flags: `{mmae}` stands for the last checkpoint of the setup of that name.
    """

    main: str
    flags: Sequence[str]


SETUPS = {
    "mmae": Setup("main_pretrain", [*DRAWN, "--pos_offset=jitter"]),
    "mae": Setup("main_pretrain", [*DRAWN, "--method=mae", "--norm_pix_loss"]),
    "cross decoder": Setup(
        "main_pretrain", [*DRAWN, "--decoder=cross", "--predict_ratio=0.34", "--precision=bf16"]
    ),
    "encoder mask tokens": Setup(
        "main_pretrain", [*DRAWN, "--encoder_mask_tokens", "--accum_iter=2", "--batch_size=12"]
    ),
    "PCA target": Setup(
        "main_pretrain", [*DRAWN, "--target=pca", "--pca_components=8", "--pca_patches=2000"]
    ),
    "fine-tuning": Setup(
        "main_finetune", [*DIGITS, "--drop_path=0.2", "--mixup=0.8", "--cutmix=1", "--reprob=0.25"]
    ),
    "linear probe": Setup("main_finetune", [*DIGITS, "--tune=linear"]),
    "garments": Setup(
        "main_segment",
        [
            "--dataset=garments", "--model=vit_micro_patch8", "--input_size=32", "--window=32",
            "--scene_size=48", "--stride=24", "--channels=8", "--aux_channels=8", "--batch_size=2",
            "--iterations=50", "--warmup_iterations=5", "--eval_every=25", "--val_images=8",
            "--log_every=1", "--save_every=0", "--num_workers=0", "--device=cpu", "--pictures=0",
            "--drop_path=0.3", "--lr=1e-3", "--seed=7",
        ],
    ),
}  # fmt: skip


@contextmanager
def checkout(commit: str, folder: Path) -> Iterator[Path]:
    """A folder with the files of a commit; the work tree itself for WORKTREE.

    Raises:
        BadInput: git knows no such commit.
    """
    if commit == WORKTREE:
        yield ROOT
        return
    git = ["git", "-C", str(ROOT), "worktree"]
    added = subprocess.run(
        [*git, "add", "--quiet", "--detach", str(folder), commit], capture_output=True, text=True
    )
    if added.returncode:
        raise BadInput(f"cannot check out {commit}: {added.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def train(code: Path, setup: Setup, folder: Path) -> None:
    """Run a setup with the code of one commit.

    Raises:
        RuntimeError: it failed; with what it printed.
    """
    flags = [flag.format(mmae=folder.parent / "mmae" / LAST) for flag in setup.flags]
    # One thread: the order of sums is not the machine's load.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(code)}
    found = subprocess.run(
        [sys.executable, f"{setup.main}.py", *flags, f"--output_dir={folder}"],
        cwd=code, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if found.returncode:
        raise RuntimeError(f"{found.stdout[-1500:]}{found.stderr[-1500:]}")


def read_run(folder: Path) -> Results:
    """The records of a run and the digests of its last checkpoint's tensors by name."""
    (path,) = folder.glob("metrics*.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    state = load_file(folder / LAST)
    tensors = {name: digest(value) for name, value in walk(state, "")}
    return [{k: v for k, v in r.items() if k not in MACHINE} for r in records], tensors


def walk(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors in nested containers, each with the path to it."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from walk(inner, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from walk(inner, f"{name}/{number}")


def digest(x: torch.Tensor) -> str:
    """Of shape, type and bits."""
    data = x.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{list(x.shape)}{x.dtype}".encode() + data).hexdigest()


def compare(one: Results, other: Results) -> list[str]:
    """What differs between two runs, in words; empty: nothing."""
    (records, tensors), (other_records, other_tensors) = one, other
    found = []
    if len(records) != len(other_records):
        found.append(f"{len(records)} records and {len(other_records)}")
    for a, b in zip(records, other_records, strict=False):
        if keys := [key for key in {**a, **b} if a.get(key) != b.get(key)]:
            values = ", ".join(f"{key} {a.get(key)} {b.get(key)}" for key in keys)
            found.append(f"step {a['step']}: {values}")
            break
    names = [n for n in {**tensors, **other_tensors} if tensors.get(n) != other_tensors.get(n)]
    if names:
        found.append(f"{len(names)} of {len(tensors)} tensors, the first: {names[0]}")
    return found


def try_setup(name: str, sides: Sequence[tuple[Path, Path]]) -> tuple[bool, str]:
    """Train a setup with each code in its folder; whether both runs are the same, and in words."""
    try:
        for code, folder in sides:
            train(code, SETUPS[name], folder / name)
    except RuntimeError as error:
        return False, f"a run failed\n{error}"
    one, other = (read_run(folder / name) for _, folder in sides)
    found = compare(one, other)
    records, tensors = one
    counts = f"{records[-1]['step']} steps, {len(records)} records, {len(tensors)} tensors"
    return not found, "; ".join(found) or f"the same: {counts}"


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run, compare, print one line a setup."""
    parser = StrictParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("before", help="a commit, or WORKTREE")
    parser.add_argument("after", help="a commit, or WORKTREE")
    parser.add_argument("--only", nargs="+", choices=SETUPS, default=list(SETUPS), metavar="SETUP",
                        help=f"default: all of {', '.join(SETUPS)}")  # fmt: skip
    options = parser.parse_args(argv)
    wanted = set(options.only)
    if any("{mmae}" in flag for name in wanted for flag in SETUPS[name].flags):
        wanted.add("mmae")
    different = []
    with tempfile.TemporaryDirectory(prefix="compare-") as place:
        root = Path(place)
        with (
            checkout(options.before, root / "code-before") as before,
            checkout(options.after, root / "code-after") as after,
        ):
            for name in filter(wanted.__contains__, SETUPS):
                same, words = try_setup(name, [(before, root / "before"), (after, root / "after")])
                print_text(f"{name:20} {words}")
                different += [] if same else [name]
    if different:
        raise RunFailed(f"not the same: {', '.join(different)}")


if __name__ == "__main__":
    main()
