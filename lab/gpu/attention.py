"""Attention's kernels by shape: forward and backward, as a block calls them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lab.bench.contenders import ATTENTION
from lab.bench.limits import stopwatch
from lab.bench.measuring import summary
from lab.gpu.parts import Scale

# Images, tokens, heads, width of a head: of the blocks of MAE at 224 pixels, 75 % masked.
SHAPES = {
    "ViT-B encoder": (512, 50, 12, 64),
    "decoder": (512, 197, 16, 32),
    "ViT-L encoder": (256, 50, 16, 64),
    "ViT-H encoder": (128, 65, 16, 80),
    "ViT-B fine-tuned": (256, 197, 12, 64),
}
TURNS = 10


def attention(scale: Scale) -> dict[str, Any]:
    """Milliseconds of each kernel that takes the shape; of one that does not, why."""
    device = torch.device(scale.device)
    found: dict[str, Any] = {}
    for name, (images, tokens, heads, width) in SHAPES.items():
        shape = (2, 5, 2, 8) if scale.tiny else (images, tokens, heads, width)
        found[name] = {"shape": shape}
        for kernel, backend in ATTENTION.items():
            try:
                found[name][kernel] = milliseconds(shape, backend, device)
            except RuntimeError as error:
                found[name][kernel] = {"refused": str(error).splitlines()[0][:200]}
    return found


def milliseconds(
    shape: tuple[int, int, int, int], backend: SDPBackend, device: torch.device
) -> dict[str, Any]:
    """`summary` of forward and backward together, of queries, keys and values of one product."""
    B, N, heads, d = shape
    qkv = torch.randn(B, N, 3 * heads * d, device=device, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(B, N, heads * d, device=device, dtype=torch.bfloat16)

    def work() -> None:
        q, k, v = qkv.reshape(B, N, 3, heads, d).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        mixed.transpose(1, 2).reshape(B, N, -1).backward(gradient)
        qkv.grad = None

    with sdpa_kernel(backend):
        for _ in range(3):
            work()
        return summary([1000 * stopwatch(device)(work) for _ in range(TURNS)])
