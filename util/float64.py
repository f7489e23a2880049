"""Where float64 arithmetic is done: on the device itself, or on the CPU for one that has none.

Masks, position codes and measurements are float64, so that they are the same on every device.
Apple's GPUs (MPS) have no float64; what needs it is computed on the CPU there, and its result,
rounded to float32, goes back.
"""

import torch
from torch import Tensor

WITHOUT_FLOAT64 = ("mps",)


def float64_home(device: torch.device) -> torch.device:
    """The device on which float64 arithmetic for tensors of `device` is done."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def to_float64(x: Tensor) -> Tensor:
    """x in float64, where that can be; with a gradient, which goes back to x's device."""
    return x.to(float64_home(x.device)).double()


def widest(device: torch.device) -> torch.dtype:
    """The widest float of a device itself, for sums that must not leave it."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64
