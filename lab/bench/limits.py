"""What a machine can do at most: matrix products, memory, JPEG decoding."""

import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.io import ImageReadMode, decode_jpeg

from lab.bench.measuring import spread, summary, table
from models_protocols import PretrainModel
from util.progress import say

# Rows, inner and outer width of a linear layer.
Shape = tuple[int, int, int]

COPIED = 2**28  # bytes: far more than any cache holds


def layer_shapes(
    arguments: Mapping[str, Any], num_patches: int, num_visible: int, batch: int
) -> list[Shape]:
    """The linear layers of a masked autoencoder's blocks, one of each kind.

    Args:
        arguments: of `MaskedAutoencoderViT`.
    """
    shapes, tokens = [], arguments.get("cls_tokens", 1)
    for rows, width in (
        (batch * (tokens + num_visible), arguments["embed_dim"]),
        (batch * (tokens + num_patches), arguments["decoder_embed_dim"]),
    ):
        hidden = int(width * arguments.get("mlp_ratio", 4.0))
        for inner, outer in ((width, 3 * width), (width, width), (width, hidden), (hidden, width)):
            shapes.append((rows, inner, outer))
    return shapes


def linear_shapes(model: PretrainModel, batch: int) -> list[Shape]:
    """The linear layers of a model whose encoder sees every patch, one of each size.

    Args:
        model: on the CPU. batch: images of the step.
    """
    found: dict[Shape, None] = {}

    def note(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].numel() // layer.in_features * batch
        found[rows, layer.in_features, layer.out_features] = None

    hooks = [
        layer.register_forward_pre_hook(note)
        for layer in model.modules()
        if isinstance(layer, nn.Linear)
    ]
    places = math.prod(model.mask_grid)
    mask = (torch.arange(places) > 0).unsqueeze(0)  # one place is visible
    with torch.no_grad():
        model(torch.zeros(1, *model.input.shape), mask, 1)
    for hook in hooks:
        hook.remove()
    return list(found)


def product_flops(shapes: Sequence[Shape]) -> int:
    """Operations of a pass of `matrix_rate`: two a product, forward and both gradients."""
    return sum(6 * rows * inner * outer for rows, inner, outer in shapes)


def stopwatch(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    """A function that takes the seconds of a call: by CUDA events on a GPU, else by the clock."""

    def by_clock(work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def by_events(work: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    return by_events if device.type == "cuda" else by_clock


def matrix_rate(shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> Callable:
    """A function that measures the rate of the products of these layers once.

    Each is taken as training takes it: forward, gradient of the input, gradient of the weight.

    Returns:
        a function without arguments, to operations a second.
    """
    operands = [
        (
            torch.randn(rows, inner, device=device).to(dtype),
            torch.randn(outer, inner, device=device).to(dtype),
            torch.randn(rows, outer, device=device).to(dtype),
        )
        for rows, inner, outer in shapes
    ]
    seconds_of = stopwatch(device)

    def work() -> None:
        for x, weight, gradient in operands:
            torch.mm(x, weight.t())
            torch.mm(gradient, weight)
            torch.mm(gradient.t(), x)

    flops = product_flops(shapes)
    return lambda: flops / seconds_of(work)


def copy_rate(device: torch.device) -> Callable[[], float]:
    """A function that measures bytes a second, read and written, of a large copy."""
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds_of = stopwatch(device)
    return lambda: 2 * COPIED / seconds_of(lambda: target.copy_(source))


def decode_rates(files: Sequence[bytes], device: torch.device) -> dict[str, Callable[[], float]]:
    """Functions that measure images a second decoded to RGB.

    On one core: PIL's, torchvision's. With a GPU, `device`, also its own decoder, which gets all
    files at once.
    """

    def by_pil(data: bytes) -> Any:
        return Image.open(io.BytesIO(data)).convert("RGB")

    tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]

    def rate(decode: Callable[[Any], Any], inputs: Sequence[Any]) -> Callable[[], float]:
        def measure() -> float:
            start = time.perf_counter()
            for data in inputs:
                decode(data)
            return len(inputs) / (time.perf_counter() - start)

        return measure

    def by_torchvision(data: Tensor) -> Tensor:
        return decode_jpeg(data)

    rates = {
        "decode, PIL, images/s a core": rate(by_pil, files),
        "decode, torchvision, images/s a core": rate(by_torchvision, tensors),
    }
    if device.type == "cuda":
        seconds_of = stopwatch(device)
        rates["decode, the GPU's decoder, images/s"] = lambda: (
            len(tensors)
            / seconds_of(lambda: decode_jpeg(tensors, mode=ImageReadMode.RGB, device=device))
        )
    return rates


def show_limits(found: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The table of all limits; their `summary` by name."""
    limits = {name: summary(values) for name, values in found.items()}
    say(
        table(
            [
                {"limit": name, "n": f["n"], "median": f["median"], "min-max": spread(f)}
                for name, f in limits.items()
            ]
        )
    )
    return limits
