"""What a file of weights may hold beside tensors without being refused; none of it can run code.

torch reads with `weights_only=True`: a file names classes, and only those that are listed are made.
What training programs write beside their weights (flags, numbers of numpy, paths, settings, records
of losses) is no reason to refuse the weights.
"""

import argparse
from collections import OrderedDict
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

# Programs whose settings and records stand in checkpoints; of these nothing but tensors is read.
PROGRAMS = (
    "mmengine", "mmcv", "lightning", "lightning_fabric", "pytorch_lightning", "omegaconf", "yacs",
)  # fmt: skip
# How the names of their dicts end: yacs' settings, in Swin's and SimMIM's files, are one.
DICTS = ("Dict", "CfgNode")
BUILTINS = (dict, list, tuple, set, str, int, float, bool)

# A class, or one under the name that it has in the file.
Allowed = Any


class Unread:
    """Stands for an object of another program: takes anything, does nothing and holds nothing."""

    def __new__(cls, *_: object, **__: object) -> "Unread":
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def plain_types() -> list[Allowed]:
    """Flags of argparse, numbers of numpy, and paths, which become pure: they open nothing."""
    number = np.float64(0).__reduce__()[0]
    kinds = {type(np.dtype(kind)) for kind in ("?", "i1", "u1", "i4", "i8", "f2", "f4", "f8")}
    return [
        argparse.Namespace,
        np.dtype,
        *kinds,
        *((number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
        *((PurePath, f"pathlib{place}.PosixPath") for place in ("", "._local")),
        *((PurePath, f"pathlib{place}.WindowsPath") for place in ("", "._local")),
    ]


def known_programs(path: Path) -> list[Allowed]:
    """What else the pickle in a file names, if all of it is settings and records of `PROGRAMS`.

    Arrays of numpy, and what else a program's settings name, are then not read either.

    Returns:
        what to allow, beside `plain_types`; nothing where the file names anything else.
    """
    with torch.serialization.safe_globals(plain_types()):
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception:  # no zip, or a pickle with other faults: the first refusal stands
            return []
    named = {f"builtins.{kind.__name__}": kind for kind in BUILTINS}
    unread = {"typing.Any", "collections.defaultdict", "numpy.ndarray"}
    unread |= {f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")}
    if not any(name.split(".")[0] in PROGRAMS for name in names):
        return []
    if not all(name in unread or name in named or name.split(".")[0] in PROGRAMS for name in names):
        return []
    # torch fills no other dicts than these.
    return [
        named.get(name) or (OrderedDict if name.endswith(DICTS) else Unread, name) for name in names
    ]
