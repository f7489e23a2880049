"""The names that mmsegmentation gives to the tensors of a whole segmentor, both ways.

Neck and heads have mmsegmentation's names in ours too; the encoder's are changed as
`models_vit_names` does, with `backbone.` before them. Its backbone `MAE` always has
branch scales and relative position biases: a model without gets scales of 1 and biases of 0, the
same function.

The public run's own code (BEiT's and MAE's ADE20K repositories) has other names: the neck is
`backbone.fpn1` and `backbone.fpn2`, the scales are `gamma_1` and `gamma_2` beside timm's names.
These are read, not written.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from util.errors import BadInput
from util.spec import Pair
from util.styles import STYLES, Weights

HEADS = ("neck.", "decode_head.", "auxiliary_head.")
TABLE = "attn.relative_position_bias_table"
INDEX = "attn.relative_position_index"
NECK = {"backbone.fpn1.": "neck.upsample_4x.", "backbone.fpn2.": "neck.upsample_2x."}
SCALES = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
# Of `UperNet` beside its encoder; the other arguments of a segmenter are the encoder's.
SEGMENTER_ARGUMENTS = (
    "num_classes",
    "taps",
    "channels",
    "aux_channels",
    "aux_tap",
    "dropout",
    "pool_scales",
    "relative_bias",
)


def segmenter_to_mmseg(
    weights: Mapping[str, Tensor], grid: Pair, num_heads: int, index: Tensor
) -> Weights:
    """A segmenter of ours as a whole segmentor of mmsegmentation, every key that it expects.

    Args:
        weights: `UperNet`'s state dict.
        grid: (gh, gw) patches of its encoder. num_heads: of its attention.
        index: `models_layers.relative_index` of that grid, a buffer there.
    """
    encoder = {
        k.removeprefix("encoder."): v for k, v in weights.items() if k.startswith("encoder.")
    }
    width, kind = encoder["cls_token"].shape[-1], encoder["cls_token"].dtype
    named = {f"backbone.{k}": v for k, v in STYLES["mmseg"].write(encoder).items()}
    rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
    for number in range(len({key.split(".")[1] for key in encoder if key.startswith("blocks.")})):
        layer = f"backbone.layers.{number}"
        for scale in SCALES:
            named.setdefault(f"{layer}.{scale}", torch.ones(width, dtype=kind))
        table = weights.get(f"relative.{number}.table")
        named[f"{layer}.{TABLE}"] = torch.zeros(rows, num_heads) if table is None else table
        named[f"{layer}.{INDEX}"] = index
    return named | {k: v for k, v in weights.items() if k.startswith(HEADS)}


def is_mmseg_segmenter(weights: Mapping[str, Any]) -> bool:
    """Whether these are the names of a UPerNet of mmsegmentation, or of the public run.

    Of segmentors with other heads only the backbone is of use to us.
    """
    return "decode_head.fpn_bottleneck.conv.weight" in weights and any(
        key.startswith("backbone.") for key in weights
    )


def is_segmenter(weights: Mapping[str, Any]) -> bool:
    """Whether these are the names of a segmenter of ours."""
    return "decode_head.conv_seg.weight" in weights and any(
        key.startswith("encoder.") for key in weights
    )


def encoder_of_segmenter(weights: Mapping[str, Tensor], source: str) -> tuple[Weights, list[str]]:
    """The encoder alone of a segmenter of ours, and what was left out.

    Raises:
        BadInput: relative position biases that learned something, for which it has no place.
    """
    learned = [k for k, v in weights.items() if k.startswith("relative.") and v.any()]
    if learned:
        raise BadInput(
            f"{source} has relative position biases ({learned[0]}) that are not zero; without them "
            "its encoder would compute something else, and an encoder alone has no place for them"
        )
    encoder = {
        k.removeprefix("encoder."): v for k, v in weights.items() if k.startswith("encoder.")
    }
    heads = sum(k.startswith(HEADS) for k in weights)
    return encoder, [f"the segmenter's heads are left out ({heads} tensors)"]


def segmenter_from_mmseg(
    weights: Mapping[str, Tensor],
    source: str,
    *,
    scales: bool | None = None,
    biases: bool | None = None,
) -> Weights:
    """A whole segmentor, in the names of `UperNet`.

    Args:
        source: the file's name, for messages.
        scales, biases: whether the model has branch scales and relative biases. None, for a file
            that does not say: if any scale is not 1, any bias not 0. Left out they were the same
            function.

    Raises:
        BadInput: two tensors for one of ours.
    """
    plain, found = dict[str, Tensor](), dict[str, Tensor]()
    for key, tensor in weights.items():
        for theirs, ours in NECK.items():
            if key.startswith(theirs):
                found[ours + key.removeprefix(theirs)] = tensor
        if key.startswith(HEADS):
            found[key] = tensor
        elif table := re.fullmatch(rf"backbone\.(?:layers|blocks)\.(\d+)\.{TABLE}", key):
            found[f"relative.{table[1]}.table"] = tensor
        elif key.startswith("backbone.") and not key.startswith((*NECK, "backbone.fpn")):
            block = re.fullmatch(r"(backbone\.blocks\.\d+\.)(gamma_[12])", key)
            plain[f"{block[1]}{SCALES[block[2]]}" if block else key] = tensor
    encoder, _ = STYLES["mmseg"].read(plain, source)
    gammas = {k: v for k, v in encoder.items() if k.endswith(tuple(SCALES.values()))}
    tables = {k: v for k, v in found.items() if k.startswith("relative.")}
    for learned, asked, parts, home in (
        (any((gamma != 1).any() for gamma in gammas.values()), scales, gammas, encoder),
        (any(table.any() for table in tables.values()), biases, tables, found),
    ):
        if not learned and not asked:
            for key in parts:
                del home[key]
    return {f"encoder.{k}": v for k, v in encoder.items()} | found


def segmenter_arguments(weights: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """What the shapes say of `UperNet`'s arguments; weights in its names.

    Taps, and scales of pooling other than 1 2 3 6, cannot be seen; nor can the number of heads of
    attention without relative biases.

    Raises:
        BadInput: no UPerNet, or positions that are not of a square grid.
    """
    try:
        projection = weights["encoder.patch_embed.proj.weight"]
        hidden = weights["encoder.blocks.0.mlp.fc1.weight"]
        tokens = weights["encoder.cls_token"].shape[1]
        patches = weights["encoder.pos_embed"].shape[1] - tokens
        classes, channels = weights["decode_head.conv_seg.weight"].shape[:2]
        aux_channels = weights["auxiliary_head.conv_seg.weight"].shape[1]
    except KeyError as missing:
        raise BadInput(f"{source} holds no UPerNet: {missing} is not there") from None
    D, in_chans, ph, pw = projection.shape
    side = round(patches**0.5)
    if side * side != patches:
        raise BadInput(
            f"{source} has positions for {patches} patches, which is no square grid, and does not "
            "say its image size"
        )
    pools = len({k.split(".")[2] for k in weights if k.startswith("decode_head.psp_modules.")})
    if pools != 4:
        raise BadInput(f"{source} pools to {pools} grids and does not say which; expected four")
    table = weights.get("relative.0.table")
    found = {
        "img_size": [side * ph, side * pw],
        "patch_size": [ph, pw],
        "in_chans": in_chans,
        "embed_dim": D,
        "depth": len({k.split(".")[2] for k in weights if k.startswith("encoder.blocks.")}),
        "mlp_ratio": hidden.shape[0] / D,
        "lscale_init": 1.0 if "encoder.blocks.0.ls1.gamma" in weights else None,
        "num_classes": classes,
        "channels": channels,
        "aux_channels": aux_channels,
        "relative_bias": table is not None,
    }
    if tokens > 1:
        found["cls_tokens"] = tokens
    return found if table is None else found | {"num_heads": table.shape[1]}
