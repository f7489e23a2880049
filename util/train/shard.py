"""A model on its device: whole on every process, or in shards, of which each process keeps one.

Shards are torch's (`fully_shard`, "FSDP2"; Zhao et al., arXiv 2304.11277, Rajbhandari et al., arXiv
1910.02054): parameters, gradients and the optimiser's state are cut along their first dimension.
Each transformer block is gathered for as long as it computes, what is left of the model as one
more unit. The numbers are those of the whole model up to the order of sums, and so are checkpoints.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from util.train.dist import Processes

# What models call their lists of transformer blocks, wherever they have them.
BLOCKS = ("blocks", "decoder_blocks")


def cut(model: nn.Module, mesh: DeviceMesh) -> None:
    """Cut a model into shards in place: each transformer block, then what is left of it."""
    modules: dict[str, Any] = dict(model.named_modules())
    for name in [name for name in modules if name.rpartition(".")[2] in BLOCKS]:
        for block in modules[name]:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


class Placed:
    """A model on the device of each process; what needs all of its weights asks here.

    Args:
        model: on the CPU, alike on all processes; moved or sharded in place. A sharded model is
            moved block by block, so that the whole of it never has to fit on the device.
        procs: the processes.
        shard: cut it into shards. One process has nobody to share with, and keeps it whole.

    Attributes:
        model: as given; its parameters are `DTensor`s where it is in shards.
        sharded: whether it is.
    """

    def __init__(self, model: nn.Module, procs: Processes, *, shard: bool) -> None:
        self.model, self.procs = model, procs
        self.sharded = shard and procs.world_size > 1
        self.twin: nn.Module | None = None
        if not self.sharded:
            model.to(procs.device)
            return
        # Buffers outside the state dict are constants, such as the index of a table.
        saved = model.state_dict().keys()
        self.constants = {
            name: buffer.clone() for name, buffer in model.named_buffers() if name not in saved
        }
        self.twin = copy.deepcopy(model).to("meta")
        for tensor in model.state_dict().values():  # all start from the main process's, as with DDP
            dist.broadcast(tensor, 0, group=procs.control)
        world = dist.group.WORLD
        assert world is not None
        cut(model, DeviceMesh.from_group(world, procs.device.type))

    def __str__(self) -> str:
        return f"in {self.procs.world_size} shards" if self.sharded else "whole on each process"

    @contextmanager
    def whole(self) -> Iterator[Any]:
        """The model without shards, for evaluation: any process may run it, also alone.

        Entering is a collective. Where the model is in shards it is a copy, which lasts as long as
        the block and needs the memory of all weights (not that of gradients or optimiser): a
        forward pass through shards would be a collective too, and processes that have different
        numbers of batches would wait for each other for ever.
        """
        if self.twin is None:
            yield self.model
            return
        self.twin.to_empty(device=self.procs.device)
        with torch.no_grad():
            own = self.twin.state_dict()
            for name, value in self.model.state_dict().items():
                own[name].copy_(value.full_tensor() if isinstance(value, DTensor) else value)
            for name, buffer in self.twin.named_buffers():
                if name in self.constants:
                    buffer.copy_(self.constants[name])
        try:
            yield self.twin
        finally:
            self.twin.to("meta")

    def full(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A state dict of the model or its optimiser without shards, on the CPU. A collective.

        The same format as without shards, so that a checkpoint goes on in either way.

        Returns:
            on the main process the state; on the others what was in shards is None.
        """
        return gathered(state, keep=self.procs.main)

    def parts(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """This process's parts of weights without shards, for `load_state_dict` of the model.

        What the model does not have, or in another shape, stays as it is.
        """
        own = self.model.state_dict()
        return {name: cut_part(value, own.get(name)) for name, value in weights.items()}


def optimizer_parts(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """This process's parts of an optimiser's state without shards, for its `load_state_dict`."""
    parameters = dict(enumerate(p for g in optimizer.param_groups for p in g["params"]))
    parts = {
        index: {name: cut_part(value, parameters.get(index)) for name, value in entries.items()}
        for index, entries in state["state"].items()
    }
    return {**state, "state": parts}


def cut_part(whole: Any, like: Tensor | None) -> Any:
    """A tensor cut as a parameter of its shape is; anything else as it is. No communication."""
    if not isinstance(like, DTensor) or getattr(whole, "shape", None) != like.shape:
        return whole
    # Without a source rank each process takes its own part of its own copy.
    mesh, placements = like.device_mesh, like.placements
    return distribute_tensor(whole.to(like.device), mesh, placements, src_data_rank=None)


def gathered(state: Any, *, keep: bool) -> Any:
    """Nested dictionaries and lists with every `DTensor` in them gathered, one after another."""
    if isinstance(state, Mapping):
        return {key: gathered(value, keep=keep) for key, value in state.items()}
    if isinstance(state, list):
        return [gathered(value, keep=keep) for value in state]
    if not isinstance(state, DTensor):
        return state
    whole = state.full_tensor().detach()
    # A copy: what is gathered may be a view of a padded, larger tensor.
    return whole.to("cpu", copy=True) if keep else None


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process keeps; a tensor that is not in shards itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all entries of all tensors, a scalar; those of all shards.

    A collective where they are in shards, and the same number on every process: a value that is
    not finite in one shard is seen by all.
    """
    norm = nn.utils.get_total_norm([local(t) for t in tensors])
    first = next((t for t in tensors if isinstance(t, DTensor)), None)
    if first is not None:
        # In float64 the square of no float32 overflows.
        square = norm.double().square()
        dist.all_reduce(square, group=first.device_mesh.get_group())
        norm = square.sqrt().to(norm.dtype)
    return norm
