"""Swin: a vision transformer in stages, whose attention stays inside of windows that shift.

Parameters are named as in timm's `SwinTransformer` (`layers.1.downsample.reduction`,
`layers.0.blocks.1.attn.relative_position_bias_table`), but for the head, which is `head`.

Shape legend: B images, h and w sides of a map, C channels of a stage.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, trunc_normal_
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformerBlock,
    window_partition,
    window_reverse,
)
from torch import Tensor, nn

from models_layers import drop_path_rates, pair, run, scale_branch
from models_protocols import Encoder
from util.errors import BadInput
from util.mask.relative import resize_bias
from util.spec import InputSpec, Pair

TABLE = "relative_position_bias_table"
# Sizes: patch, width of the first stage, depths, heads. All but micro are those of the paper.
SIZES = {
    "micro": (2, 32, (2, 2, 2, 2), (1, 2, 4, 8)),
    "tiny": (4, 96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": (4, 96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": (4, 128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "large": (4, 192, (2, 2, 18, 2), (6, 12, 24, 48)),
}
# Windows, with the image side of each: SimMIM's for pretraining and fine-tuning.
WINDOWS = {
    "micro": {4: 32},
    "tiny": {6: 192, 7: 224},
    "small": {6: 192, 7: 224},
    "base": {6: 192, 7: 224},
    "large": {12: 192, 14: 224},
}
# Names, and what they stand for of the constructor's arguments.
NAMES: dict[str, dict[str, Any]] = {
    f"swin_{size}_patch{SIZES[size][0]}_window{window}": {
        "img_size": side,
        "patch_size": SIZES[size][0],
        "embed_dim": SIZES[size][1],
        "depths": list(SIZES[size][2]),
        "num_heads": list(SIZES[size][3]),
        "window_size": window,
    }
    for size, windows in WINDOWS.items()
    for window, side in windows.items()
}


class SwinBlock(SwinTransformerBlock):
    """timm's block, for maps of any size and with branches that each sample may drop or keep.

    A map that is not in whole windows is padded before it is shifted, as in Swin's code for
    segmentation; timm pads after it, where the mask of the shift fits no more.
    """

    def forward(self, x_BhwC: Tensor, kept_B2: Tensor | None = None) -> Tensor:
        """[B, h, w, C] to the same.

        Args:
            kept_B2: factors of attention and MLP, see `models_layers.drop_path_factors`.
        """
        first, second = (None, None) if kept_B2 is None else kept_B2.unbind(1)
        x_BhwC = x_BhwC + scale_branch(self.drop_path1(self._attn(self.norm1(x_BhwC))), first)
        return x_BhwC + scale_branch(self.drop_path2(self.mlp(self.norm2(x_BhwC))), second)

    def _attn(self, x: Tensor) -> Tensor:
        _, h, w, C = x.shape
        (wh, ww), (down, right) = self.window_size, self.shift_size
        x = F.pad(x, (0, 0, 0, -w % ww, 0, -h % wh))
        shifts = down > 0 or right > 0
        own = (h, w) == tuple(self.input_resolution)
        mask = self.attn_mask if own or not shifts else self.get_attn_mask(x)
        x = torch.roll(x, (-down, -right), (1, 2)) if shifts else x
        windows = window_partition(x, self.window_size).view(-1, wh * ww, C)
        mixed = self.attn(windows, mask=mask).view(-1, wh, ww, C)
        x = window_reverse(mixed, self.window_size, x.shape[1], x.shape[2])
        x = torch.roll(x, (down, right), (1, 2)) if shifts else x
        return x[:, :h, :w].contiguous()


class SwinStage(nn.Module):
    """Blocks at one resolution, after a merging of 2 x 2 patches but in the first stage."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[SwinBlock]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)


class SwinTransformer(Encoder):
    """Swin with a classification head, or none.

    Args:
        img_size: side or (height, width), pixels: whole patches at every stage.
        patch_size: side or (height, width), pixels.
        in_chans: channels of the image.
        num_classes: outputs of the head; 0: no head, features only.
        embed_dim: channels of the first stage; each later one has twice as many.
        depths, num_heads: of each stage.
        window_size: side of a window, in patches. Where a map is no larger, its window is the map,
            and nothing shifts.
        mlp_ratio: of the blocks.
        pad_windows: windows never shrink, and maps that are not in whole windows are padded with
            zeros: any image is taken, as in segmentation.
        global_pool: avg: mean of the last map, after its norm.
        drop_path: stochastic depth, from 0 in the first block to this in the last.
        probe: BatchNorm without affine before the linear head.

    Attributes:
        grid: (gh, gw) patches of the first stage; stride: pixels of a patch of the last.
        feature_info: stride in pixels and channels of each stage's map.

    Linear layers and tables start truncated normal .02, the rest as torch has it. LayerNorms have
    torch's epsilon, 1e-5.

    Raises:
        BadInput: sizes that do not fit each other.

    Source: Liu et al. (arXiv 2103.14030), as in SimMIM's code.
    """

    kind: ClassVar[str] = "swin"
    pools: ClassVar[Sequence[str]] = ("avg",)
    mlp: ClassVar[Sequence[str]] = ("norm2.", "mlp.")
    head_std: ClassVar[float] = 0.02

    def __init__(
        self,
        img_size: int | Pair = 224,
        patch_size: int | Pair = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 128,
        depths: Sequence[int] = (2, 2, 18, 2),
        num_heads: Sequence[int] = (4, 8, 16, 32),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        pad_windows: bool = False,
        global_pool: str | None = None,
        drop_path: float = 0.0,
        probe: bool = False,
    ) -> None:
        super().__init__()
        size, self.patch_size = pair(img_size), pair(patch_size)
        self.input, self.window_size = InputSpec(in_chans, size), window_size
        self.depths, self.pad_windows = tuple(depths), pad_windows
        _check(size, self.patch_size, embed_dim, depths, num_heads, window_size, mlp_ratio)
        self.grid = (size[0] // self.patch_size[0], size[1] // self.patch_size[1])
        self.drops_paths = drop_path > 0
        if not pad_windows:
            _check_windows(size, self.patch_size, self.grid, len(depths), window_size)
        self.patch_embed = PatchEmbed(
            size, self.patch_size, in_chans, embed_dim, norm_layer=nn.LayerNorm, output_fmt="NHWC"
        )
        rates = iter(drop_path_rates(drop_path, sum(depths)))
        stages, self.feature_info = [], []
        for s, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            width, factor = embed_dim * 2**s, 2**s
            merging = PatchMerging(width // 2) if s else nn.Identity()
            blocks = [
                SwinBlock(
                    width,
                    (-(-self.grid[0] // factor), -(-self.grid[1] // factor)),
                    heads,
                    window_size=window_size,
                    shift_size=window_size // 2 if b % 2 else 0,
                    always_partition=pad_windows,
                    mlp_ratio=mlp_ratio,
                    drop_path=next(rates),
                )
                for b in range(depth)
            ]
            stages.append(SwinStage(merging, blocks))
            stride = tuple(side * factor for side in self.patch_size)
            self.feature_info.append({"stride": stride, "channels": width})
        self.layers = nn.ModuleList(stages)
        self.num_features, self.stride = width, stride
        self.norm = nn.LayerNorm(width)
        self.stages = [f"layers.{s}.blocks.{b}" for s, n in enumerate(depths) for b in range(n)]
        self.grad_checkpointing = False
        self.make_head(num_classes, global_pool, probe)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def embed(self, x: Tensor) -> Tensor:
        """Patches before the blocks, normalised: [B, gh, gw, C], of images [B, C, H, W]."""
        if not self.pad_windows:
            self.input.check(x)
        (ph, pw), (H, W) = self.patch_size, x.shape[2:]
        x = F.pad(x, (0, -W % pw, 0, -H % ph)) if H % ph or W % pw else x
        return self.patch_embed.norm(self.patch_embed.proj(x).permute(0, 2, 3, 1))

    def maps(self, x_BhwC: Tensor, kept: Tensor | None = None) -> list[Tensor]:
        """What `embed` gave, after the blocks of each stage: [B, h, w, C] from fine to coarse.

        Args:
            kept: [B, blocks, 2], see `SwinBlock`.
        """
        found, number = [], itertools.count()
        for stage in self._stages():
            x_BhwC = stage.downsample(x_BhwC)
            for block in stage.blocks:
                i = next(number)
                factors = None if kept is None else kept[:, i]
                x_BhwC = run(
                    block,
                    x_BhwC,
                    factors,
                    recompute=self.grad_checkpointing,
                    draws=self.drops_paths,
                )
            found.append(x_BhwC)
        return found

    def _stages(self) -> Iterator[Any]:
        return iter(self.layers)

    def encode(self, x_BhwC: Tensor, kept: Tensor | None = None) -> Tensor:
        """The last of `maps`, normalised."""
        return self.norm(self.maps(x_BhwC, kept)[-1])

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map after its norm, [B, h, w, C]; see `Encoder`."""
        return self.encode(self.embed(x))

    def pyramid(self, images: Tensor, taps: Sequence[int]) -> list[Tensor]:
        """See `Encoder.pyramid`: the map of each stage, before the norm."""
        return [x.permute(0, 3, 1, 2) for x in self.maps(self.embed(images))]

    def to_map(self, x_BhwC: Tensor) -> Tensor:
        """What `encode` gave, channels first: [B, C, h, w]."""
        return x_BhwC.permute(0, 3, 1, 2)

    def pool(self, x: Tensor, kind: str) -> Tensor:
        """See `Encoder.pool`."""
        return x.mean(dim=(1, 2))

    def layer_of(self, name: str) -> int:
        """See `Encoder.layer_of`: SimMIM's ids, a merging with the block before it."""
        if name.startswith("norm."):
            return -1
        part, stage, kind = [*name.split("."), "", ""][:3]
        if part == "layers" and kind == "downsample":
            return sum(self.depths[: int(stage)])
        return super().layer_of(name)

    def no_weight_decay(self) -> set[str]:
        """The tables of relative positions."""
        return {name for name, _ in self.named_parameters() if name.endswith(TABLE)}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See `PretrainModel.set_grad_checkpointing`."""
        self.grad_checkpointing = enable

    @classmethod
    def for_any_size(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """See `Encoder.for_any_size`: windows keep their size, and maps are padded."""
        return {"pad_windows": True, **arguments}

    @classmethod
    def fit_arguments(cls, stored: Mapping[str, Any], size: Pair | None) -> dict[str, Any]:
        """See `Encoder.fit_arguments`: windows grow with the image, where they stay whole."""
        found = super().fit_arguments(stored, size)
        before, window = pair(stored["img_size"]), stored["window_size"]
        if size is None or tuple(size) == before or stored.get("pad_windows"):
            return found
        grown = {window * after / side for after, side in zip(size, before, strict=True)}
        if len(grown) == 1 and (new := grown.pop()) >= 1 and new % 1 == 0:
            found["window_size"] = int(new)
        return found

    def fit_weights(
        self, weights: Mapping[str, Tensor], stored: Mapping[str, Any], pos_resize: str
    ) -> tuple[dict[str, Tensor], list[str]]:
        """See `Encoder.fit_weights`: tables of relative positions come to the new windows."""
        fitted, changed = dict(weights), {}
        for s, stage in enumerate(self._stages()):
            for b, block in enumerate(stage.blocks):
                name = f"layers.{s}.blocks.{b}.attn.{TABLE}"
                old = _window_of(stored, s)
                if name in fitted and old != tuple(block.window_size):
                    table = resize_bias(fitted[name], old, tuple(block.window_size), pos_resize)
                    fitted[name] = table
                    changed[old] = tuple(block.window_size)
        sides = {"x".join(map(str, a)): "x".join(map(str, b)) for a, b in changed.items()}
        return fitted, [
            f"relative positions of windows {old} -> {new} (--pos_resize {pos_resize})"
            for old, new in sides.items()
        ]


def _window_of(arguments: Mapping[str, Any], stage: int) -> Pair:
    """The window of a stage, by the constructor's arguments: the map itself where it is smaller."""
    window = arguments["window_size"]
    if arguments.get("pad_windows"):
        return window, window
    sides = zip(pair(arguments["img_size"]), pair(arguments["patch_size"]), strict=True)
    first, second = (min(window, side // patch // 2**stage) for side, patch in sides)
    return first, second


def _check(
    size: Pair,
    patch: Pair,
    width: int,
    depths: Sequence[int],
    heads: Sequence[int],
    window: int,
    mlp_ratio: float,
) -> None:
    factor = 2 ** (len(depths) - 1)
    if any(p < 1 or s < 1 or s % (p * factor) for s, p in zip(size, patch, strict=True)):
        raise BadInput(
            f"image size {size} is not a multiple of {patch[0] * factor} x {patch[1] * factor}, a "
            f"patch of the last of {len(depths)} stages"
        )
    if not depths or len(depths) != len(heads) or min(depths) < 1:
        raise BadInput(f"depths {list(depths)} and num_heads {list(heads)} must be one a stage")
    if any(n < 1 or width * 2**i % n for i, n in enumerate(heads)) or not mlp_ratio > 0:
        raise BadInput(
            f"width {width} must be a multiple of the heads {list(heads)}, twice as many at each "
            f"stage, and mlp_ratio {mlp_ratio} positive"
        )
    if window < 1:
        raise BadInput(f"window_size must be at least 1, not {window}")


def _check_windows(size: Pair, patch: Pair, grid: Pair, stages: int, window: int) -> None:
    """Refuse maps that are not in whole windows."""
    for stage in range(stages):
        sides = [side // 2**stage for side in grid]
        if any(side > window and side % window for side in sides):
            windows = [n for n in range(2, 33) if _in_whole_windows(grid, stages, n)]
            windows.sort(key=lambda n: abs(n - window))
            sizes = _near_sizes(size, patch, stages, window)
            named = [str(h) if h == w else f"{h}x{w}" for h, w in sizes[:4]]
            raise BadInput(
                f"windows of {window} do not divide the map of {sides[0]} x {sides[1]} in stage "
                f"{stage + 1} of images {size} in patches of {patch}; near are images of "
                f"{', '.join(named) or 'no size'} (--input_size), or windows of "
                f"{', '.join(map(str, windows[:4])) or 'no size up to 32'} (--window_size in "
                "pretraining)"
            )


def _near_sizes(size: Pair, patch: Pair, stages: int, window: int) -> list[Pair]:
    """Sizes of images whose maps are all in whole windows, the nearest first."""
    last = [side * 2 ** (stages - 1) for side in patch]  # a patch of the last stage, pixels
    counts = [side // unit for side, unit in zip(size, last, strict=True)]
    found = []
    for more in sorted(range(-8, 9), key=abs):
        h, w = (n + more for n in counts)
        grid = (h * 2 ** (stages - 1), w * 2 ** (stages - 1))
        if min(h, w) > 0 and _in_whole_windows(grid, stages, window):
            found.append((h * last[0], w * last[1]))
    return found


def _in_whole_windows(grid: Pair, stages: int, window: int) -> bool:
    maps = [side // 2**stage for stage in range(stages) for side in grid]
    return all(side <= window or side % window == 0 for side in maps)
