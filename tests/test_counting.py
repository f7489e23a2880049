"""util/dry_run/counting.py on modules that the project does not know, by hand."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from util.dry_run.cost import Cost, count_forward, count_step
from util.errors import BadInput


def summed(size: tuple[int, ...]) -> Callable[[Any, int], Tensor]:
    """The sum of what a model gives for images of a size."""
    return lambda model, images: model(torch.rand(images, *size)).sum()


# ---- A small ConvNet -----------------------------------------------------------------------------


class ConvNet(nn.Module):
    """Unknown to the project; its BatchNorm needs two images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, 10, 10] to [B, 5]."""
        return self.head(self.norm(self.conv(images)).relu().mean(dim=(2, 3)))


CONV, HEAD = 2 * 100 * 8 * 3 * 9, 2 * 8 * 5  # operations of an image
# Numbers kept of an image: the image, outputs of the convolution and of the ReLU, the means.
VALUES = {"image": 300, "conv": 800, "relu": 800, "means": 8}


def convnet_cost(batch_size: int = 2, **rest: Any) -> Cost:
    return count_step(ConvNet(), summed((3, 10, 10)), batch_size=batch_size, **rest)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_a_convnet_costs_what_it_does_by_hand(batch_size: int) -> None:
    """Images get no gradient; the norm keeps a mean and a deviation of 8 channels."""
    cost = convnet_cost(batch_size)
    assert (cost.forward, cost.backward) == (CONV + HEAD, CONV + 2 * HEAD)
    assert cost.activations == 4 * sum(VALUES.values())
    assert (cost.attention, cost.copies, cost.shared) == (0, 0, 4 * 2 * 8)
    assert count_forward(ConvNet(), summed((3, 10, 10))) == CONV + HEAD


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_convnet_in_half_precision(precision: str) -> None:
    """Autocast copies weights and biases, and keeps everything between them at half the size."""
    cost = convnet_cost(precision=precision)
    assert cost.activations == 2 * sum(VALUES.values())
    assert cost.copies == 2 * (8 * 27 + 8 + 8 * 5 + 5)
    assert 0 < cost.shared <= 4 * 2 * 8  # the norm's statistics, in one precision or the other


def test_what_is_frozen_keeps_nothing() -> None:
    model = ConvNet()
    model.conv.requires_grad_(False)
    model.norm.requires_grad_(False)
    cost = count_step(model, summed((3, 10, 10)), batch_size=2)
    assert (cost.forward, cost.backward) == (CONV + HEAD, HEAD)
    assert (cost.activations, cost.shared) == (4 * VALUES["means"], 0)


def test_what_learns_nothing_has_no_backward_pass() -> None:
    cost = count_step(ConvNet().requires_grad_(False), summed((3, 10, 10)), batch_size=2)
    assert cost.backward == cost.activations == 0 < cost.forward


# ---- Activations computed again ------------------------------------------------------------------

WIDTH, DEPTH = 16, 4


class Stack(nn.Module):
    """Blocks of two linear layers that may be computed again."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
            for _ in range(DEPTH)
        )
        self.start, self.again, self.reentrant = nn.Linear(WIDTH, WIDTH), False, reentrant

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As timm's."""
        self.again = enable

    def forward(self, x: Tensor) -> Tensor:
        """[B, WIDTH] to the same."""
        x = self.start(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant) if self.again else block(x)
        return x.square()


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_fullest_moment_by_hand(reentrant: bool) -> None:
    """When the last block has been computed again: what each block reads, and all of the last.

    Each of them is [B, WIDTH]: the input of `start`, the inputs of all blocks, and in the last
    block the outputs of two Tanhs. The last output is also what the square keeps.
    """
    model, loss = Stack(reentrant), summed((WIDTH,))
    value, product = 4 * WIDTH, 2 * WIDTH * WIDTH
    plain = count_step(model, loss, batch_size=2)
    assert plain.activations == value * (2 + 3 * DEPTH - DEPTH)
    again = count_step(model, loss, batch_size=2, grad_checkpointing=True)
    assert again.activations == value * (1 + DEPTH + 2)
    assert again.forward == plain.forward == product * (1 + 2 * DEPTH)
    # All is computed again: a block's last layer too, for the Tanh after it keeps what it gives.
    assert again.backward == plain.backward + product * 2 * DEPTH


def test_a_model_without_checkpointing_is_not_asked_for_it() -> None:
    with pytest.raises(BadInput, match="ConvNet has no set_grad_checkpointing"):
        convnet_cost(grad_checkpointing=True)


# ---- Attention -----------------------------------------------------------------------------------


class Attention(nn.Module):
    """Two heads of 4 over 6 tokens, with what is added to or hidden from the scores."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.qkv = nn.Linear(8, 24)
        self.bias = nn.Parameter(torch.zeros(1, 2, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 6, 8] to [B, 2, 6, 4]."""
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        masks = {"none": None, "bias": self.bias, "scaled": 2 * self.bias,
                 "hidden": torch.ones(6, 6, dtype=torch.bool)}  # fmt: skip
        dropout = 0.5 if self.kind == "none" else 0.0
        return F.scaled_dot_product_attention(q, k, v, masks[self.kind], dropout)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kind", "shared"), [("none", 0), ("bias", 0), ("scaled", 72), ("hidden", 36)]
)
def test_attention_is_counted_as_the_fused_kernel(kind: str, shared: int, precision: str) -> None:
    """Two products of two activations forward, five backward, and no scores are kept.

    A mask of all images is kept once, and is no activation; a parameter is none of it.
    """
    cost = count_step(Attention(kind), summed((6, 8)), batch_size=2, precision=precision)
    scores = 2 * 2 * 6 * 6 * 4
    assert cost.attention == 2 * scores + 5 * scores
    assert cost.forward == 2 * 6 * 8 * 24 + 2 * scores
    narrow = 4 if precision == "fp32" else 2
    sums = 4 * 2 * 32  # one of a query, which the kernel rounds up to 32
    assert cost.activations == pytest.approx(narrow * (6 * 8 + 6 * 24 + 6 * 8) + sums, abs=32)
    if precision == "fp32":
        assert cost.shared == pytest.approx(4 * shared, abs=16)  # and the dropout's seed


def test_torchs_own_attention_layers_are_counted() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    forward = 2 * 6 * (8 * 24 + 8 * 8 + 2 * 8 * 16) + 2 * 2 * 6 * 6 * 8
    assert count_forward(layer, summed((6, 8))) == forward
    assert count_step(layer, summed((6, 8)), batch_size=2).forward == forward


# ---- Nothing is changed --------------------------------------------------------------------------


class Odd(ConvNet):
    """Draws from every global generator, and holds a tensor that is neither weight nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.full((8,), 2.0)
        self.tied = self.conv.bias

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, 10, 10] to [B, 5]."""
        random.random()
        np.random.rand()
        assert isinstance(self.tied, nn.Parameter) and self.tied is self.conv.bias
        return super().forward(images) + self.scale[:5] + F.dropout(torch.rand(5))


def test_neither_the_model_nor_random_states_change() -> None:
    model = Odd().eval()
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    kernel = torch._C._dispatch_has_kernel_for_dispatch_key(
        "aten::scaled_dot_product_attention", "AutogradCPU"
    )
    count_step(model, summed((3, 10, 10)), batch_size=2, precision="bf16")
    count_forward(model, summed((3, 10, 10)))
    assert not model.training and all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert value.data_ptr() == before[name][0] and value.equal(before[name][1]), name
    assert states[0] == random.getstate() and states[1] == np.random.get_state()[1].tolist()
    assert states[2].equal(torch.get_rng_state())
    assert kernel == torch._C._dispatch_has_kernel_for_dispatch_key(
        "aten::scaled_dot_product_attention", "AutogradCPU"
    )


def test_a_model_of_terabytes_takes_no_memory() -> None:
    width = 1_000_000
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
        cost = count_step(model, summed((width,)), batch_size=1000)
    assert (cost.forward, cost.backward) == (4 * width**2, 6 * width**2)
    assert cost.activations == 4 * 2 * width


@pytest.mark.parametrize(
    "ask", [lambda x: x[x > 0], lambda x: x * x.sum().item(), lambda x: x if x.any() else -x]
)
def test_a_model_that_needs_values_is_refused(ask: Callable[[Tensor], Tensor]) -> None:
    model = ConvNet()
    with pytest.raises(BadInput, match=r"ConvNet cannot be costed: .* needs a tensor's values"):
        count_step(model, lambda m, n: ask(m(torch.rand(n, 3, 10, 10))).sum(), batch_size=2)
