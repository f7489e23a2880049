"""Memory that is freed is there for the next step."""

import subprocess
import sys

import pytest
import torch
from launch import ROOT

from util.memory import keep_freed_memory

PROGRAM = """
import resource, sys
import torch
from util.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory(torch.device("cpu"))

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    for megabytes in (48, 80, 48):  # glibc maps what is above 32 MB anew, each time
        torch.ones(megabytes << 18)

for _ in range(3):
    step()
before = faults()
for _ in range(5):
    step()
print(faults() - before)
"""


def count(mode: str, **environment: str) -> int:
    """Pages that five steps had to get from the system."""
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return int(found.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_kept() -> None:
    pages = 5 * (48 + 80 + 48) * 256  # of 4 kB
    assert count("leave") > 0.9 * pages
    assert count("keep") < 0.01 * pages


def test_settings_in_the_environment_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not keep_freed_memory(torch.device("cpu"))
