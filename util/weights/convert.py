"""What files of other programs hold, as our encoders need it.

Every list of keys that a loading may leave out or add stands here. An encoder's names are timm's,
which the official MAE weights share; the others are in `util.styles`, each from the file of an
encoder's names.
"""

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from util.errors import BadInput
from util.mask.pos_embed import resize_table, sincos_2d
from util.spec import Pair
from util.styles import EPS, STYLES, Style, Weights
from util.weights.convert_upernet import (
    SEGMENTER_ARGUMENTS,
    encoder_of_segmenter,
    is_mmseg_segmenter,
    is_segmenter,
    segmenter_from_mmseg,
)
from util.weights.nested_weights import USUAL, NestedWeights, find_weights

# A masked autoencoder's own: no encoder has them.
PRETRAINING_KEYS = ("decoder_", "mask_token", "encoder_mask_token", "pos_phase", "pca.")
# Of a classifier that starts anew on pretrained weights.
HEAD_KEYS = ("head.",)
# The final norm before pooling is the class token's, the one after it the mean's: a model has one.
NORM_KEYS = {"avg": "fc_norm.", "cls": "norm."}
# Where in a file's contents, once read, the place of its weights stands.
PLACE = "place"
# What there is to say of the licence of its weights.
LICENCE = "licence"
# Of files that others wrote.
PIXIO_LICENCE = (
    "several class tokens, as Pixio's: the weights that its authors released are for "
    "non-commercial use (see their licence)"
)
# How far the stored code of an official file may be from the formula, to be taken for it.
CODE_TOLERANCE = 1e-5


@dataclass(frozen=True)
class EncoderWeights:
    """An encoder's weights, and what they say of themselves.

    Attributes:
        weights: by timm's names; without positions, and without what only pretraining needs.
        arguments: of the encoder, as far as the file says: img_size, patch_size, in_chans,
            embed_dim, depth, mlp_ratio, lscale_init, cls_tokens, and num_heads for files of ours.
        grid: (gh, gw) patches that the positions are of.
        table: [1, n + gh*gw, D] positions as stored, of n class tokens first.
        offset: pos_offset of a sin-cos code, which the table then is; None: a trained table.
        ours: whether the file says so itself; foreign codes are rescaled as MAE's code does.
        phase: [2, D / 4] of a learned offset, or None.
        classes: rows of the head, 0: none. probe: whether a BatchNorm comes before it.
        pool: avg | cls, which the norm tells.
        eps: of the LayerNorms; 1e-6 unless the file says otherwise, as those of transformers do.
        assumed: what the file does not say and is taken for granted, as words for the reader.
    """

    weights: Weights
    arguments: dict[str, Any]
    grid: Pair
    table: Tensor
    offset: str | None
    ours: bool
    phase: Tensor | None
    classes: int
    probe: bool
    pool: str
    eps: float
    assumed: list[str]

    def positions(self, to: Pair, resize: str) -> Tensor:
        """The positions on a grid: [1, n + gh*gw, D], float32.

        Args:
            resize: rescale: the image keeps its extent, so patches come closer or farther; extend:
                patches keep their distance. A table that is not our own code is rescaled as MAE's
                code does, bicubic and without antialiasing.

        Raises:
            BadInput: a trained table cannot be extended: nobody knows what is beyond its edge.
        """
        if self.offset is None or (resize == "rescale" and not self.ours):
            if resize == "extend" and tuple(to) != tuple(self.grid):
                raise BadInput(
                    f"--pos_resize extend from {self.grid} to {tuple(to)} patches needs a sin-cos "
                    "code; these positions were trained: use --pos_resize rescale"
                )
            return resize_table(self.table, self.grid, to)
        extent = self.grid if resize == "rescale" else None
        D = self.table.shape[-1]
        code = sincos_2d(D, to, self.offset, phase=self.phase, extent=extent)
        first = self.table[:, : self.table.shape[1] - math.prod(self.grid)]
        return torch.cat([first, code.unsqueeze(0).to(self.table.dtype)], dim=1)


def find_style(weights: Mapping[str, Any]) -> str:
    """Whose names these are: one of `STYLES`, or timm, which are the official code's and ours.

    Whole segmenters: segmenter is ours; public run has timm's names with mmsegmentation's heads.
    """
    for name, style in STYLES.items():
        if style.recognises(weights):
            return name
    if is_mmseg_segmenter(weights):
        return "public run"
    return "segmenter" if is_segmenter(weights) else "timm"


def in_our_names(
    state: Mapping[str, Any], source: str, key: str | None = None
) -> Mapping[str, Any]:
    """A file's contents with all its tensors under `model`, in our names.

    What else it holds stays, without other weights. `style` says whose names they were, `notes`
    what was left out, `PLACE` where in the file they are. What has been through here stays so.

    Args:
        key: which of several weights, see `find_weights`.

    Raises:
        BadInput: there are no weights, or some that fit nowhere.
    """
    if isinstance(state.get(PLACE), NestedWeights):
        return state
    place = find_weights(state, source, key)
    weights, notes = place.weights, list[str]()
    whole = [n for n, t in weights.items()
             if n.endswith((".weight", ".bias")) and not t.is_floating_point()]  # fmt: skip
    if whole:
        raise BadInput(
            f"{source} holds whole numbers where weights are expected ({whole[0]}, "
            f"{weights[whole[0]].dtype}): it is quantised, or of another kind; save the weights "
            "as they were before"
        )
    style = find_style(weights)
    if style in STYLES:
        weights, notes = STYLES[style].read(weights, source)
    elif style == "segmenter":
        weights, notes = encoder_of_segmenter(weights, source)
    elif style == "public run":
        weights, notes = encoder_of_segmenter(segmenter_from_mmseg(weights, source), source)
    rest = beside_weights(state, place)
    if style in STYLES and STYLES[style].kind != "vit":
        rest |= describe_kind(rest, STYLES[style], weights, source)
    elif style == "segmenter" and "encoder_kind" in rest.get("model_args", {}):
        unused = (*SEGMENTER_ARGUMENTS, "drop_path")
        arguments = {k: v for k, v in rest["model_args"].items() if k not in unused}
        rest |= {"encoder_kind": arguments.pop("encoder_kind"), "model_args": arguments}
    if "reg_token" in weights:
        weights = join_register_tokens(weights, source)
        notes.append("register tokens are class tokens here")
    tokens = weights.get("cls_token")
    several = tokens is not None and tokens.ndim == 3 and tokens.shape[1] > 1
    # A file of ours says its model's arguments beside weights in our names.
    ours = "task" in state or (style == "timm" and "model_args" in rest)
    if several and not ours:
        rest[LICENCE] = PIXIO_LICENCE
    return {**rest, "style": style, "notes": notes, PLACE: place, "model": weights}


def describe_kind(
    rest: Mapping[str, Any], style: Style, weights: Weights, source: str
) -> dict[str, Any]:
    """What a file of ours would say of an encoder that is no plain vision transformer.

    Args:
        rest: what the file says beside its weights. weights: in our names.
    """
    said: dict[str, Any] = {"encoder_kind": style.kind}
    if "model_args" not in rest:
        assert style.infer is not None
        said["model_args"], said["assumed"] = style.infer(weights, source)
    return said


def beside_weights(state: Mapping[str, Any], place: NestedWeights) -> dict[str, Any]:
    """What a file says beside its weights: without tensors, and without other weights than ours.

    Entries that mean something to us and have another type in another program's file are dropped.
    """
    addresses = place.others.values()
    gone = {*USUAL, *place.wrappers[:1]} | {name for address in addresses for name in address[:1]}
    if ("ema",) in addresses:
        gone.discard("ema")  # a fine-tuning's averages, which its evaluation measures too
    if not isinstance(found := state.get("model_args"), Mapping) or "patch_size" not in found:
        gone.add("model_args")  # another program's: ours always says it
    kinds = {"data": Mapping, "classes": list, "model_name": str | None}
    return {
        name: value
        for name, value in state.items()
        if name not in gone
        and not isinstance(value, Tensor)
        and isinstance(value, kinds.get(name, object))
    }


def read_encoder(
    state: Mapping[str, Any], source: str, img_size: Pair | None = None
) -> EncoderWeights:
    """The encoder in a file of ours, of the official MAE code, timm, mmsegmentation, transformers.

    Args:
        state: the file's contents.
        source: its name, for messages.
        img_size: (height, width) that the weights are of, for non-square files that do not say.

    Raises:
        BadInput: no vision transformer of that naming, or one whose positions fit no grid.
    """
    if (kind := state.get("encoder_kind", "vit")) != "vit":
        raise BadInput(
            f"{source} holds an encoder of kind {kind}; this takes vision transformers alone "
            "(main_finetune.py and main_knn.py take every kind)"
        )
    state = in_our_names(state, source)
    weights = dict(state["model"])
    projection, table = weights.get("patch_embed.proj.weight"), weights.pop("pos_embed", None)
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    hidden = weights.get("blocks.0.mlp.fc1.weight")
    ranks = [None if t is None else t.ndim for t in (projection, table, hidden)]
    if projection is None or table is None or hidden is None or ranks != [4, 3, 2]:
        raise BadInput(
            f"{source} holds no encoder in timm's names (patch_embed.proj, pos_embed, blocks.0 ...)"
            f"; its keys begin {', '.join(list(weights)[:4])}"
        )
    D, channels, *patch = projection.shape
    own = dict(state.get("model_args", {}))
    arguments = {
        "patch_size": tuple(patch),
        "in_chans": channels,
        "embed_dim": D,
        "depth": depth,
        "mlp_ratio": hidden.shape[0] / D,
        # Which value it started from does not matter: the scales come with the weights.
        "lscale_init": 1.0 if "blocks.0.ls1.gamma" in weights else None,
    }
    # What the file says goes before what is counted: a block that is missing is then missed.
    said = ("num_heads", "depth", "embed_dim", "mlp_ratio")
    arguments |= {name: own[name] for name in said if name in own}
    tokens = weights.get("cls_token")
    first = 1 if tokens is None or tokens.ndim != 3 else tokens.shape[1]
    if first > 1:
        arguments["cls_tokens"] = first
    count = table.shape[1] - first
    grid = infer_grid(count, (patch[0], patch[1]), own.get("img_size"), img_size)
    if grid is None and tokens is None:
        raise BadInput(
            f"{source} holds an encoder without a class token (no cls_token, positions for "
            f"{table.shape[1]} patches alone); ours have one, so its outputs would differ"
        )
    if grid is None:
        raise BadInput(
            f"{source} has positions for {count} patches, which is no square grid; "
            "give the --input_size that it was trained at"
        )
    arguments["img_size"] = (grid[0] * patch[0], grid[1] * patch[1])
    phase = weights.get("pos_phase")
    # A trained table of ours is no code, though its arguments name an offset.
    offset = None if own.get("positions") == "learned" else own.get("pos_offset")
    ours = offset is not None
    if offset is None and is_plain_code(table, grid):
        offset = "none"
    head = weights.get("head.weight", weights.get("head.1.weight"))
    # Segmenters' encoders have no final norm; a fresh one after pooling is the least change.
    normless = (
        state["style"] in ("mmseg", "segmenter", "public run") and "norm.weight" not in weights
    )
    return EncoderWeights(
        {k: v for k, v in weights.items() if not k.startswith(PRETRAINING_KEYS)},
        arguments,
        grid,
        table,
        offset,
        ours,
        phase,
        classes=0 if head is None else head.shape[0],
        probe="head.1.weight" in weights,
        pool="avg" if normless or "fc_norm.weight" in weights else "cls",
        eps=state.get("norm_eps", EPS),
        assumed=list_assumptions(state, arguments["img_size"]),
    )


def join_register_tokens(weights: Mapping[str, Tensor], source: str) -> Weights:
    """timm's class and register tokens as class tokens, where nothing reads the first alone.

    Raises:
        BadInput: the class token alone is read, or the register tokens have no positions.
    """
    joined = dict(weights)
    registers, first = joined.pop("reg_token"), joined.get("cls_token")
    table, count = joined.get("pos_embed"), 1 + registers.shape[1]
    patches = 0 if table is None else table.shape[1] - count
    if (
        first is None
        or "fc_norm.weight" not in joined
        or math.isqrt(max(patches, 0)) ** 2 != patches
    ):
        raise BadInput(
            f"{source} has {count - 1} register tokens (reg_token) beside its class token; ours "
            "hold such tokens where they have positions and the patches of a square image are "
            "pooled (fc_norm)"
        )
    return joined | {"cls_token": torch.cat([first, registers], dim=1)}


def list_assumptions(state: Mapping[str, Any], size: Pair) -> list[str]:
    """What is taken for granted of an encoder whose file has weights alone; heads apart.

    Args:
        size: (height, width) of the images that its positions are of.
    """
    if "model_args" in state:
        return []
    by = "square" if size[0] == size[1] else "by --input_size"
    texts = [f"images of {size[0]} x {size[1]} ({by}, from the count of positions)"]
    if "norm_eps" not in state:
        texts.append(f"LayerNorm eps {EPS:g}")
    return [*texts, "GELU"]


def infer_grid(count: int, patch: Pair, own_size: Any, hint: Pair | None) -> Pair | None:
    """(gh, gw) of `count` patches: by the file's own image size; or a square; or by the hint.

    None where none of these has that many.
    """
    side = math.isqrt(max(count, 0))
    sizes = [own_size] if own_size is not None else [(side * patch[0], side * patch[1]), hint]
    for size in sizes:
        height, width = (size, size) if isinstance(size, int) else size or (0, 0)
        grid = (height // patch[0], width // patch[1])
        if count > 0 and grid[0] * grid[1] == count:
            return grid
    return None


def is_plain_code(table: Tensor, grid: Pair) -> bool:
    """Whether a table is MAE's frozen sin-cos code, and not one that was trained.

    Args:
        table: [1, n + gh*gw, D], of n class tokens first.
    """
    if table.shape[-1] % 4:
        return False
    code = sincos_2d(table.shape[-1], grid)
    patches = table[0, table.shape[1] - math.prod(grid) :]
    return bool((patches.double() - code).abs().max() < CODE_TOLERANCE)


def read_flags(state: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that official files carry beside their weights, or none."""
    flags = state.get("args")
    return vars(flags) if isinstance(flags, argparse.Namespace) else {}
