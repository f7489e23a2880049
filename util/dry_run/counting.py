"""One training step on tensors without values: what it multiplies, and what it keeps.

The step runs on fake tensors, which have a shape and nothing else, so that a model of any size
takes neither memory nor a GPU. torch sees the same operations as in a run: no formula of ours
describes a model, and one that nobody here knows is counted like any other.
"""

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from util.data.randomness import seeded
from util.errors import BadInput
from util.train.step import PRECISIONS

aten = torch.ops.aten


@dataclass(frozen=True)
class StepCount:
    """What one step of one batch size showed.

    Attributes:
        forward, backward: operations of the whole batch.
        attention: those of both that are fused attention's own.
        kept: bytes at the fullest moment, without parameters and buffers.
        copies: those of them that are parameters in half precision.
    """

    forward: int
    backward: int
    attention: int
    kept: int
    copies: int


class Ledger(TorchDispatchMode):
    """Counts operations, and the bytes of what autograd keeps, while they are there.

    Each storage counts once, from when it is first kept until it is freed. What counts: tensors
    that are saved for the backward pass, copies of parameters in half precision, and all that a
    checkpointed block computes again. Gradients and other temporary tensors do not.

    Args:
        model: its parameters and buffers do not count.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.own = {storage_id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self.alive: dict[int, int] = {}  # bytes by storage
        self.copied: set[int] = set()
        self.now = self.kept = self.copies = 0
        self.operations = {"forward": 0, "backward": 0, "attention": 0}
        self.going_back = False

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        number = storage_id(tensor)
        if number not in self.alive and number not in self.own:
            self.alive[number] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._drop, number)
        return tensor

    def _drop(self, number: int) -> None:
        self.now -= self.alive.pop(number)
        self.copied.discard(number)

    def look(self) -> None:
        """Note what is kept now, if it was never more."""
        if self.now > self.kept:
            self.kept = self.now
            self.copies = sum(self.alive[number] for number in self.copied)

    def __torch_dispatch__(
        self, func: Any, types: Any, given: tuple[Any, ...] = (), named: Any = None
    ) -> Any:
        # The backward pass itself computes no gradient of a gradient: where gradients are enabled
        # during it, a block is computed again. `saved_tensors_hooks` of ours do not see what that
        # saves, since those of the checkpoint are in front of them.
        again = self.going_back and torch.is_grad_enabled()
        # Looked at between two blocks, when the temporary tensors of the first are gone. Saving a
        # tensor detaches it, without gradients, in the middle of a block.
        if self.going_back and not again and func is not aten.detach.default:
            self.look()
        output = func(*given, **(named or {}))
        self._count(func, given, named or {}, output)
        if again:
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor):
                    self.keep(leaf)
        if func is aten._to_copy.default and self._narrows_own(given[0], output):
            self.keep(output)
            self.copied.add(storage_id(output))
        return output

    def _narrows_own(self, tensor: Tensor, output: Tensor) -> bool:
        return storage_id(tensor) in self.own and output.element_size() < tensor.element_size()

    def _count(self, func: Any, given: Any, named: Any, output: Any) -> None:
        formula = flop_registry.get(getattr(func, "overloadpacket", func))
        if formula is None:
            return
        count = formula(*given, **named, out_val=output)
        self.operations["backward" if self.going_back else "forward"] += count
        if "attention" in func.__name__:
            self.operations["attention"] += count


def storage_id(tensor: Tensor) -> int:
    """The same number for all views of a storage; free for another one after its end."""
    return tensor.untyped_storage()._cdata


def run_step(
    model: nn.Module,
    loss_of: Callable[[Any, int], Tensor],
    *,
    batch_size: int,
    precision: str,
    grad_checkpointing: bool,
) -> StepCount:
    """Count one forward and one backward pass; see `util.dry_run.cost.count_step`."""
    with without_values(model) as fake:
        fake.train()
        set_checkpointing(fake, grad_checkpointing)
        ledger = Ledger(fake)
        hooks = torch.autograd.graph.saved_tensors_hooks(ledger.keep, lambda tensor: tensor)
        with ledger:
            with (
                hooks,
                torch.autocast("cpu", PRECISIONS[precision], enabled=precision != "fp32"),
            ):
                loss = loss_of(fake, batch_size)
                ledger.look()  # autocast forgets its copies of weights at the end of the pass
            start = torch.ones_like(loss)
            ledger.going_back = True
            if loss.requires_grad:
                loss.backward(start)
    return StepCount(**ledger.operations, kept=ledger.kept, copies=ledger.copies)


def run_forward(model: nn.Module, output_of: Callable[[Any, int], Any]) -> int:
    """Operations of one image's forward pass; see `util.dry_run.cost.count_forward`."""
    # With gradients: without them torch's own transformer layers are one operation, which its
    # counter does not know.
    with without_values(model) as fake, Ledger(fake.eval()) as ledger:
        output_of(fake, 1)
    return ledger.operations["forward"]


def set_checkpointing(model: Any, enable: bool) -> None:
    """Switch activation checkpointing of a model that has it.

    Raises:
        BadInput: it is asked of one that has not.
    """
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(enable)
    elif enable:
        raise BadInput(
            f"{type(model).__name__} has no set_grad_checkpointing: leave --grad_checkpointing out"
        )


@contextmanager
def without_values(model: nn.Module) -> Iterator[Any]:
    """A copy of a model on fake tensors of the CPU, and a place where it runs.

    The model itself and all random states stay as they are.

    Raises:
        BadInput: the model asks for a tensor's value.
    """
    with (
        seeded(0),
        fused_attention(),
        torch.device("cpu"),  # also where the caller builds on another
        FakeTensorMode(),
    ):
        try:
            yield fake_copy(model)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise BadInput(
                f"{type(model).__name__} cannot be costed: {error.func} needs a tensor's values, "
                "and a dry run has none. Compute shapes from sizes, such as num_visible: no "
                ".item(), .tolist() or boolean index"
            ) from error


class _FakeCopies(TorchFunctionMode):
    """Within it `copy.deepcopy` gives a fake tensor for each tensor."""

    def __torch_function__(
        self, func: Any, types: Any, given: tuple[Any, ...] = (), named: Any = None
    ) -> Any:
        if func is Tensor.__deepcopy__:
            return fake_tensor(given[0])
        return func(*given, **(named or {}))


def fake_copy(model: nn.Module) -> nn.Module:
    """A copy with fake tensors of the CPU, within `FakeTensorMode`, of a model on any device."""
    copies: dict[int, Any] = {id(buffer): fake_tensor(buffer) for buffer in model.buffers()}
    for parameter in model.parameters():
        copies[id(parameter)] = nn.Parameter(fake_tensor(parameter), parameter.requires_grad)
    with _FakeCopies():
        return copy.deepcopy(model, copies)


def fake_tensor(tensor: Tensor) -> Tensor:
    """Of the same shape and type, within `FakeTensorMode`."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


@contextmanager
def fused_attention() -> Iterator[None]:
    """Scaled dot-product attention as GPUs compute it, in one kernel that keeps no scores.

    That of the CPU has no gradient of a mask, and keeps all scores then. One that is written out as
    matrix products is counted as those.
    """
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("scaled_dot_product_attention", _fused, "AutogradCPU")
        yield


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if q.ndim != 4:  # which no fused kernel takes
        return aten._scaled_dot_product_attention_math(
            q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if attn_mask is not None:  # one of all images stays one
        attn_mask = attn_mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]
