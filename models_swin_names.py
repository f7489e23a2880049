"""The names that Swin's own code, SimMIM's, timm and transformers give to a Swin's tensors.

Ours are timm's, but for the head. The official code merges patches at the end of a stage, timm at
the start of the next.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from util.errors import BadInput
from util.styles import (
    PARTS,
    PARTS_IN_MEMORY,
    Style,
    Weights,
    fuse,
    make_labels,
    read_labels,
    read_sizes,
    split,
    translate,
)

TABLE = "attn.relative_position_bias_table"
FIRST_TABLE = f"layers.0.blocks.0.{TABLE}"
# What can be made again, and a pretraining's token, which no image's features depend on.
UNUSED = {r".*\.(relative_position_index|attn_mask)": None, r"(encoder\.)?mask_token": None}


# ---- timm, and the official code -----------------------------------------------------------------


def from_timm(weights: Mapping[str, Tensor], source: str) -> tuple[Weights, list[str]]:
    """timm's Swin in our names."""
    return translate(weights, {**UNUSED, r"head\.fc\.(.+)": r"head.\1"}), []


def to_timm(weights: Mapping[str, Tensor]) -> Weights:
    """Ours in timm's names."""
    return translate(weights, {r"head\.(weight|bias)": r"head.fc.\1"})


def from_official(weights: Mapping[str, Tensor], source: str) -> tuple[Weights, list[str]]:
    """Swin's and SimMIM's own code in our names."""
    moved = {f"layers.{s}.downsample.": f"layers.{s + 1}.downsample." for s in range(9)}
    named = translate(weights, UNUSED)
    return {_moved(name, moved): tensor for name, tensor in named.items()}, []


def to_official(weights: Mapping[str, Tensor]) -> Weights:
    """Ours in the names of Swin's and SimMIM's own code."""
    moved = {f"layers.{s + 1}.downsample.": f"layers.{s}.downsample." for s in range(9)}
    return {_moved(name, moved): tensor for name, tensor in weights.items()}


def _moved(name: str, moved: Mapping[str, str]) -> str:
    old = next((old for old in moved if name.startswith(old)), None)
    return name if old is None else moved[old] + name.removeprefix(old)


def infer(weights: Mapping[str, Tensor], source: str) -> tuple[dict[str, Any], list[str]]:
    """A Swin's arguments by the shapes of its weights; and what these do not say.

    Raises:
        BadInput: they are no Swin's.
    """
    projection, table = weights.get("patch_embed.proj.weight"), weights.get(FIRST_TABLE)
    hidden = weights.get("layers.0.blocks.0.mlp.fc1.weight")
    if projection is None or table is None or hidden is None or projection.ndim != 4:
        raise BadInput(
            f"{source} holds no Swin in timm's or its own names (patch_embed.proj, {FIRST_TABLE} "
            "...)"
        )
    blocks: dict[int, set[int]] = {}
    for name in weights:
        part, stage, kind, number = [*name.split("."), "", "", ""][:4]
        if part == "layers" and kind == "blocks":
            blocks.setdefault(int(stage), set()).add(int(number))
    tables = [weights.get(f"layers.{s}.blocks.0.{TABLE}") for s in range(len(blocks))]
    if sorted(blocks) != list(range(len(blocks))) or any(t is None for t in tables):
        raise BadInput(f"{source} lacks stages, or their first blocks, of a Swin")
    rows, patch = table.shape[0], projection.shape[2]
    window = (math.isqrt(rows) + 1) // 2
    if (2 * window - 1) ** 2 != rows:
        raise BadInput(f"{source} has {FIRST_TABLE} of {rows} rows, which no square window has")
    # Published models end in one window: 7 for 224 pixels, 6 for 192.
    last = tables[-1]
    assert last is not None
    side = (math.isqrt(last.shape[0]) + 1) // 2 * patch * 2 ** (len(blocks) - 1)
    arguments = {
        "img_size": [side, side],
        "patch_size": [patch, projection.shape[3]],
        "in_chans": projection.shape[1],
        "embed_dim": projection.shape[0],
        "depths": [len(blocks[s]) for s in sorted(blocks)],
        "num_heads": [t.shape[1] for t in tables if t is not None],
        "window_size": window,
        "mlp_ratio": hidden.shape[0] / projection.shape[0],
    }
    return arguments, [f"images of {side} x {side} (its last map is one window)"]


# ---- transformers --------------------------------------------------------------------------------

QKV = tuple(f"attention.self.{part}" for part in ("query", "key", "value"))
QKV_IN_MEMORY = tuple(f"attention.{part}_proj" for part in "qkv")
OUTSIDE = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "patch_embed.norm": "embeddings.norm",
    "norm": "layernorm",
}
BLOCK = r"encoder\.layers\.(\d+)\.blocks\.(\d+)\."


def from_transformers(weights: Mapping[str, Tensor], source: str) -> tuple[Weights, list[str]]:
    """Swin of transformers, with or without its head, in our names."""
    named = translate(weights, {r"swin\.(.+)": r"\1"})
    rules: dict[str, str | None] = {r"embeddings\.mask_token": None, r"decoder\.0\..+": None}
    for ours, theirs in OUTSIDE.items():
        rules[rf"{theirs}\.(weight|bias)"] = rf"{ours}.\1"
    for names in (PARTS, PARTS_IN_MEMORY):
        for ours, theirs in names.items():
            rules[rf"{BLOCK}{theirs}\.(weight|bias)"] = rf"layers.\1.blocks.\2.{ours}.\3"
    table = r"attention\.(?:self|relative_position_bias)\.relative_position_bias_table"
    rules[BLOCK + table] = rf"layers.\1.blocks.\2.{TABLE}"
    rules[rf"{BLOCK}attn\.(qkv\..+)"] = r"layers.\1.blocks.\2.attn.\3"
    rules[r"encoder\.layers\.(\d+)\.downsample\.(.+)"] = r"layers.\1.downsample.\2"
    rules[r"classifier\.(.+)"] = r"head.\1"
    rules |= UNUSED
    for kind in ("weight", "bias"):
        for parts in (QKV, QKV_IN_MEMORY):
            named = fuse(named, [f"{part}.{kind}" for part in parts], f"attn.qkv.{kind}")
    return from_official(translate(named, rules), source)


def to_transformers(weights: Mapping[str, Tensor]) -> Weights:
    """Ours in the names of transformers' files."""
    named = to_official(weights)
    rules: dict[str, str | None] = {}
    for ours, theirs in OUTSIDE.items():
        rules[rf"{ours}\.(weight|bias)"] = rf"swin.{theirs}.\1"
    block = r"layers\.(\d+)\.blocks\.(\d+)\."
    for ours, theirs in (PARTS | {"attn.qkv": "attn.qkv"}).items():
        rules[rf"{block}{ours}\.(weight|bias)"] = rf"swin.encoder.layers.\1.blocks.\2.{theirs}.\3"
    rules[block + TABLE] = (
        r"swin.encoder.layers.\1.blocks.\2.attention.self.relative_position_bias_table"
    )
    rules[r"layers\.(\d+)\.downsample\.(.+)"] = r"swin.encoder.layers.\1.downsample.\2"
    rules[r"head\.(.+)"] = r"classifier.\1"
    rules["mask_token"] = "swin.embeddings.mask_token"
    named = translate(named, rules)
    for kind in ("weight", "bias"):
        named = split(named, f"attn.qkv.{kind}", [f"{part}.{kind}" for part in QKV])
    return named


CONFIG_NAMES = {
    "patch_size": "patch_size",
    "in_chans": "num_channels",
    "embed_dim": "embed_dim",
    "depths": "depths",
    "num_heads": "num_heads",
    "window_size": "window_size",
    "mlp_ratio": "mlp_ratio",
    "img_size": "image_size",
}


FIXED = {
    "model_type": "swin",
    "hidden_act": "gelu",
    "qkv_bias": True,
    "use_absolute_embeddings": False,
}


def make_config(
    arguments: Mapping[str, Any], eps: float, classes: list[str] | None
) -> dict[str, Any]:
    """transformers' config.json.

    Args:
        arguments: of `SwinTransformer`. classes: names for id2label; None: numbers.
    """
    (h, w), (ph, pw) = arguments["img_size"], arguments["patch_size"]
    return {
        "architectures": [
            "SwinForImageClassification" if arguments["num_classes"] else "SwinModel"
        ],
        "model_type": "swin",
        **{theirs: arguments[ours] for ours, theirs in CONFIG_NAMES.items()},
        "patch_size": ph if ph == pw else [ph, pw],
        "image_size": h if h == w else [h, w],
        "hidden_act": "gelu",
        "qkv_bias": True,
        "use_absolute_embeddings": False,
        "layer_norm_eps": eps,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "encoder_stride": ph * 2 ** (len(arguments["depths"]) - 1),
        **make_labels(classes, arguments["num_classes"]),
    }


def read_config(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What a config.json of transformers says: `model_args`, `norm_eps`, and `classes`.

    Raises:
        BadInput: another kind of model, or one that ours cannot be.
    """
    arguments = read_sizes(config, source, CONFIG_NAMES, FIXED)
    found: dict[str, Any] = {"model_args": arguments, "encoder_kind": "swin"}
    if "layer_norm_eps" in config:
        found["norm_eps"] = config["layer_norm_eps"]
    return found | read_labels(config)


def list_maps(arguments: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(height, width) of each stage's map, in its patches."""
    (h, w), (ph, pw) = arguments["img_size"], arguments["patch_size"]
    return [
        (math.ceil(h / ph / 2**stage), math.ceil(w / pw / 2**stage))
        for stage in range(len(arguments["depths"]))
    ]


def smaller_maps(arguments: Mapping[str, Any]) -> str | None:
    """What transformers cannot have: tables of windows that a smaller map made smaller."""
    last, window = min(list_maps(arguments)[-1]), arguments["window_size"]
    if last < window and not arguments.get("pad_windows"):
        return f"a map of {last} patches is smaller than the windows of {window}"
    return one_window(arguments)


def one_window(arguments: Mapping[str, Any]) -> str | None:
    """What a segmenter's Swin does and other code does not: shift the windows of a map of one."""
    window = arguments["window_size"]
    if arguments.get("pad_windows") and min(map(min, list_maps(arguments))) <= window:
        smallest = min(map(min, list_maps(arguments)))
        return (
            f"it is a segmenter's, which shifts windows of {window} also in a map of {smallest} "
            "patches, where that program has one window that does not shift; a larger "
            "--input_size has no such map"
        )
    return None


def uneven_windows(arguments: Mapping[str, Any]) -> str | None:
    """What timm cannot have: maps that are padded before they are shifted."""
    window = arguments["window_size"]
    uneven = [side for sides in list_maps(arguments) for side in sides if side % window]
    if arguments.get("pad_windows") and uneven:
        return (
            f"it is a segmenter's, which pads a map of {uneven[0]} patches to whole windows of "
            f"{window} before it shifts them, and timm does after; an --input_size in whole "
            "windows has no such map"
        )
    return None


def timm_model(arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """timm's name of its base, and its settings."""
    names = ("embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "patch_size")
    settings = {name: arguments[name] for name in names}
    if arguments.get("pad_windows"):
        settings["always_partition"] = True
    return "swin_base_patch4_window7_224", {**settings, "global_pool": "avg"}


# ---- What reads and writes them ------------------------------------------------------------------


def is_transformers(weights: Mapping[str, Any]) -> bool:
    """Of transformers' Swin, with or without what stands before the names."""
    return any(".blocks.0.attention." in key for key in weights) and any(
        "embeddings.patch_embeddings.projection." in key for key in weights
    )


def is_swin(weights: Mapping[str, Any]) -> bool:
    """Of timm's names or the official ones."""
    return FIRST_TABLE in weights


def is_official(weights: Mapping[str, Any]) -> bool:
    """Of the official names: patches are merged at the end of the first stage."""
    return is_swin(weights) and any(key.startswith("layers.0.downsample.") for key in weights)


STYLES = {
    "transformers_swin": Style(
        is_transformers,
        from_transformers,
        to_transformers,
        read_config,
        make_config,
        "swin",
        infer,
        ("transformers",),
        pretraining="SwinForMaskedImageModeling",
        limit=smaller_maps,
    ),
    "official_swin": Style(
        is_official,
        from_official,
        to_official,
        kind="swin",
        infer=infer,
        programs=("official",),
        limit=one_window,
    ),
    "timm_swin": Style(
        is_swin,
        from_timm,
        to_timm,
        kind="swin",
        infer=infer,
        programs=("timm",),
        timm_model=timm_model,
        eps=1e-5,
        classifier="head.fc",
        limit=uneven_windows,
    ),
}
