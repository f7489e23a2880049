"""The encoder as a classifier: timm's vision transformer with what fine-tuning asks of it.

Shape legend: B images, L patches, n class tokens, N = n + L tokens, D channels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models_batchnorm import GlobalBatchNorm
from models_layers import EncoderBlock, LayerNorm, check_lscale, pair
from models_protocols import PartlyTuned, count_tuned_blocks
from util.errors import BadInput
from util.mask.pos_embed import resize_table, sincos_2d
from util.spec import Pair

# What pools the tokens, in our flags and in timm's.
POOLS = {"avg": "avg", "cls": "token"}


class VisionTransformer(PartlyTuned, TimmVisionTransformer):
    """A vision transformer with a classification head, or none.

    Args:
        img_size: side or (height, width), pixels; multiples of the patch size.
        patch_size: side or (height, width), pixels.
        in_chans: channels of the image.
        num_classes: outputs of the head; 0: no head, features only.
        embed_dim, depth, num_heads, mlp_ratio: the encoder.
        global_pool: avg: mean of the patch tokens, then `fc_norm`, and no final `norm`; cls: the
            class token after `norm`, or the mean of several.
        drop_path: stochastic depth, from 0 in the first block to this in the last.
        lscale_init: LScale's gamma at the start; None: no LScale.
        probe: BatchNorm without affine before the linear head, over all processes (`head.0`, the
            head itself is `head.1`).
        cls_tokens: n class tokens, each with a position of its own.

    Attributes:
        grid: (gh, gw) patches; num_features: D; img_size, patch_size: (height, width).

    The parameters are named as in timm and in MAE's fine-tuned weights. `pos_embed` is trained; it
    starts from MAE's sin-cos code, from which weights that are loaded may differ. Everything else
    starts as timm's does.

    Raises:
        BadInput: sizes that do not fit each other.
    """

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
        global_pool: str = "avg",
        drop_path: float = 0.0,
        lscale_init: float | None = None,
        probe: bool = False,
        cls_tokens: int = 1,
    ) -> None:
        size, patch = pair(img_size), pair(patch_size)
        if any(p < 1 or s < 1 or s % p for s, p in zip(size, patch, strict=True)):
            raise BadInput(f"image size {size} is not a multiple of the patch size {patch}")
        if num_heads < 1 or embed_dim % num_heads or embed_dim % 4:
            raise BadInput(
                f"width {embed_dim} must be a multiple of its {num_heads} heads, and of 4 for the "
                "position code"
            )
        if global_pool not in POOLS:
            raise BadInput(f"unknown global_pool {global_pool!r}, choose from {list(POOLS)}")
        check_lscale(lscale_init)
        if cls_tokens < 1:
            raise BadInput(f"cls_tokens must be at least 1, not {cls_tokens}")
        super().__init__(
            img_size=size,
            patch_size=patch,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=POOLS[global_pool],
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path,
            init_values=lscale_init,
            norm_layer=LayerNorm,
            block_fn=EncoderBlock,
        )
        self.img_size, self.patch_size, self.in_chans = size, patch, in_chans
        self.grid = (size[0] // patch[0], size[1] // patch[1])
        self.cls_tokens = self.num_prefix_tokens = cls_tokens
        if cls_tokens > 1:
            # Apart from the start: tokens that are alike would stay so.
            self.cls_token = nn.Parameter(torch.randn(1, cls_tokens, embed_dim) * 0.02)
            self.pos_embed = nn.Parameter(
                torch.empty(1, cls_tokens + math.prod(self.grid), embed_dim)
            )
        with torch.no_grad():
            self.pos_embed.zero_()
            self.pos_embed[0, cls_tokens:] = sincos_2d(embed_dim, self.grid)
        if probe:
            norm = GlobalBatchNorm(embed_dim, affine=False, eps=1e-6)
            self.head: nn.Module = nn.Sequential(norm, self.head)

    def layer_groups(self) -> list[list[str]]:
        """Names of all parameters from input to output: embeddings, each block, all after them.

        Depth + 2 groups; the one source of freezing, partial tuning and layer decay.
        """
        groups: list[list[str]] = [[] for _ in range(len(self.blocks) + 2)]
        for name, _ in self.named_parameters():
            part, _, rest = name.partition(".")
            if part == "blocks":
                groups[1 + int(rest.split(".")[0])].append(name)
            else:
                groups[0 if part in ("cls_token", "pos_embed", "patch_embed") else -1].append(name)
        return groups

    def tuned_names(self, tune: str) -> set[str]:
        """See `PartlyTuned`."""
        *early, last, after = self.layer_groups()
        depth = len(self.blocks)
        blocks = count_tuned_blocks(tune, depth)
        if blocks is None or blocks == depth:
            return {name for group in (*early, last, after) for name in group}
        if blocks == 0:
            # A final norm before the head would be part of the encoder that is probed.
            return {name for name in after if name.startswith("head.")}
        if blocks == 0.5:
            mlp = {name for name in last if name.split(".")[2] in ("norm2", "mlp", "ls2")}
            return mlp | set(after)
        groups = [*early, last][-int(blocks) :]
        return {name for group in (*groups, after) for name in group}

    def train(self, mode: bool = True) -> "VisionTransformer":
        """Training mode for what learns; whole blocks that are frozen stay in evaluation mode."""
        super().train(mode)
        for block in self.blocks:
            if not any(p.requires_grad for p in block.parameters()):
                block.eval()
        return self

    def features(self, images: Tensor, kind: str) -> Tensor:
        """What the encoder says of an image, without the head.

        Args:
            images: float [B, C, H, W], normalised.
            kind: cls: class token, or the mean of several; avg: mean of the patch tokens; both:
                one after the other. Each after the model's own final norm (`norm` before, or
                `fc_norm` after pooling).

        Returns:
            [B, D], or [B, 2D] for both.
        """
        x_BND = self.forward_features(images)
        if kind not in (*POOLS, "both"):
            raise BadInput(f"unknown features {kind!r}, choose from cls, avg, both")
        kinds = ("cls", "avg") if kind == "both" else (kind,)
        return torch.cat([self.fc_norm(self.pool(x_BND, POOLS[k])) for k in kinds], dim=1)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens [B, N, D] to [B, D], as timm: by `avg`, or by `token`, the class tokens' mean."""
        kind = self.global_pool if pool_type is None else pool_type
        first, rest = x[:, : self.cls_tokens], x[:, self.cls_tokens :]
        if kind == "token":
            return first[:, 0] if self.cls_tokens == 1 else first.mean(dim=1)
        return rest.mean(dim=1)

    def forward_features(self, images: Tensor, **kwargs: Any) -> Tensor:
        """Tokens [B, N, D] of normalised images, float [B, C, H, W]; class tokens first."""
        if images.shape[1:] != (self.in_chans, *self.img_size):
            raise BadInput(
                f"images are {tuple(images.shape[1:])}, the model was built for "
                f"{(self.in_chans, *self.img_size)} (channels, height, width)"
            )
        return super().forward_features(images, **kwargs)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        intermediates_only: bool = False,
        *,
        biases: Sequence[Callable[[], Tensor]] | None = None,
    ) -> Any:
        """Outputs of blocks as feature maps, of images of any size in whole patches.

        As timm's, whose arguments these are, and beyond it: images may have another size than the
        model; its positions are then resized to their grid (bicubic, as MAE's code does).

        Args:
            x: images, float [B, C, H, W], normalised.
            indices: of the blocks, from 0; a number: the last so many; None: all.
            return_prefix_tokens: give each map with the class tokens beside it, [B, n, D].
            norm: apply the final norm to the maps.
            intermediates_only: leave out what comes after the last map.
            biases: one function for each block that gives what is added to its attention's logits,
                [1, heads, N, N]; called in the block, so that with gradient checkpointing
                only one of them is kept.

        Returns:
            maps, a list of [B, D, gh, gw]; unless intermediates_only, the tokens after the last
            block and the final norm, [B, N, D], and the maps.

        Raises:
            BadInput: images of other channels, or that are not in whole patches.
            ValueError: blocks that are not there.
        """
        wanted = chosen_blocks(len(self.blocks), indices)
        last = max(wanted, default=-1)
        x_BND, grid = self._embed(x)
        maps: list[Any] = []
        for i, block in enumerate(self.blocks):
            if intermediates_only and i > last:
                break
            bias = None if biases is None else biases[i]
            if self.grad_checkpointing and torch.is_grad_enabled():
                x_BND = checkpoint(_biased, block, x_BND, bias, use_reentrant=False)
            else:
                x_BND = _biased(block, x_BND, bias)
            if i in wanted:
                y_BND = self.norm(x_BND) if norm else x_BND
                first, patches = y_BND[:, : self.cls_tokens], y_BND[:, self.cls_tokens :]
                tiles = patches.transpose(1, 2).unflatten(2, grid).contiguous()
                maps.append((tiles, first) if return_prefix_tokens else tiles)
        return maps if intermediates_only else (self.norm(x_BND), maps)

    def _embed(self, images: Tensor) -> tuple[Tensor, Pair]:
        """Tokens before the first block, [B, N, D], of images of any size; and their grid."""
        C, H, W = images.shape[1:]
        ph, pw = self.patch_size
        if self.in_chans != C or H % ph or W % pw or not H or not W:
            raise BadInput(
                f"images are {(C, H, W)} (channels, height, width), the model takes "
                f"{self.in_chans} channels and sides in multiples of {self.patch_size}"
            )
        grid = (H // ph, W // pw)
        x_BLD = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        x_BND = torch.cat([self.cls_token.expand(len(images), -1, -1), x_BLD], dim=1)
        return x_BND + resize_table(self.pos_embed, self.grid, grid), grid


def _biased(block: nn.Module, x_BND: Tensor, bias: Callable[[], Tensor] | None) -> Tensor:
    """A block's output, with what `bias` gives added to the logits of its attention."""
    return block(x_BND) if bias is None else block(x_BND, attn_mask=bias())


def chosen_blocks(depth: int, indices: int | Sequence[int] | None) -> list[int]:
    """Numbers of blocks as timm's `forward_intermediates` takes them.

    Args:
        indices: from 0, or from the end if negative; a number: the last so many; None: all.

    Raises:
        ValueError: there are no such blocks.
    """
    if indices is None:
        return list(range(depth))
    if isinstance(indices, int):
        if not 1 <= indices <= depth:
            raise ValueError(f"the last {indices} of {depth} blocks; expected 1 to {depth}")
        return list(range(depth - indices, depth))
    chosen = [index + depth if index < 0 else index for index in indices]
    if strange := [given for given, i in zip(indices, chosen, strict=True) if not 0 <= i < depth]:
        raise ValueError(
            f"there are {depth} blocks, numbered from 0, and none of them is {strange}"
        )
    return chosen
