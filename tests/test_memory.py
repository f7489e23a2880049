"""Memory that is freed is there for the next step."""

import subprocess
import sys

import pytest
import torch
from launch import ROOT

from util.train.memory import keep_freed_memory

PROGRAM = """
import resource, sys
import torch
from util.train.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory(torch.device("cpu"))

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def step():
    for megabytes in (48, 80, 48):  # glibc maps what is above 32 MB anew, each time
        torch.ones(megabytes << 18)

torch.ones(1 << 18)
before = resident()
for _ in range(8):  # 1,408 MB in all
    step()
print(resident() - before)
"""
LARGEST, ALL = 80 << 20, 8 * (48 + 80 + 48) << 20


def kept(mode: str, **environment: str) -> int:
    """Bytes that a process holds after eight steps which have freed all of theirs."""
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return int(found.stdout)


# In bytes, not in page faults: how many of those there are follows the kernel's size of pages.
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_kept() -> None:
    assert kept("leave") < 0.25 * LARGEST
    # What is kept is used again. Not byte for byte: small objects between the large ones move them.
    assert 0.75 * LARGEST < kept("keep") < 0.5 * ALL


def test_settings_in_the_environment_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not keep_freed_memory(torch.device("cpu"))
