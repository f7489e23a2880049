"""How a process on a CPU holds its memory, and what does not fit into it."""

import ctypes
import os
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from util.errors import BadInput

M = TypeVar("M", bound=nn.Module)

# Of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
# With these set, the user decides.
SETTINGS = (
    "GLIBC_TUNABLES",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
)


def keep_freed_memory(device: torch.device) -> bool:
    """Have a CPU's allocator keep what is freed for the next step, not give it back to the system.

    glibc maps each block above 32 MB anew, and the system clears its pages again: of a step of
    ViT-B at batch 32 that took 6 to 11 %. The process stays as large as its largest step was.

    Returns:
        Whether it does so; not for a GPU's memory, which torch keeps by itself, with another C
        library, or with settings in the environment.
    """
    if device.type != "cpu":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name in os.environ for name in SETTINGS):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def create_in_memory(create: Callable[[], M]) -> M:
    """Create a model, unless its weights cannot be in this machine's memory.

    They are counted on torch's device `meta`, which has neither numbers nor random draws: a model
    of a thousand times the memory would otherwise fill it until the system kills the process.

    Raises:
        BadInput: they are larger; or what `create` raises.
    """
    # What a tensor is made on: torch 2.6 does not tell the default of a `with torch.device`.
    if torch.empty(0).device.type != "meta":
        with torch.device("meta"):
            size = sum(p.numel() * p.element_size() for p in create().parameters())
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if size > there:
            raise BadInput(
                f"the model's weights take {size / 1e9:,.1f} GB, and this machine has "
                f"{there / 1e9:,.1f} GB of memory; choose smaller sizes (--dry_run plans a run "
                "for another machine)"
            )
    return create()
