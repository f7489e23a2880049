"""What CI runs: every part in its order, with its seconds, also when one fails."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from launch import PATIENCE, ROOT

PARTS = {"setup": "set-up: the virtual environment", "check": "make check", "test": "make test"}


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("fails", [None, *PARTS])
def test_parts_and_seconds(fails: str | None, missing: bool, tmp_path: Path) -> None:
    """Commands are stand-ins that write down how they were called; `make` may fail."""
    (tmp_path / ".ci").mkdir()
    shutil.copy2(ROOT / ".ci/run", tmp_path / ".ci/run")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("make", "python3", "munged", "apt-get", *([] if missing else ["sbatch"])):
        (commands / name).write_text(
            f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls\n'
            f'[ "{name} $1" != "make {fails}" ] || exit 3\n'
        )
        (commands / name).chmod(0o755)
    for name in ("dirname", "env", "bash"):  # of the system these alone, so that sbatch can miss
        (commands / name).symlink_to(str(shutil.which(name)))
    run = subprocess.run(
        [tmp_path / ".ci/run"], env={"PATH": str(commands)}, text=True, capture_output=True,
        timeout=PATIENCE,
    )  # fmt: skip
    done = list(PARTS)[: list(PARTS).index(fails) + 1 if fails else None]
    assert run.returncode == (3 if fails else 0), run.stderr
    assert re.findall(r"^ +\d+ s  (.*)$", run.stdout, re.M) == [
        "set-up: Debian's packages", *(PARTS[name] for name in done),
    ]  # fmt: skip
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [line.removeprefix("make ") for line in calls if line.startswith("make ")] == done
    installs = [line for line in calls if line.startswith("apt-get install")]
    assert bool(installs) == (missing or not os.path.isdir("/usr/share/datasets/fashion-mnist"))
    assert not missing or "slurm-wlm" in installs[0]
