"""The names that mmsegmentation and transformers give to a vision transformer's tensors.

Ours are timm's and the official MAE code's. Reading is lenient: a key that no rule knows keeps its
name, so that the strict loading afterwards lists it beside what is missing.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from util.errors import BadInput
from util.styles import (
    PARTS,
    PARTS_IN_MEMORY,
    Style,
    Weights,
    make_labels,
    read_labels,
    read_sizes,
)

# ---- mmsegmentation ------------------------------------------------------------------------------
# Source: mmsegmentation's `tools/model_converters/beit2mmseg.py` and its backbones BEiT and MAE.

MMSEG_PARTS = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.qkv": "attn.qkv",
    "attn.proj": "attn.proj",
    "mlp.fc1": "ffn.layers.0.0",
    "mlp.fc2": "ffn.layers.1",
}
MMSEG_SCALES = {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}
# What stands beside the backbone in the file of a segmentor.
SEGMENTOR = ("decode_head.", "auxiliary_head.", "neck.")


def to_mmseg(weights: Mapping[str, Tensor]) -> Weights:
    """An encoder in mmsegmentation's names; LScale fits there as it is."""
    named = {}
    for key, tensor in weights.items():
        name = re.sub(r"^patch_embed\.proj\.", "patch_embed.projection.", key)
        name = re.sub(r"^norm\.", "ln1.", name)
        if block := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
            number, part = block.groups()
            module, _, kind = part.rpartition(".")
            theirs = MMSEG_SCALES.get(part) or f"{MMSEG_PARTS.get(module, module)}.{kind}"
            name = f"layers.{number}.{theirs}"
        named[name] = tensor
    return named


def from_mmseg(weights: Mapping[str, Tensor], source: str) -> tuple[Weights, list[str]]:
    """A backbone of mmsegmentation, alone or in a segmentor, in our names, and what was left out.

    Raises:
        BadInput: relative position biases that learned something, which our encoder has no place
            for; or two tensors for one of ours.
    """
    notes, backbone = [], {}
    heads = [k for k in weights if k.startswith(SEGMENTOR)]
    if heads:
        notes.append(f"the segmentor's heads are left out ({len(heads)} tensors)")
    for key, tensor in weights.items():
        name = key.removeprefix("backbone.")
        if key.startswith(SEGMENTOR) or name.endswith("relative_position_index"):
            continue
        if name.endswith("relative_position_bias_table"):
            if tensor.any():
                raise BadInput(
                    f"{source} has relative position biases ({key}) that are not zero; our encoder "
                    "has none, so its outputs would differ: only files without them fit"
                )
            continue
        backbone[name] = tensor
    parts = {theirs: ours for ours, theirs in (MMSEG_PARTS | MMSEG_SCALES).items()}
    pairs = []
    for name, tensor in backbone.items():
        ours = re.sub(r"^patch_embed\.projection\.", "patch_embed.proj.", name)
        ours = re.sub(r"^ln1\.", "norm.", ours)
        if block := re.fullmatch(r"layers\.(\d+)\.(.+)", ours):
            number, part = block.groups()
            module, _, kind = part.rpartition(".")
            known = parts.get(part) or (f"{parts[module]}.{kind}" if module in parts else part)
            ours = f"blocks.{number}.{known}" if known != part or module in parts else name
        pairs.append((ours, tensor))
    return _without_doubles(pairs, source), notes


def _without_doubles(pairs: Iterable[tuple[str, Tensor]], source: str) -> Weights:
    """One tensor for each name; copies may repeat, as in what `beit2mmseg.py` writes."""
    weights: Weights = {}
    for name, tensor in pairs:
        if name in weights and not torch.equal(weights[name], tensor):
            raise BadInput(
                f"{source} holds two different tensors for {name}: it mixes the names of several "
                "programs; give a file that one of them wrote"
            )
        weights[name] = tensor
    return weights


# ---- transformers --------------------------------------------------------------------------------

BLOCKS = re.compile(
    r"(?:(?:vit|pixio)\.)?(?P<encoder>encoder\.layer|layers)\.(?P<e>\d+)\.(?P<ep>.+)"
    r"\.(?P<ek>weight|bias)"
    r"|decoder\.(?P<decoder>decoder_layers|decoder_encoder\.layer)\.(?P<d>\d+)\.(?P<dp>.+)"
    r"\.(?P<dk>weight|bias)"
)
QKV = ("query", "key", "value")
OUTSIDE = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "head": "classifier",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
}
# What Pixio, which has several class tokens, calls otherwise in its files.
PIXIO_PARTS = {"norm1": "norm1", "norm2": "norm2"}
# Of models that we have no use for; no image's features depend on them.
UNUSED = re.compile(r"(vit\.)?(pooler\.dense\.(weight|bias)|embeddings\.mask_token)")


def to_transformers(weights: Mapping[str, Tensor]) -> Weights:
    """A plain model (no LScale, no phases, no probe) in the names of transformers' files.

    An encoder with several class tokens is a Pixio there.
    """
    pixio, named = weights["cls_token"].shape[1] > 1, {}
    parts = PARTS | (PIXIO_PARTS if pixio else {})
    for key, tensor in weights.items():
        module, _, kind = key.rpartition(".")
        block = re.fullmatch(r"(decoder_)?blocks\.(\d+)\.(.+)", module)
        if block is None:
            named[OUTSIDE[key] if key in OUTSIDE else f"{OUTSIDE[module]}.{kind}"] = tensor
            continue
        trunk = "decoder.decoder_layers" if block[1] else "vit.encoder.layer"
        if block[3] != "attn.qkv":
            named[f"{trunk}.{block[2]}.{parts[block[3]]}.{kind}"] = tensor
            continue
        for part, name in zip(tensor.chunk(3), QKV, strict=True):
            named[f"{trunk}.{block[2]}.attention.attention.{name}.{kind}"] = part
    return {k.removeprefix("vit."): v for k, v in named.items()} if pixio else named


def from_transformers(weights: Mapping[str, Tensor], source: str) -> tuple[Weights, list[str]]:
    """ViT, ViTMAE and Pixio of transformers, with or without head or decoder; and what was left
    out.
    """
    known_parts = (PARTS, PARTS_IN_MEMORY, PIXIO_PARTS)
    parts = {theirs: ours for known in known_parts for ours, theirs in known.items()}
    backbone = any(key.startswith("pixio.") for key in weights)
    outside = {theirs.removeprefix("vit."): ours for ours, theirs in OUTSIDE.items()}
    pairs, unused = [], []
    attention: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for key, tensor in weights.items():
        # A backbone of Pixio has a norm of its maps beside the encoder's own.
        if UNUSED.fullmatch(key) or (backbone and key.startswith("layernorm.")):
            unused.append(key)
            continue
        bare = key.removeprefix("vit.").removeprefix("pixio.")
        module, _, kind = bare.rpartition(".")
        if bare in outside or module in outside:
            pairs.append((outside.get(bare) or f"{outside[module]}.{kind}", tensor))
            continue
        found = BLOCKS.fullmatch(key)
        if found is None:
            pairs.append((key, tensor))
            continue
        trunk = "blocks" if found["encoder"] else "decoder_blocks"
        number, part, kind = (
            found[k] for k in (("e", "ep", "ek") if found["e"] else ("d", "dp", "dk"))
        )
        one = re.fullmatch(r"attention\.(?:attention\.(query|key|value)|([qkv])_proj)", part)
        if one is not None:
            fused = f"{trunk}.{number}.attn.qkv.{kind}"
            letter = (one[1] or one[2])[0]
            attention.setdefault(fused, {})[letter] = (key, tensor)
        else:
            known = parts.get(part)
            pairs.append((f"{trunk}.{number}.{known}.{kind}" if known else key, tensor))
    for fused, three in attention.items():
        tensors = [three[letter][1] for letter in "qkv" if letter in three]
        if len({t.shape for t in tensors}) == 1 and len(tensors) == 3:
            pairs.append((fused, torch.cat(tensors)))
        else:  # left as they are, for the loading to name them
            pairs += three.values()
    notes = [f"left out, for nothing depends on it: {', '.join(unused)}"] if unused else []
    return _without_doubles(pairs, source), notes


def make_config(
    arguments: Mapping[str, Any], eps: float, classes: list[str] | None
) -> dict[str, Any]:
    """transformers' config.json of a plain model.

    Args:
        arguments: of `MaskedAutoencoderViT` (it has decoder_embed_dim) or `VisionTransformer`; one
            with several class tokens is a Pixio, which has no head.
        classes: names for id2label; None: numbers.
    """
    decoder = "decoder_embed_dim" in arguments
    (h, w), (ph, pw) = arguments["img_size"], arguments["patch_size"]
    D, ratio = arguments["embed_dim"], arguments["mlp_ratio"]
    config = {
        "architectures": ["ViTMAEForPreTraining" if decoder else "ViTForImageClassification"],
        "model_type": "vit_mae" if decoder else "vit",
        "image_size": h if h == w else [h, w],
        "patch_size": ph if ph == pw else [ph, pw],
        "num_channels": arguments["in_chans"],
        "hidden_size": D,
        "num_hidden_layers": arguments["depth"],
        "num_attention_heads": arguments["num_heads"],
        "intermediate_size": int(D * ratio),
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": eps,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if (tokens := arguments.get("cls_tokens", 1)) > 1:
        del config["intermediate_size"]
        named = {"architectures": ["PixioModel"], "model_type": "pixio"}
        return config | named | {"mlp_ratio": int(ratio), "n_cls_tokens": tokens}
    if decoder:
        width = arguments["decoder_embed_dim"]
        return config | {
            "decoder_hidden_size": width,
            "decoder_num_hidden_layers": arguments["decoder_depth"],
            "decoder_num_attention_heads": arguments["decoder_num_heads"],
            "decoder_intermediate_size": int(width * ratio),
            "mask_ratio": 0.75,
            "norm_pix_loss": arguments["norm_pix_loss"],
        }
    return config | make_labels(classes, arguments["num_classes"])


def read_config(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What a config.json of transformers says of the model.

    Returns:
        `model_args` of our class, `norm_eps`, and `classes` where they have names.

    Raises:
        BadInput: another kind of model, or one that ours cannot be.
    """
    kind = config.get("model_type")
    if kind not in ("vit", "vit_mae", "pixio"):
        raise BadInput(
            f"{source} is a {kind} of transformers; expected vit, vit_mae or pixio "
            "(ViTMAEForPreTraining, ViTForImageClassification, or their encoders)"
        )
    names = {
        "img_size": "image_size",
        "patch_size": "patch_size",
        "in_chans": "num_channels",
        "embed_dim": "hidden_size",
        "depth": "num_hidden_layers",
        "num_heads": "num_attention_heads",
    }
    if kind == "vit_mae":
        names |= {
            "decoder_embed_dim": "decoder_hidden_size",
            "decoder_depth": "decoder_num_hidden_layers",
            "decoder_num_heads": "decoder_num_attention_heads",
            "norm_pix_loss": "norm_pix_loss",
        }
    hidden = "mlp_ratio" if kind == "pixio" else "intermediate_size"
    names |= {"mlp_ratio": hidden, "eps": "layer_norm_eps"}
    names |= {"cls_tokens": "n_cls_tokens"} if kind == "pixio" else {}
    # A file that does not say has transformers' defaults, which are ViT's too.
    arguments = read_sizes(config, source, names, {"hidden_act": "gelu", "qkv_bias": True})
    if kind != "pixio":
        arguments["mlp_ratio"] /= config["hidden_size"]
    found = {"norm_eps": arguments.pop("eps"), "model_args": arguments}
    return found | (read_labels(config) if kind == "vit" else {})


# ---- What reads and writes them ------------------------------------------------------------------


def is_transformers(weights: Mapping[str, Any]) -> bool:
    """Of ViT, ViTMAE or Pixio, with or without what stands before the names."""
    return any("embeddings.patch_embeddings.projection." in key for key in weights)


def is_mmseg(weights: Mapping[str, Any]) -> bool:
    """A backbone, alone or in a segmentor."""
    return any(k.removeprefix("backbone.").startswith("patch_embed.projection.") for k in weights)


TRANSFORMERS = Style(is_transformers, from_transformers, to_transformers, read_config, make_config)
MMSEG = Style(is_mmseg, from_mmseg, to_mmseg)
