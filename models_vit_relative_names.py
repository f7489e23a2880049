"""The names that transformers gives to a BEiT's tensors; ours are timm's and the official ones."""

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

TABLE = "relative_position_bias_table"
SHARED = f"rel_pos_bias.{TABLE}"
FIRST_TABLE = f"blocks.0.attn.{TABLE}"
UNUSED = {
    r".*\.(relative_position_index|k_bias)": None,
    r"(encoder\.|embeddings\.)?mask_token": None,
    r"lm_head\..+": None,
}


def from_timm(weights: Mapping[str, Tensor], source: str) -> tuple[Weights, list[str]]:
    """timm's BEiT, and the official code's, in our names.

    Raises:
        BadInput: it has absolute positions too, which ours has no place for.
    """
    if "pos_embed" in weights:
        raise BadInput(
            f"{source} has absolute positions (pos_embed) beside relative ones; ours has relative "
            "ones alone, so its outputs would differ"
        )
    return translate(weights, UNUSED), []


def infer(weights: Mapping[str, Tensor], source: str) -> tuple[dict[str, Any], list[str]]:
    """The arguments of `RelativeVisionTransformer` by the shapes of its weights.

    Raises:
        BadInput: they are no such model's.
    """
    projection = weights.get("patch_embed.proj.weight")
    table = weights.get(SHARED, weights.get(FIRST_TABLE))
    hidden = weights.get("blocks.0.mlp.fc1.weight")
    if projection is None or table is None or hidden is None or projection.ndim != 4:
        raise BadInput(
            f"{source} holds no vision transformer with relative positions in timm's names "
            f"(patch_embed.proj, {SHARED} or {FIRST_TABLE} ...)"
        )
    rows = table.shape[0] - 3
    side = (math.isqrt(max(rows, 0)) + 1) // 2
    if (2 * side - 1) ** 2 != rows:
        raise BadInput(f"{source} has a table of {rows + 3} relative positions: of no square grid")
    D, channels, ph, pw = projection.shape
    gamma = weights.get("blocks.0.gamma_1")
    arguments = {
        "img_size": [side * ph, side * pw],
        "patch_size": [ph, pw],
        "in_chans": channels,
        "embed_dim": D,
        "depth": len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        "num_heads": table.shape[1],
        "mlp_ratio": hidden.shape[0] / D,
        # Which value it started from does not matter: the scales come with the weights.
        "lscale_init": None if gamma is None else 0.1,
        "shared_bias": SHARED in weights,
        "global_pool": "avg" if "fc_norm.weight" in weights else "cls",
    }
    return arguments, []


SELF = "attention.attention"
QKV = tuple(f"{SELF}.{part}.weight" for part in ("query", "key", "value"))
QKV_IN_MEMORY = tuple(f"attention.{part}_proj.weight" for part in "qkv")
OUTSIDE = {
    "cls_token": "embeddings.cls_token",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "fc_norm": "pooler.layernorm",
}


def from_transformers(weights: Mapping[str, Tensor], source: str) -> tuple[Weights, list[str]]:
    """BEiT of transformers, with or without its head, in our names."""
    named = translate(weights, {r"beit\.(.+)": r"\1"})
    named = translate(named, {r"(?:encoder\.layer|layers)\.(\d+)\.(.+)": r"blocks.\1.\2"})
    for parts in (QKV, QKV_IN_MEMORY):
        named = fuse(named, parts, "attn.qkv.weight")
    rules: dict[str, str | None] = {}
    for ours, theirs in OUTSIDE.items():
        rules[rf"{theirs}(\.weight|\.bias|)"] = rf"{ours}\1"
    block = r"blocks\.(\d+)\."
    for names in (PARTS, PARTS_IN_MEMORY):
        for ours, theirs in names.items():
            rules[rf"{block}{theirs}\.(weight|bias)"] = rf"blocks.\1.{ours}.\2"
    for letter, word in (("q", "query"), ("v", "value")):
        theirs = rf"attention\.(?:attention\.{word}|{letter}_proj)\.bias"
        rules[block + theirs] = rf"blocks.\1.attn.{letter}_bias"
    rules[block + r"lambda_([12])"] = r"blocks.\1.gamma_\2"
    rules[rf"{block}attention\.(?:attention\.)?relative_position_bias\.{TABLE}"] = (
        rf"blocks.\1.attn.{TABLE}"
    )
    rules[rf"(?:encoder\.relative_position_bias|shared_position_bias)\.{TABLE}"] = SHARED
    rules[r"classifier\.(.+)"] = r"head.\1"
    return from_timm(translate(named, rules | UNUSED), source)


def to_transformers(weights: Mapping[str, Tensor]) -> Weights:
    """Ours in the names of transformers' files."""
    rules: dict[str, str | None] = {}
    for ours, theirs in OUTSIDE.items():
        rules[rf"{ours}(\.weight|\.bias|)"] = rf"beit.{theirs}\1"
    block, theirs_block = r"blocks\.(\d+)\.", r"beit.encoder.layer.\1."
    for ours, theirs in PARTS.items():
        rules[rf"{block}{ours}\.(weight|bias)"] = rf"{theirs_block}{theirs}.\2"
    for letter, word in (("q", "query"), ("v", "value")):
        rules[rf"{block}attn\.{letter}_bias"] = rf"{theirs_block}{SELF}.{word}.bias"
    rules[rf"{block}attn\.qkv\.weight"] = rf"{theirs_block}attn.qkv.weight"
    rules[block + r"gamma_([12])"] = rf"{theirs_block}lambda_\2"
    rules[rf"{block}attn\.{TABLE}"] = rf"{theirs_block}{SELF}.relative_position_bias.{TABLE}"
    rules[SHARED] = f"beit.encoder.relative_position_bias.{TABLE}"
    rules[r"head\.(.+)"] = r"classifier.\1"
    rules["mask_token"] = "beit.embeddings.mask_token"
    return split(translate(weights, rules), "attn.qkv.weight", QKV)


CONFIG_NAMES = {
    "patch_size": "patch_size",
    "in_chans": "num_channels",
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "img_size": "image_size",
    "mlp_ratio": "intermediate_size",
}


FIXED = {
    "model_type": "beit",
    "hidden_act": "gelu",
    "use_absolute_position_embeddings": False,
}


def make_config(
    arguments: Mapping[str, Any], eps: float, classes: list[str] | None
) -> dict[str, Any]:
    """transformers' config.json.

    Args:
        arguments: of `RelativeVisionTransformer`. classes: names for id2label; None: numbers.
    """
    (h, w), (ph, pw) = arguments["img_size"], arguments["patch_size"]
    shared = bool(arguments.get("shared_bias"))
    return {
        "architectures": [
            "BeitForImageClassification" if arguments["num_classes"] else "BeitModel"
        ],
        "model_type": "beit",
        **{theirs: arguments[ours] for ours, theirs in CONFIG_NAMES.items()},
        "patch_size": ph if ph == pw else [ph, pw],
        "image_size": h if h == w else [h, w],
        "intermediate_size": int(arguments["embed_dim"] * arguments["mlp_ratio"]),
        "hidden_act": "gelu",
        "layer_norm_eps": eps,
        "layer_scale_init_value": arguments["lscale_init"] or 0.0,
        "use_absolute_position_embeddings": False,
        "use_relative_position_bias": not shared,
        "use_shared_relative_position_bias": shared,
        "use_mean_pooling": arguments.get("global_pool", "avg") == "avg",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **make_labels(classes, arguments["num_classes"]),
    }


def read_config(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What a config.json of transformers says: `model_args`, `norm_eps`, and `classes`.

    Raises:
        BadInput: another kind of model, or one that ours cannot be.
    """
    arguments = read_sizes(config, source, CONFIG_NAMES, FIXED)
    arguments |= {
        "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
        "lscale_init": config.get("layer_scale_init_value") or None,
        "shared_bias": bool(config.get("use_shared_relative_position_bias")),
        "global_pool": "avg" if config.get("use_mean_pooling", True) else "cls",
    }
    found: dict[str, Any] = {"model_args": arguments, "encoder_kind": "vit_relative"}
    if "layer_norm_eps" in config:
        found["norm_eps"] = config["layer_norm_eps"]
    return found | read_labels(config)


def uneven_sides(arguments: Mapping[str, Any]) -> str | None:
    """What transformers cannot have: patches that are not square."""
    ph, pw = arguments["patch_size"]
    return None if ph == pw else f"its patches are {ph} x {pw}"


def timm_model(arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """timm's name of its base, and its settings."""
    names = ("embed_dim", "depth", "num_heads", "mlp_ratio", "patch_size")
    shared = bool(arguments.get("shared_bias"))
    return "beit_base_patch16_224", {
        **{name: arguments[name] for name in names},
        "init_values": arguments["lscale_init"],
        "use_rel_pos_bias": not shared,
        "use_shared_rel_pos_bias": shared,
        "global_pool": "token" if arguments.get("global_pool") == "cls" else "avg",
    }


def is_transformers(weights: Mapping[str, Any]) -> bool:
    """Of transformers' BEiT, with or without what stands before the names."""
    return any("embeddings.patch_embeddings.projection." in key for key in weights) and any(
        TABLE in key for key in weights
    )


def is_relative(weights: Mapping[str, Any]) -> bool:
    """Of timm's names, which are the official ones."""
    return SHARED in weights or FIRST_TABLE in weights


STYLES = {
    "transformers_beit": Style(
        is_transformers,
        from_transformers,
        to_transformers,
        read_config,
        make_config,
        "vit_relative",
        infer,
        ("transformers",),
        limit=uneven_sides,
    ),
    "beit": Style(
        is_relative,
        from_timm,
        dict,
        kind="vit_relative",
        infer=infer,
        programs=("timm", "official"),
        timm_model=timm_model,
    ),
}
