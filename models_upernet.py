"""UPerNet on a vision transformer: semantic segmentation as MAE is measured on ADE20K.

Shape legend: B images, K classes, L patches, N = 1 + L tokens, D channels of the encoder, h and w
sides of a map, S its stride in pixels.

Names of neck and heads in the state dict are mmsegmentation's (`Feature2Pyramid`, `UPerHead`,
`FCNHead`); those of the encoder are timm's, under `encoder.`.

Source: Xiao et al., "Unified Perceptual Parsing" (arXiv 1807.10221); its use on a vision
transformer by Bao et al. (BEiT, arXiv 2106.08254) and He et al. (MAE, arXiv 2111.06377, A.4).
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import LayerScale
from torch import Tensor, nn

from models_batchnorm import GlobalBatchNorm
from models_layers import RelativeBias, relative_index
from util.errors import BadInput
from util.spec import Pair

# The neck's first map is this many times as fine as the patches, or less; the others halve.
FINEST = 4
# Where the four taps are, in sixths of the depth: blocks 3, 5, 7, 11 of 12 and 7, 11, 15, 23 of 24.
SIXTHS = (2, 3, 4, 6)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """[B, C, h, w] at another (height, width): bilinear, corners not aligned."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def conv_norm(channels: int, to: int, kernel: int) -> nn.Sequential:
    """Convolution without bias, BatchNorm over all processes, ReLU: `conv`, `bn`; same size."""
    conv = nn.Conv2d(channels, to, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    parts = {"conv": conv, "bn": GlobalBatchNorm(to), "relu": nn.ReLU(inplace=True)}
    return nn.Sequential(OrderedDict(parts))


def classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """The last 1 x 1 convolution of a head, from N(0, .01)."""
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class Pyramid(nn.Module):
    """Four maps of one resolution to a pyramid: the first `finest` times as fine, then halving.

    Finer by transposed 2 x 2 convolutions at stride 2, with norm and GELU between two; coarser by
    the maximum. An odd row or column at the end is left out, except where it is the only one.

    Args:
        finest: 4, 2 or 1.
    """

    def __init__(self, channels: int, finest: int) -> None:
        super().__init__()
        self.factors = [finest / 2**level for level in range(4)]
        up = partial(nn.ConvTranspose2d, channels, channels, kernel_size=2, stride=2)
        if 4 in self.factors:
            self.upsample_4x = nn.Sequential(up(), GlobalBatchNorm(channels), nn.GELU(), up())
        if 2 in self.factors:
            self.upsample_2x = nn.Sequential(up())

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps [B, C, gh, gw], from early to late, to sides times each of `factors`."""
        pyramid = []
        for x, factor in zip(maps, self.factors, strict=True):
            if factor > 1:
                pyramid.append(self.upsample_4x(x) if factor == 4 else self.upsample_2x(x))
            elif factor == 1:
                pyramid.append(x)
            else:
                sides = [min(round(1 / factor), side) for side in x.shape[2:]]
                pyramid.append(F.max_pool2d(x, sides))
        return pyramid


class StageNorms(nn.Module):
    """The maps of an encoder in stages, each with a LayerNorm of its own, as Swin's code has it.

    Args:
        channels: of each map. factors: sides of the maps by that of the patches.
    """

    def __init__(self, channels: Sequence[int], factors: Sequence[float]) -> None:
        super().__init__()
        self.factors = list(factors)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps [B, C, h, w] to the same."""
        pairs = zip(self.norms, maps, strict=True)
        return [norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for norm, x in pairs]


class UperHead(nn.Module):
    """Pyramid pooling of the coarsest map, a feature pyramid down from it, and their fusion.

    Args:
        in_channels: of each map.
        channels: of all that is computed here.
        pool_scales: sides of the grids to which the coarsest map is averaged.
        dropout: share of the channels that training drops before the classifier.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        num_classes: int,
        pool_scales: Sequence[int],
        dropout: float,
    ) -> None:
        super().__init__()
        *finer, coarsest = in_channels
        self.pool_scales = tuple(pool_scales)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), conv_norm(coarsest, channels, 1))
            for side in pool_scales
        )
        pooled = coarsest + len(pool_scales) * channels
        self.bottleneck = conv_norm(pooled, channels, 3)
        self.lateral_convs = nn.ModuleList(conv_norm(c, channels, 1) for c in finer)
        self.fpn_convs = nn.ModuleList(conv_norm(channels, channels, 3) for _ in finer)
        self.fpn_bottleneck = conv_norm(len(in_channels) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps [B, C, h, w] from fine to coarse, to logits [B, K, h, w] of the finest."""
        *finer, coarsest = maps
        pooled = [resize(pool(coarsest), coarsest.shape[2:]) for pool in self.psp_modules]
        x = self.bottleneck(torch.cat([coarsest, *pooled], dim=1))
        merged = [x]  # from coarse to fine
        for lateral, y in zip(reversed(self.lateral_convs), reversed(finer), strict=True):
            x = lateral(y) + resize(x, y.shape[2:])
            merged.append(x)
        *laterals, top = reversed(merged)
        outputs = [conv(y) for conv, y in zip(self.fpn_convs, laterals, strict=True)]
        size = maps[0].shape[2:]
        fused = self.fpn_bottleneck(torch.cat([resize(y, size) for y in [*outputs, top]], dim=1))
        return self.conv_seg(self.dropout(fused))


class FcnHead(nn.Module):
    """One 3 x 3 convolution and a classifier: the auxiliary head."""

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.convs = nn.Sequential(conv_norm(in_channels, channels, 3))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to logits [B, K, h, w]."""
        return self.conv_seg(self.dropout(self.convs(x)))


class UperNet(nn.Module):
    """An encoder, a neck, a UPer head, and an auxiliary head for training.

    Args:
        encoder: taken over: its head and final norms, of no use here, are removed. Its grid is that
            of the training crop; see `models_zoo.load_segmenter_encoder` for its weights.
        num_classes: K.
        encoder_arguments: of the encoder's constructor and `encoder_kind`, plain; None: a plain
            vision transformer, which is described by what it is.
        taps: four blocks, counted from 0, whose outputs are used, without a norm; the last is the
            encoder's last. None: a third, half, two thirds and all of the depth. Of an encoder in
            stages the four maps are used, each after a norm, and there are no taps.
        channels, aux_channels: of the two heads.
        aux_tap: the map of the pyramid, counted from 0, that the auxiliary head reads.
        dropout: of channels, before both classifiers, while training.
        pool_scales: of the pyramid pooling.
        relative_bias: a zero-initialised relative position bias in every block, as the public run.

    Attributes:
        grid, patch_size, in_chans: the encoder's.

    The neck makes maps at strides 4, 8, 16, 32 from patches of 16 pixels (x4, x2, x1, /2), of 8
    (x2 ... /4) or of 4 (x1 ... /8). The class token takes part in all blocks, as in
    mmsegmentation, and is no part of a map. BatchNorm is over all processes; the pool of 1 x 1
    needs two images in the global batch of a training step.

    Heads start as mmsegmentation's: convolutions from Kaiming's normal distribution (fan out),
    norms at 1 and 0, classifiers from N(0, .01); the neck as torch's transposed convolutions.

    Raises:
        BadInput: settings that do not fit each other.
    """

    def __init__(
        self,
        encoder: Any,
        num_classes: int,
        *,
        encoder_arguments: Mapping[str, Any] | None = None,
        taps: Sequence[int] | None = None,
        channels: int = 768,
        aux_channels: int = 256,
        aux_tap: int = 2,
        dropout: float = 0.1,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        relative_bias: bool = False,
    ) -> None:
        super().__init__()
        self.described = encoder_arguments
        stages = getattr(encoder, "feature_info", ()) if encoder_arguments is not None else ()
        if stages:
            taps = ()
        self.taps = tuple(choose_taps(len(encoder.blocks)) if taps is None else taps)
        if not stages:
            _check_taps(len(encoder.blocks), self.taps)
        _check(num_classes, channels, aux_channels, aux_tap, pool_scales)
        if relative_bias and encoder_arguments is not None:
            raise BadInput(
                "relative_bias is for plain vision transformers; this encoder has its own"
            )
        self.num_classes, self.aux_tap = num_classes, aux_tap
        self.grid, self.patch_size, self.in_chans = (
            encoder.grid,
            encoder.patch_size,
            encoder.in_chans,
        )
        # Left in, they would be parameters without a gradient, which distributed training refuses.
        encoder.head = encoder.norm = encoder.fc_norm = nn.Identity()
        encoder.num_classes = 0
        self.encoder = encoder
        widths = [encoder.num_features] * 4
        self.neck: Pyramid | StageNorms
        if stages:
            widths = [one["channels"] for one in stages]
            factors = [self.patch_size[0] / one["stride"][0] for one in stages]
            if len(widths) != 4:
                raise BadInput(f"UPerNet reads four maps, this encoder has {len(widths)} stages")
            self.neck = StageNorms(widths, factors)
        else:
            self.neck = Pyramid(widths[-1], choose_finest_scale(self.patch_size))
        self.decode_head = UperHead(widths, channels, num_classes, pool_scales, dropout)
        self.auxiliary_head = FcnHead(widths[aux_tap], aux_channels, num_classes, dropout)
        blocks = encoder.blocks if relative_bias else ()
        self.relative = nn.ModuleList(
            RelativeBias(encoder.grid, block.attn.num_heads) for block in blocks
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of images of any size.

        They are padded with zeros, right and below, to whole patches, and the logits cut back.

        Args:
            images: float [B, C, H, W], normalised.

        Returns:
            "logits" [B, K, ceil(H / S), ceil(W / S)] at the neck's finest stride S, 4 pixels for
            patches of 4, 8 and 16; while training also "aux", at the stride of the map it reads.
        """
        H, W = images.shape[2:]
        maps = self.neck(self.features(self._padded(images)))
        found = {"logits": self._cut(self.decode_head(maps), (H, W), 0)}
        if self.training:
            aux = self.auxiliary_head(maps[self.aux_tap])
            found["aux"] = self._cut(aux, (H, W), self.aux_tap)
        return found

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Logits at the images' resolution, float32 [B, K, H, W], for `util.measure.windows`.

        Resized bilinearly before the padding is cut off, so that nothing is shifted where H or W is
        not a multiple of the stride.
        """
        padded = self._padded(images)
        logits = self.decode_head(self.neck(self.features(padded)))
        return resize(logits.float(), padded.shape[2:])[:, :, : images.shape[2], : images.shape[3]]

    def features(self, images: Tensor) -> list[Tensor]:
        """The four maps before the neck, [B, D, gh, gw], of images in whole patches."""
        if self.described is not None:
            return self.encoder.pyramid(images, self.taps)
        biases: list[Callable[[], Tensor]] | None = None
        if len(self.relative):
            (ph, pw), (H, W) = self.patch_size, images.shape[2:]
            grid, tokens = (H // ph, W // pw), self.encoder.cls_tokens
            index_NN = relative_index(self.grid, grid, images.device, tokens)
            biases = [partial(bias, index_NN) for bias in self.relative]
        return self.encoder.forward_intermediates(
            images, indices=list(self.taps), intermediates_only=True, biases=biases
        )

    def _padded(self, images: Tensor) -> Tensor:
        (ph, pw), (H, W) = self.patch_size, images.shape[2:]
        return F.pad(images, (0, -W % pw, 0, -H % ph)) if H % ph or W % pw else images

    def _cut(self, x: Tensor, size: Pair, level: int) -> Tensor:
        """Leave out of a map what is of padding alone."""
        factor = self.neck.factors[level]
        h, w = (
            math.ceil(side * factor / patch)
            for side, patch in zip(size, self.patch_size, strict=True)
        )
        return x[:, :, :h, :w]

    def layer_groups(self) -> list[list[str]]:
        """Names of all parameters from input to output: embeddings, each block, neck and heads.

        Depth + 2 groups, of which layer decay takes the numbers 0 to depth + 1.
        """
        *early, _ = self.encoder.layer_groups()
        groups = [[f"encoder.{name}" for name in names] for names in early] + [[]]
        for name, _ in self.named_parameters():
            part, _, rest = name.partition(".")
            if part == "relative":
                groups[1 + int(rest.split(".")[0])].append(name)
            elif part != "encoder":
                groups[-1].append(name)
        return groups

    def no_weight_decay(self) -> set[str]:
        """Positions and class token, as the public run means it (its own name test misses them)."""
        if self.described is not None:
            return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}
        return {f"encoder.{name}" for name in ("pos_embed", "cls_token")}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the encoder's blocks again in the backward pass: less memory, same numbers."""
        self.encoder.set_grad_checkpointing(enable)

    def add_lscale(self, init: float = 1.0) -> None:
        """Give a vision transformer's branches trainable scales, where they have none."""
        if self.described is not None:
            raise BadInput(f"LScale is for plain vision transformers, not {type(self.encoder)}")
        for block in self.encoder.blocks:
            for name in ("ls1", "ls2"):
                if isinstance(getattr(block, name), nn.Identity):
                    scale = LayerScale(self.encoder.num_features, init)
                    setattr(block, name, scale.to(self.encoder.cls_token))

    @property
    def arguments(self) -> dict[str, Any]:
        """What makes a model of the same shape with `models_zoo.segmenter_from`; plain types."""
        encoder, head = self.encoder, self.decode_head
        heads = {
            "num_classes": self.num_classes,
            "taps": list(self.taps),
            "channels": head.conv_seg.in_channels,
            "aux_channels": self.auxiliary_head.conv_seg.in_channels,
            "aux_tap": self.aux_tap,
            "dropout": head.dropout.p,
            "pool_scales": list(head.pool_scales),
            "relative_bias": len(self.relative) > 0,
        }
        if self.described is not None:
            return {**self.described, **heads}
        block = encoder.blocks[-1]
        scaled = not isinstance(block.ls1, nn.Identity)
        several = {"cls_tokens": encoder.cls_tokens} if encoder.cls_tokens > 1 else {}
        return {
            **several,
            "img_size": list(encoder.img_size),
            "patch_size": list(encoder.patch_size),
            "in_chans": encoder.in_chans,
            "embed_dim": encoder.num_features,
            "depth": len(encoder.blocks),
            "num_heads": block.attn.num_heads,
            "mlp_ratio": block.mlp.fc1.out_features / encoder.num_features,
            "drop_path": round(float(getattr(block.drop_path1, "drop_prob", 0.0)), 6),
            # Which value they started from does not matter: scales come with the weights.
            "lscale_init": 1.0 if scaled else None,
            **heads,
        }


def choose_taps(depth: int) -> list[int]:
    """The four blocks, counted from 0, that are read in an encoder of some depth.

    Raises:
        BadInput: it has fewer than four.
    """
    if depth < 4:
        raise BadInput(f"UPerNet reads four blocks of an encoder, this one has {depth}")
    taps = [math.floor(depth * sixths / 6 + 0.5) - 1 for sixths in SIXTHS]
    for i in (2, 1, 0):  # of few blocks, each once
        taps[i] = min(taps[i], taps[i + 1] - 1)
    return taps


def choose_finest_scale(patch_size: Pair) -> int:
    """How many times as fine as the patches the neck's first map is, for a stride of about 4."""
    return min(FINEST, max(1, 2 ** round(math.log2(min(patch_size) / 4))))


def _check_taps(depth: int, taps: Sequence[int]) -> None:
    last = depth - 1
    if len(taps) != 4 or list(taps) != sorted(set(taps)) or taps[0] < 0 or taps[-1] != last:
        raise BadInput(
            f"taps {list(taps)} must be four blocks in order, counted from 0, of which the last is "
            f"the encoder's last, {last}; for example {choose_taps(last + 1)}"
        )


def _check(
    num_classes: int,
    channels: int,
    aux_channels: int,
    aux_tap: int,
    pool_scales: Sequence[int],
) -> None:
    if min(num_classes, channels, aux_channels, *pool_scales, 1) < 1 or not pool_scales:
        raise BadInput(
            f"num_classes {num_classes}, channels {channels}, aux_channels {aux_channels} and "
            f"pool_scales {list(pool_scales)} must each be at least 1"
        )
    if aux_tap not in range(4):
        raise BadInput(f"aux_tap {aux_tap} must be one of the four maps, 0 to 3")
