"""Batch normalisation over the batch of all processes."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from util.float64 import to_float64


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation whose statistics are those of the global batch (Ioffe & Szegedy, 2015).

    Why not `nn.SyncBatchNorm`: it refuses tensors on the CPU, so a run there could not do what the
    same run does on GPUs. This one works wherever the default process group does, on gloo and on
    nccl. Processes may have batches of different sizes, empty ones too. Gradients flow through the
    statistics to the inputs of all processes. In one process and in evaluation it is torch's
    `F.batch_norm`.

    A batch whose statistics are not finite leaves running statistics and their count as they are,
    since its optimiser step is skipped too; the host does not wait to learn of it (except in one
    process with `momentum=None`, where torch itself waits).

    Input and output are [B, C, ...], of the same dtype; the statistics are computed in float32 or
    better, also under autocast. Arguments and names in the state dict are torch's.

    Raises:
        ValueError: an input that is not [B, C, ...] with C = `num_features`; in one process, also a
            single value per channel.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2 or input.shape[1] != self.num_features:
            raise ValueError(f"expected [B, {self.num_features}, ...], got {list(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, ...] to the same shape; every process must call it, and train or none."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        if dist.is_initialized() and dist.get_world_size() > 1:
            return self._over_processes(input)
        return self._alone(input)

    def _alone(self, input: Tensor) -> Tensor:
        affine = (self.weight, self.bias)
        if self.running_mean is None or self.running_var is None:
            return F.batch_norm(input, None, None, *affine, True, 0.0, self.eps)
        # Torch writes into what it is given, and keeps it for the backward pass: give it copies.
        mean, var = self.running_mean.clone(), self.running_var.clone()
        output = F.batch_norm(input, mean, var, *affine, True, float(self._share()), self.eps)
        self._track(mean, var)
        return output

    @torch.compiler.disable  # its collectives cannot be traced; the graph is cut here
    def _over_processes(self, input: Tensor) -> Tensor:
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        per_channel = (1, -1) + (1,) * (x.ndim - 2)
        others = [dim for dim in range(x.ndim) if dim != 1]
        count = x.new_full((1,), x.shape[0] * x.shape[2:].numel())
        total = all_reduce(torch.cat([x.sum(others), count]))
        count = total[-1].detach()
        mean = total[:-1] / count
        # Two passes: the mean of squares less the square of the mean cancels in float32.
        centred = x - mean.view(per_channel)
        squares = all_reduce(centred.square().sum(others))
        output = centred * (squares / count + self.eps).rsqrt().view(per_channel)
        if self.weight is not None:
            output = output * self.weight.view(per_channel)
        if self.bias is not None:
            output = output + self.bias.view(per_channel)
        if self.running_mean is not None and self.running_var is not None:
            share, var = self._share(), squares.detach() / (count - 1)
            self._track(
                self.running_mean + (mean.detach() - self.running_mean) * share,
                self.running_var + (var - self.running_var) * share,
            )
        return output.to(input.dtype)

    def _share(self) -> float | Tensor:
        """Weight of this batch in the running statistics; momentum None: their plain mean."""
        if self.momentum is not None:
            return self.momentum
        assert self.num_batches_tracked is not None
        return (to_float64(self.num_batches_tracked) + 1).reciprocal()

    def _track(self, mean: Tensor, var: Tensor) -> None:
        """Take over new running statistics, if they are finite."""
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        finite = (mean.isfinite() & var.isfinite()).all()
        with torch.no_grad():
            self.running_mean.copy_(mean.where(finite, self.running_mean))
            self.running_var.copy_(var.where(finite, self.running_var))
            self.num_batches_tracked.add_(finite)
