"""What a step costs: operations and bytes, counted on tensors without values; disk by arithmetic.

What is counted: the multiplications and additions of matrix products, convolutions and attention
(2 a pair), by the formulas of `torch.utils.flop_counter`. What is not: norms, activation functions,
softmax, additions, optimiser. Attention is counted as its fused kernel computes it, wherever the
plan is made: two products forward, and five backward, which computes the scores again.

An activation is a tensor that the backward pass needs and that is no parameter. Temporary tensors
are not counted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from util.dry_run.counting import run_forward, run_step

FULL = 4  # bytes of a float32
# What the operations hold, for the reader.
COUNTED = "matrix products, convolutions and attention (its fused kernel), 2 a multiply-add"


@dataclass(frozen=True)
class Cost:
    """What a step costs for each image.

    Attributes:
        forward, backward: operations.
        attention: those of both that are fused attention's own.
        activations: bytes kept at the fullest moment.
        copies: bytes of the weights in half precision, once for all images; 0 in float32.
        shared: bytes of what else is kept once for all images: biases of attention, weights that
            were scaled.
    """

    forward: float
    backward: float
    attention: float
    activations: float
    copies: float
    shared: float = 0

    @property
    def total(self) -> float:
        """Operations of forward and backward."""
        return self.forward + self.backward


def count_step(
    model: nn.Module,
    loss_of: Callable[[Any, int], Tensor],
    *,
    batch_size: int,
    precision: str = "fp32",
    grad_checkpointing: bool = False,
) -> Cost:
    """What one image costs in a training step of a model.

    The step runs on fake tensors. The model is copied and not changed, no random state is, and
    neither memory nor time grow with the sizes of tensors. What a model computes from its weights
    alone is shared by all images: a second step, of twice the images, tells it from the rest.

    Args:
        model: on any device, also on `meta`. What learns is what requires a gradient.
        loss_of: the copy, in training mode, and a number of images to the loss of that many images,
            which it draws on the CPU. Called within autocast.
        batch_size: images of a micro-batch. One is counted as half of two: a BatchNorm may need
            them.
        precision: fp32 | bf16 | fp16, as `OptimizerStep` trains in it.
        grad_checkpointing: handed to the model's `set_grad_checkpointing`.

    Raises:
        BadInput: the model asks for a tensor's values, or cannot checkpoint.
    """
    B = max(batch_size, 2)
    one, two = (
        run_step(
            model,
            loss_of,
            batch_size=size,
            precision=precision,
            grad_checkpointing=grad_checkpointing,
        )
        for size in (B, 2 * B)
    )
    grown = (two.kept - two.copies) - (one.kept - one.copies)
    shared = max(0, one.kept - one.copies - grown)
    return Cost(
        forward=one.forward / B,
        backward=one.backward / B,
        attention=one.attention / B,
        activations=(one.kept - one.copies - shared) / B,
        copies=one.copies,
        shared=shared,
    )


def count_forward(model: nn.Module, output_of: Callable[[Any, int], Any]) -> int:
    """Operations of one image in evaluation mode.

    Args:
        model: as `count_step`'s.
        output_of: the copy and a number of images to anything.

    Raises:
        BadInput: the model asks for a tensor's values.
    """
    return run_forward(model, output_of)


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step holds on one device.

    Attributes:
        weights: all parameters and buffers in float32.
        copies: half-precision copies of the weights that autocast makes.
        shared: kept once for all images, see `Cost`.
        gradients: of what learns.
        optimizer: its state.
        averages: of the weights, where they are kept (EMA).
        activations: of a micro-batch.
        images: the micro-batch itself, as uint8 and as float32.
    """

    weights: float
    copies: float
    shared: float
    gradients: float
    optimizer: float
    averages: float
    activations: float
    images: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(vars(self).values())


# Numbers of state for each parameter that learns.
OPTIMIZER_STATE = {"adamw": 2, "lars": 1}


def estimate_memory(
    cost: Cost,
    *,
    batch_size: int,
    image_values: int,
    parameters: int,
    learning: int,
    optimizer: str,
    averages: bool = False,
) -> Memory:
    """Bytes on one device, with all of the weights there.

    Args:
        batch_size: images of a micro-batch.
        image_values: numbers in an image.
        parameters: numbers in the weights, frozen ones and buffers among them.
        learning: those that learn.
        optimizer: a key of `OPTIMIZER_STATE`.
        averages: averaged weights are kept too.
    """
    return Memory(
        weights=FULL * parameters,
        copies=cost.copies,
        shared=cost.shared,
        gradients=FULL * learning,
        optimizer=FULL * OPTIMIZER_STATE[optimizer] * learning,
        averages=FULL * parameters * averages,
        activations=cost.activations * batch_size,
        images=batch_size * image_values * (1 + FULL),
    )


def checkpoint_bytes(parameters: int, learning: int, optimizer: str, averages: bool = False) -> int:
    """Bytes of one checkpoint: weights, averaged ones, the optimiser's state."""
    return FULL * (parameters * (1 + averages) + OPTIMIZER_STATE[optimizer] * learning)


def numbered_checkpoints(epochs: int, save_every: int, keep: int) -> int:
    """Files that a run leaves; `checkpoint-last.pth` is a second name of the last numbered one."""
    if save_every == 0:
        return 1
    numbered = epochs // save_every + (epochs % save_every > 0)
    return min(numbered, keep) if keep else numbered
