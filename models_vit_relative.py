"""The vision transformer of BEiT and SimMIM: no positions but a relative position bias.

Parameters are named as in timm's `Beit`, which are the official names: `blocks.N.gamma_1`,
`blocks.N.attn.q_bias`, `blocks.N.attn.relative_position_bias_table`, and where all blocks share one
table `rel_pos_bias.relative_position_bias_table`.

Shape legend: B images, L patches, N = 1 + L tokens, D channels, gh and gw sides of the grid.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, trunc_normal_
from timm.models.beit import Block
from torch import Tensor, nn

from models_layers import (
    LayerNorm,
    check_lscale,
    drop_path_rates,
    exporting,
    pair,
    plain_attention,
    relative_bias,
    relative_index,
    relative_table,
    run,
    scale_branch,
)
from models_protocols import Encoder
from util.errors import BadInput
from util.mask.relative import resize_bias
from util.spec import InputSpec, Pair

TABLE, SHARED = "relative_position_bias_table", "rel_pos_bias.relative_position_bias_table"
# Names, and what they stand for of the constructor's arguments.
NAMES: dict[str, dict[str, Any]] = {
    f"vit_relative_{size}_patch{patch}": {
        "img_size": side,
        "patch_size": patch,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
    }
    for size, patch, side, width, depth, heads in (
        ("micro", 4, 32, 128, 4, 4),
        ("small", 16, 224, 384, 12, 6),
        ("base", 16, 224, 768, 12, 12),
        ("large", 16, 224, 1024, 24, 16),
    )
}


class RelativeBlock(Block):
    """timm's block of BEiT, whose branches each sample may drop or keep by numbers of its own."""

    def forward(
        self,
        x_BND: Tensor,
        index_NN: Tensor,
        shared: Tensor | None = None,
        kept_B2: Tensor | None = None,
    ) -> Tensor:
        """[B, N, D] to [B, N, D].

        Args:
            index_NN: rows of the table for each query and key, see `models_layers.relative_index`.
            shared: [1, heads, N, N], the bias of all blocks, where they share one.
            kept_B2: factors of attention and MLP, see `models_layers.drop_path_factors`.
        """
        first, second = (None, None) if kept_B2 is None else kept_B2.unbind(1)
        table = self.attn.relative_position_bias_table
        bias = relative_bias(table, index_NN) if shared is None else shared
        attended = self.attend(self.norm1(x_BND), bias)
        attended = attended if self.gamma_1 is None else self.gamma_1 * attended
        x_BND = x_BND + scale_branch(self.drop_path1(attended), first)
        mixed = self.mlp(self.norm2(x_BND))
        mixed = mixed if self.gamma_2 is None else self.gamma_2 * mixed
        return x_BND + scale_branch(self.drop_path2(mixed), second)

    def attend(self, x_BND: Tensor, bias: Tensor) -> Tensor:
        """Attention whose logits get a bias, [1, heads, N, N]; keys have no bias of their own."""
        attn, (B, N, D) = self.attn, x_BND.shape
        own = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
        qkv = F.linear(x_BND, attn.qkv.weight, own).reshape(B, N, 3, attn.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, head_dim]
        bias = bias.to(q.dtype)
        if plain_attention(q, q.dtype, N * N) or exporting():
            mixed = ((q * attn.scale) @ k.mT + bias).softmax(dim=-1).to(v.dtype) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return attn.proj(mixed.transpose(1, 2).reshape(B, N, D))


class SharedBias(nn.Module):
    """The table that all blocks share, under its official name; 0 at the start."""

    def __init__(self, grid: Pair, num_heads: int) -> None:
        super().__init__()
        self.relative_position_bias_table = relative_table(grid, num_heads)


class RelativeVisionTransformer(Encoder):
    """A vision transformer with relative position bias, and a classification head or none.

    Args:
        img_size: side or (height, width), pixels; multiples of the patch size.
        patch_size: side or (height, width), pixels.
        in_chans: channels of the image.
        num_classes: outputs of the head; 0: no head, features only.
        embed_dim, depth, num_heads, mlp_ratio: the encoder.
        lscale_init: of `gamma_1` and `gamma_2`, factors on the branches of a block; None: none.
        shared_bias: one table for all blocks, as in pretraining; else each block has its own.
        global_pool: avg: mean of the patch tokens, then `fc_norm`, and no final `norm`; cls: the
            class token after `norm`.
        drop_path: stochastic depth, from 0 in the first block to this in the last.
        probe: BatchNorm without affine before the linear head.

    Attributes:
        grid: (gh, gw) patches; stride: pixels of a patch.

    Starts as SimMIM's fine-tuning: weights truncated normal .02, and the last of each branch of
    block i (from 0) divided by sqrt(2 (i + 1)); tables at 0.

    Raises:
        BadInput: sizes that do not fit each other.

    Source: Bao et al., BEiT (arXiv 2106.08254); Xie et al., SimMIM (arXiv 2111.09886).
    """

    index: Tensor
    kind: ClassVar[str] = "vit_relative"
    pools: ClassVar[Sequence[str]] = ("avg", "cls")
    plain_blocks: ClassVar[bool] = True
    mlp: ClassVar[Sequence[str]] = ("norm2.", "mlp.", "gamma_2")
    moved: ClassVar[Sequence[str]] = (SHARED,)

    def __init__(
        self,
        img_size: int | Pair = 224,
        patch_size: int | Pair = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        lscale_init: float | None = 0.1,
        shared_bias: bool = False,
        global_pool: str | None = None,
        drop_path: float = 0.0,
        probe: bool = False,
    ) -> None:
        super().__init__()
        size, self.patch_size = pair(img_size), pair(patch_size)
        if any(p < 1 or s < 1 or s % p for s, p in zip(size, self.patch_size, strict=True)):
            raise BadInput(f"image size {size} is not a multiple of the patch size {patch_size}")
        if depth < 1 or num_heads < 1 or embed_dim % num_heads or not mlp_ratio > 0:
            raise BadInput(
                f"width {embed_dim} must be a multiple of its {num_heads} heads, depth {depth} and "
                f"mlp_ratio {mlp_ratio} positive"
            )
        check_lscale(lscale_init)
        self.input, self.num_features = InputSpec(in_chans, size), embed_dim
        self.grid = (size[0] // self.patch_size[0], size[1] // self.patch_size[1])
        self.stride, self.drops_paths = self.patch_size, drop_path > 0
        self.patch_embed = PatchEmbed(size, self.patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.rel_pos_bias = SharedBias(self.grid, num_heads) if shared_bias else None
        self.blocks = nn.ModuleList(
            RelativeBlock(
                embed_dim,
                num_heads,
                qkv_bias=True,
                mlp_ratio=mlp_ratio,
                drop_path=rate,
                init_values=lscale_init,
                norm_layer=LayerNorm,
            )
            for rate in drop_path_rates(drop_path, depth)
        )
        blocks: Sequence[Any] = list(self.blocks)
        for block in blocks if not shared_bias else ():
            block.attn.relative_position_bias_table = relative_table(self.grid, num_heads)
        index = relative_index(self.grid, self.grid)
        self.register_buffer("index", index, persistent=False)
        self.stages = [f"blocks.{i}" for i in range(depth)]
        self.grad_checkpointing = False
        self.make_head(num_classes, global_pool, probe)
        mean = self.global_pool == "avg"
        self.norm: nn.Module = nn.Identity() if mean else LayerNorm(embed_dim)
        self.fc_norm: nn.Module = LayerNorm(embed_dim) if mean else nn.Identity()
        self.init_weights(cut=2.0)

    def init_weights(self, cut: float) -> None:
        """Initialise all weights anew.

        Args:
            cut: where the normal distribution of deviation .02 is cut off, absolute.
        """

        def normal(tensor: Tensor) -> None:
            trunc_normal_(tensor, std=0.02, a=-cut, b=cut)

        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                normal(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        normal(self.cls_token)
        blocks: Sequence[Any] = list(self.blocks)
        for i, block in enumerate(blocks, 1):
            for last in (block.attn.proj, block.mlp.fc2):
                last.weight.data.div_(math.sqrt(2.0 * i))

    def embed(self, x: Tensor) -> Tensor:
        """Patches before the blocks, [B, gh, gw, D], of normalised images [B, C, H, W]."""
        self.input.check(x)
        return self.patch_embed.proj(x).permute(0, 2, 3, 1)

    def encode(self, x_BHWD: Tensor, kept: Tensor | None = None) -> Tensor:
        """What `embed` gave, through all blocks and the final norm: tokens [B, 1 + L, D].

        Args:
            kept: [B, depth, 2], see `RelativeBlock`.
        """
        for x_BND in self.after_blocks(x_BHWD, kept):
            last_BND = x_BND
        return self.norm(last_BND)

    def after_blocks(self, x_BHWD: Tensor, kept: Tensor | None = None) -> Iterator[Tensor]:
        """Tokens after each block, [B, 1 + L, D]; the grid may be another than the tables'."""
        grid = (x_BHWD.shape[1], x_BHWD.shape[2])
        index_NN = self.index
        if grid != self.grid:
            index_NN = relative_index(self.grid, grid, x_BHWD.device)
        x_BLD = x_BHWD.flatten(1, 2)
        x_BND = torch.cat([self.cls_token.expand(x_BLD.shape[0], -1, -1), x_BLD], dim=1)
        shared = None
        if self.rel_pos_bias is not None:
            shared = relative_bias(self.rel_pos_bias.relative_position_bias_table, index_NN)
        for i, block in enumerate(self.blocks):
            factors = None if kept is None else kept[:, i]
            x_BND = run(
                block,
                x_BND,
                index_NN,
                shared,
                factors,
                recompute=self.grad_checkpointing,
                draws=self.drops_paths,
            )
            yield x_BND

    def pyramid(self, images: Tensor, taps: Sequence[int]) -> list[Tensor]:
        """See `Encoder.pyramid`: outputs of blocks, of images of any size in whole patches."""
        x_BHWD = self.patch_embed.proj(images).permute(0, 2, 3, 1)
        grid = x_BHWD.shape[1:3]
        maps = []
        for i, x_BND in enumerate(self.after_blocks(x_BHWD)):
            if i in taps:
                maps.append(x_BND[:, 1:].transpose(1, 2).unflatten(2, grid).contiguous())
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens [B, 1 + L, D], the class token first; see `Encoder`."""
        return self.encode(self.embed(x))

    def to_map(self, x_BND: Tensor) -> Tensor:
        """What `encode` gave, as a map [B, D, gh, gw]."""
        return x_BND[:, 1:].transpose(1, 2).unflatten(2, self.grid)

    def pool(self, x: Tensor, kind: str) -> Tensor:
        """See `Encoder.pool`."""
        return self.fc_norm(x[:, 0] if kind == "cls" else x[:, 1:].mean(dim=1))

    def layer_of(self, name: str) -> int:
        """See `Encoder.layer_of`: SimMIM's ids, a shared table last."""
        after = ("norm.", "fc_norm.", "head.", "rel_pos_bias.")
        return -1 if name.startswith(after) else super().layer_of(name)

    def no_weight_decay(self) -> set[str]:
        """The class token; tables do decay, as in the official code."""
        return {"cls_token"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See `PretrainModel.set_grad_checkpointing`."""
        self.grad_checkpointing = enable

    @classmethod
    def fit_arguments(cls, stored: Mapping[str, Any], size: Pair | None) -> dict[str, Any]:
        """See `Encoder.fit_arguments`: each block gets a table of its own."""
        return super().fit_arguments(stored, size) | {"shared_bias": False}

    def fit_weights(
        self, weights: Mapping[str, Tensor], stored: Mapping[str, Any], pos_resize: str
    ) -> tuple[dict[str, Tensor], list[str]]:
        """See `Encoder.fit_weights`: a shared table becomes each block's, tables are resized."""
        fitted, notes = dict(weights), []
        shared = fitted.pop(SHARED, None)
        if shared is not None and self.rel_pos_bias is not None:
            fitted[SHARED] = shared
        elif shared is not None:
            fitted |= {f"{stage}.attn.{TABLE}": shared for stage in self.stages}
            notes.append("the table of relative positions is copied into every block")
        size, patch = pair(stored["img_size"]), pair(stored["patch_size"])
        grid = (size[0] // patch[0], size[1] // patch[1])
        if grid != self.grid:
            for name in [name for name in fitted if name.endswith(TABLE)]:
                fitted[name] = resize_bias(fitted[name], grid, self.grid, pos_resize)
            old, new = ("x".join(map(str, sides)) for sides in (grid, self.grid))
            notes.append(f"relative positions {old} -> {new} patches (--pos_resize {pos_resize})")
        unused = "norm." if self.global_pool == "avg" else "fc_norm."
        return {k: v for k, v in fitted.items() if not k.startswith(unused)}, notes
