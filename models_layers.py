"""Layers that several models share and timm does not have.

Shape legend: B images, L patches, K visible, M masked (L = K + M), N tokens, D channels, V values
of a patch (ph*pw*C).
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Block, LayerScale
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from util.errors import BadInput
from util.spec import Pair

# The epsilon of MAE's LayerNorms; torch's default is 1e-5.
LayerNorm = partial(nn.LayerNorm, eps=1e-6)


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """A side given once or twice, as (height, width)."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def check_lscale(lscale_init: float | None) -> None:
    """Refuse an LScale that could not learn: at 0 a branch and its gradients are 0 for ever."""
    if lscale_init is not None and not (math.isfinite(lscale_init) and lscale_init != 0):
        raise BadInput(
            f"lscale_init {lscale_init} would switch every branch off; None leaves LScale out"
        )


def scaled(linear: nn.Linear, scale: nn.Module, x: Tensor) -> Tensor:
    """LScale of a linear layer's output, multiplied where that is less: [..., K] to [..., D].

    g * (W x + b) = (g * W) x + g * b: with more rows in `x` than W has columns the weights are the
    smaller, and the unscaled output need not be kept for the backward pass.
    """
    if not isinstance(scale, LayerScale) or x.numel() <= x.shape[-1] * linear.in_features:
        return scale(linear(x))
    return F.linear(x, scale.gamma.unsqueeze(1) * linear.weight, scale.gamma * linear.bias)


# Pairs of a query and a key up to which `plain_attention` was the faster one (docs/speed.md, "Where
# the time goes"); what it keeps for the backward pass grows with them.
MOST_PLAIN_PAIRS = 400 * 400


def plain_attention(x: Tensor, dtype: torch.dtype, pairs: int) -> bool:
    """Whether attention should be plain matrix products instead of torch's fused kernel.

    The kernel's backward pass is slow in bf16 on CPUs: with few tokens it took up to ten times as
    long as the products that it saves the memory of.

    Args:
        x: where it is computed, and whether for a backward pass.
        dtype: of queries, keys and values.
        pairs: queries times keys of an image and head.
    """
    slow = x.device.type == "cpu" and dtype == torch.bfloat16 and torch.is_grad_enabled()
    # Fake tensors are a dry run's, which plans for where the kernel is the faster one.
    return slow and pairs <= MOST_PLAIN_PAIRS and not isinstance(x, FakeTensor)


def exporting() -> bool:
    """Whether a graph is written, as for ONNX, which cannot express the kernel with a bias."""
    return getattr(torch.compiler, "is_exporting", lambda: False)()  # not in torch 2.6


# Tokens up to which torch's memory-efficient kernel was the fastest one on a GPU (docs/speed.md).
# With all keys in one block its backward pass has one order of sums, which a resume needs.
FEW_TOKENS = 64


@torch.compiler.assume_constant_result
def newer_gpu() -> bool:
    """Whether the GPU has what torch's kernels of attention ask for in bf16 (A100 and later)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def few_tokens(q: Tensor, k: Tensor) -> bool:
    """Whether attention is of so few tokens that another kernel than torch's choice is faster."""
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    return max(q.shape[-2], k.shape[-2]) <= FEW_TOKENS and q.shape[-1] % 8 == 0 and newer_gpu()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention: [B, heads, M, d] and twice [B, heads, N, d] to the first's."""
    if plain_attention(q, q.dtype, q.shape[-2] * k.shape[-2]):
        return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(dim=-1) @ v
    if few_tokens(q, k):
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


class EncoderBlock(Block):
    """timm's `Block`, whose attention is computed as `plain_attention` says."""

    def forward(self, x_BND: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, N, D] to [B, N, D]; the other arguments are `Block`'s."""
        kind = x_BND.device.type
        cast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if cast else x_BND.dtype
        self.attn.fused_attn = not plain_attention(x_BND, dtype, x_BND.shape[1] ** 2)
        return super().forward(x_BND, *args, **kwargs)


def mlp_hidden(mlp: Mlp, x: Tensor) -> Tensor:
    """What the second layer of a block's MLP gets: [..., D] to [..., hidden]."""
    return mlp.act(mlp.fc1(x))


class PretrainBlock(Block):
    """timm's `Block` as pretraining needs it: without dropout, with a drop path that is handed to
    it, and with an LScale whose multiplication is cheap; parameters as `Block`'s.
    """

    def forward(self, x_BND: Tensor, kept_B2: Tensor | None = None) -> Tensor:
        """[B, N, D] to [B, N, D].

        Args:
            kept_B2: factors of attention and MLP, see `drop_path_factors`.
        """
        B, N, D = x_BND.shape
        first, second = (None, None) if kept_B2 is None else kept_B2.unbind(1)
        attn = self.attn
        qkv = attn.qkv(self.norm1(x_BND)).reshape(B, N, 3, attn.num_heads, attn.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, head_dim]
        mixed = attend(q, k, v).transpose(1, 2).reshape(B, N, D)
        x_BND = x_BND + scale_branch(scaled(attn.proj, self.ls1, mixed), first)
        hidden = mlp_hidden(self.mlp, self.norm2(x_BND))
        return x_BND + scale_branch(scaled(self.mlp.fc2, self.ls2, hidden), second)


class QueryBlock(Block):
    """A transformer block that computes the last tokens of a sequence only.

    Keys and values come from all tokens, queries, MLP and output from the last `num_queries`: the
    same numbers as the full block followed by a slice, without the work for what is cut off. The
    parameters are timm's `Block`'s, name by name.
    """

    def forward(self, x_BND: Tensor, num_queries: int) -> Tensor:
        """[B, N, D] to [B, num_queries, D]."""
        B, N, D = x_BND.shape
        attn, normed_BND = self.attn, self.norm1(x_BND)
        weight_q, weight_kv = attn.qkv.weight.split([D, 2 * D])
        bias_q, bias_kv = attn.qkv.bias.split([D, 2 * D])
        heads = (attn.num_heads, attn.head_dim)
        q = F.linear(normed_BND[:, -num_queries:], weight_q, bias_q)
        q = q.reshape(B, num_queries, *heads).transpose(1, 2)  # [B, heads, M, head_dim]
        kv = F.linear(normed_BND, weight_kv, bias_kv)
        k, v = kv.reshape(B, N, 2, *heads).permute(2, 0, 3, 1, 4)  # each [B, heads, N, head_dim]
        mixed = attend(q, k, v).transpose(1, 2).reshape(B, num_queries, D)
        x_BMD = x_BND[:, -num_queries:] + scaled(attn.proj, self.ls1, mixed)
        return x_BMD + scaled(self.mlp.fc2, self.ls2, mlp_hidden(self.mlp, self.norm2(x_BMD)))


def make_block(
    dim: int,
    num_heads: int,
    mlp_ratio: float,
    lscale_init: float | None,
    kind: type[Block] = PretrainBlock,
) -> Block:
    """timm's block with MAE's settings; LScale is timm's LayerScale, `ls1.gamma`, `ls2.gamma`."""
    return kind(
        dim,
        num_heads,
        mlp_ratio,
        qkv_bias=True,
        norm_layer=LayerNorm,
        init_values=lscale_init,
    )


def run(block: nn.Module, *inputs: Any, recompute: bool, draws: bool = False) -> Tensor:
    """A block's output; with `recompute` its activations are computed again in the backward pass.

    That saves their memory and costs about a third more time; the numbers are the same.

    Args:
        draws: whether the block draws random numbers; it then draws the same again, for which the
            generators' states are kept. No block does in pretraining.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=draws)
    return block(*inputs)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth of each block, rising linearly from 0 in the first to `rate`."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


def drop_path_factors(drawn: Tensor, rate: float) -> Tensor:
    """Stochastic depth by numbers that come with the samples: factors of residual branches.

    A function of seed, epoch and image, and so the same however a batch is split.

    Args:
        drawn: [B, depth, 2], uniform in [-1/2, 1/2).
        rate: of the last block; it rises linearly from 0 in the first.

    Returns:
        [B, depth, 2]: 0 where a branch is left out, else 1 / (1 - its rate).
    """
    # Made on the device: a list would have to be sent there, and waited for.
    rates = torch.linspace(0, rate, drawn.shape[1], dtype=drawn.dtype, device=drawn.device)
    rates = rates[:, None]
    return (drawn + 0.5 >= rates).to(drawn.dtype) / (1 - rates)


def scale_branch(branch: Tensor, kept_B: Tensor | None) -> Tensor:
    """A residual branch times the factor of each sample; None: as it is."""
    if kept_B is None:
        return branch
    return branch * kept_B.to(branch.dtype).view(-1, *(1 for _ in branch.shape[1:]))


class RelativeBias(nn.Module):
    """BEiT's relative position bias of one block: a learned number for each offset and head.

    Args:
        grid: (gh, gw) patches that the table is for.

    Parameter `table` [(2gh - 1)(2gw - 1) + 3, heads], 0 at the start: offsets in raster order, row
    then column, then class token to patch, patch to class token, class token to itself.
    """

    def __init__(self, grid: Pair, num_heads: int) -> None:
        super().__init__()
        self.table = relative_table(grid, num_heads)

    def forward(self, index_NN: Tensor) -> Tensor:
        """What `relative_index` gave, to what is added to the logits: [1, heads, N, N]."""
        return relative_bias(self.table, index_NN)


def relative_table(grid: Pair, num_heads: int) -> nn.Parameter:
    """A table of relative positions for a grid, 0 at the start; see `RelativeBias`."""
    rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
    return nn.Parameter(torch.zeros(rows, num_heads))


def relative_bias(table: Tensor, index_NN: Tensor) -> Tensor:
    """A table, by what `relative_index` gave, to what is added to the logits: [1, heads, N, N]."""
    return table[index_NN].permute(2, 0, 1).unsqueeze(0).contiguous()


def relative_index(
    known: Pair, grid: Pair, device: torch.device | None = None, cls_tokens: int = 1
) -> Tensor:
    """Which row of a table for the grid `known` each pair of tokens of `grid` has: int64 [N, N].

    Query, then key. On another grid an offset of so many patches keeps its row, and one beyond the
    table has the row at its edge: patches are of the same size in pixels whatever the image's.
    All class tokens have the same rows.
    """
    sides = []
    for table, side in zip(known, grid, strict=True):
        i = torch.arange(side, device=device)
        sides.append((i[:, None] - i).clamp(1 - table, table - 1) + table - 1)
    (gh, gw), columns = grid, 2 * known[1] - 1
    pairs = sides[0][:, None, :, None] * columns + sides[1][None, :, None, :]
    first = (2 * known[0] - 1) * columns
    n, N = cls_tokens, cls_tokens + gh * gw
    index = torch.empty(N, N, dtype=torch.int64, device=device)
    index[n:, n:] = pairs.reshape(gh * gw, gh * gw)
    index[:n], index[:, :n], index[:n, :n] = first, first + 1, first + 2
    return index


def take(x_BLD: Tensor, ids_BM: Tensor) -> Tensor:
    """Rows `ids` of each image: [B or 1, L, D] and int64 [B, M] to [B, M, D]."""
    B, M = ids_BM.shape
    x_BLD = x_BLD.expand(B, -1, -1)
    return x_BLD.gather(1, ids_BM.unsqueeze(-1).expand(B, M, x_BLD.shape[-1]))


def split_ids(mask_BL: Tensor, num_visible: int) -> tuple[Tensor, Tensor]:
    """Indices of visible and of masked patches, each in raster order: int64 [B, K] and [B, M]."""
    order = mask_BL.to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, :num_visible], order[:, num_visible:]


def embed_patches(proj: nn.Conv2d, patches_BMV: Tensor) -> Tensor:
    """A patch-embedding convolution applied to patches cut by `patchify`: [B, M, V] to [B, M, D].

    Convolving patches that do not overlap is a matrix product; only the given ones are paid.
    """
    weight_DV = proj.weight.permute(0, 2, 3, 1).flatten(1)  # (row, column, channel), as patchify
    return F.linear(patches_BMV, weight_DV, proj.bias)


def init_weights(module: nn.Module) -> None:
    """MAE's initialisation of Linear and LayerNorm (`_init_weights`); use with `apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
