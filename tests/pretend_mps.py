"""A pretended GPU of Apple's: tensors say that they are on `mps`, and have no float64.

The computing is done by the CPU. What is not pretended: its kernels, their rounding, autocast.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

MPS = torch.device("mps", 0)
aten = torch.ops.aten


class OnMps(Tensor):
    """A tensor that says it is on `mps`; `inner`, on the CPU, holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnMps":
        """Wrap a tensor of the CPU."""
        if inner.dtype in (torch.float64, torch.complex128):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        # To torch's own code it is on `meta`: any device but the CPU that this build knows.
        self = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device="meta"
        )
        self.inner = inner
        return self

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return MPS

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnMps({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class PretendMps(TorchDispatchMode):
    """Inside it, `mps` can be asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def is_mps(x: object) -> bool:
    """Whether a device is the pretended one; autograd asks for what it takes it for."""
    return isinstance(x, torch.device) and x.type in ("mps", "meta")


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation: on the CPU, its results where the real one would have them."""
    leaves = tree_flatten((args, kwargs))[0]
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    there = [isinstance(x, OnMps) for x in tensors]
    to_device = kwargs.get("device")
    # As torch: tensors of two devices do not mix, but for copies and numbers on the CPU.
    mixed = any(there) and not all(t or x.ndim == 0 for t, x in zip(there, tensors, strict=True))
    if mixed and func not in (aten.copy_.default, aten._to_copy.default, aten.detach.default):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")
    kwargs = {k: torch.device("cpu") if is_mps(v) else v for k, v in kwargs.items()}
    plain = tree_map(lambda x: x.inner if isinstance(x, OnMps) else x, (args, kwargs))
    with torch.utils._python_dispatch._disable_current_modes():
        result = func(*plain[0], **plain[1])
    if func is aten.copy_.default or func.overloadpacket.__name__.endswith("_"):
        return args[0] if isinstance(args[0], Tensor) else result
    if is_mps(to_device) or (to_device is None and any(there)):
        return tree_map(lambda x: OnMps(x) if isinstance(x, Tensor) else x, result)
    return result
