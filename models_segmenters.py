"""Segmenters and files of weights: an encoder's into a segmenter, and whole ones, both ways."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models_layers import relative_index
from models_load_kinds import alike, check_kind
from models_upernet import UperNet
from models_zoo import model_arguments, segmenter_from, settle_heads
from util.errors import BadInput
from util.train.checkpoint import load_file, load_weights
from util.weights.assumed import ASSUMED
from util.weights.convert import (
    HEAD_KEYS,
    NORM_KEYS,
    PLACE,
    beside_weights,
    list_assumptions,
    read_encoder,
)
from util.weights.convert_upernet import (
    is_mmseg_segmenter,
    is_segmenter,
    segmenter_arguments,
    segmenter_from_mmseg,
    segmenter_to_mmseg,
)
from util.weights.files import load_state, weights_file
from util.weights.load_table import LOADED, Loading, positions_resized
from util.weights.nested_weights import find_weights


def load_segmenter_encoder(
    model: UperNet, path: str, pos_resize: str = "rescale", weights_key: str | None = None
) -> dict[str, Any]:
    """Give a segmenter the encoder of a file; neck, heads and relative biases stay as they are.

    Branch scales (LScale) come with the file. Where it has some and the model none, the model gets
    them, so load before the optimiser is made; where the model alone has them, they stay as they
    are, 1 as in the public run.

    Args:
        model: changed in place.
        path: pretraining, fine-tuning or segmentation checkpoint of ours, official MAE, timm,
            mmsegmentation, a folder of transformers, or an https URL;
            `util.weights.files.load_state`.
        pos_resize: rescale | extend: how its positions come to the grid of the model's crop, see
            `EncoderWeights.positions`.
        weights_key: which weights of a file that holds several, see `util.weights.nested_weights`.

    Returns:
        what else the file holds, with what was taken from it under `LOADED`.

    Raises:
        BadInput: unreadable, of another architecture, or weights that do not fit.
    """
    return build_segmenter_encoder(load_state(path, weights_key), model, path, pos_resize)


def build_segmenter_encoder(
    state: dict[str, Any], model: UperNet, path: str, pos_resize: str = "rescale"
) -> dict[str, Any]:
    """`load_segmenter_encoder` of what `load_state` has read."""
    if pos_resize not in ("rescale", "extend"):
        raise BadInput(f"unknown pos_resize {pos_resize!r}, choose from rescale, extend")
    if model.described is not None or state.get("encoder_kind", "vit") != "vit":
        return _load_kind(state, model, path, pos_resize)
    encoder = model.encoder
    stored = read_encoder(state, path, encoder.img_size)
    own = model.arguments
    said = stored.arguments | {"patch_size": list(stored.arguments["patch_size"])}
    differing = [
        f"{key} {said[key]}, the model has {own[key]}"
        for key in ("embed_dim", "depth", "num_heads", "patch_size", "in_chans", "mlp_ratio")
        if key in said and said[key] != own[key]
    ]
    tokens = said.get("cls_tokens", 1), encoder.cls_tokens
    if tokens[0] != tokens[1]:
        differing.append(f"{tokens[0]} class tokens, the model has {tokens[1]}")
    if differing:
        raise BadInput(f"{path} has a different architecture: {'; '.join(differing)}")
    weights: dict[str, Any] = {
        key: tensor
        for key, tensor in stored.weights.items()
        if not key.startswith((*HEAD_KEYS, *NORM_KEYS.values()))
    }
    weights["pos_embed"] = stored.positions(encoder.grid, pos_resize)
    loading = Loading(resized=positions_resized(encoder.grid, stored.grid, pos_resize))
    loading.left = [k for k in state["model"] if k not in weights]
    if stored.arguments["lscale_init"] is not None:
        model.add_lscale()
    else:
        scales = (".ls1.gamma", ".ls2.gamma")
        weights |= {k: v for k, v in encoder.state_dict().items() if k.endswith(scales)}
    load_weights(encoder, weights, path)
    taken = {f"encoder.{k}" for k in state["model"] if k in weights}
    loading.new = [k for k in model.state_dict() if k not in taken]
    state[LOADED] = loading.lines(model, state)
    return state


def _load_kind(state: dict[str, Any], model: UperNet, path: str, pos_resize: str) -> dict[str, Any]:
    """`build_segmenter_encoder` for encoders that are no plain vision transformers."""
    found, own = state.get("encoder_kind", "vit"), dict(model.described or {})
    kind = own.get("encoder_kind", "vit")
    if found != kind:
        raise BadInput(f"{path} holds an encoder of kind {found}, the model's is a {kind}")
    stored = dict(state["model_args"])
    free = ("encoder_kind", "img_size", "window_size", "pad_windows", "drop_path", "shared_bias")
    differing = [
        f"{key} {stored[key]}, the model has {own[key]}"
        for key in own
        if key in stored and key not in free and not alike(stored[key], own[key])
    ]
    if differing:
        raise BadInput(f"{path} has a different architecture: {'; '.join(differing)}")
    weights, fitted = model.encoder.fit_weights(state["model"], stored, pos_resize)
    unused = (*HEAD_KEYS, *NORM_KEYS.values())
    weights = {k: v for k, v in weights.items() if not k.startswith(unused)}
    load_weights(model.encoder, weights, path)
    taken = {f"encoder.{name}" for name in weights}
    loading = Loading(new=[name for name in model.state_dict() if name not in taken], fitted=fitted)
    moved = model.encoder.moved
    loading.left = [n for n in state["model"] if n not in weights and n not in moved]
    state[LOADED] = loading.lines(model, state)
    return state


def load_segmenter(
    path: str,
    name: str | None = None,
    num_heads: int | None = None,
    weights_key: str | None = None,
) -> tuple[UperNet, dict[str, Any]]:
    """A whole segmenter: a checkpoint of ours, or a file of mmsegmentation or of the public run.

    Args:
        path: file or https URL.
        name: model that it has to be, and whose number of attention heads a file has that does not
            say; None: whatever it is, with the usual number for its width.
        num_heads: of attention, for a file that does not say.
        weights_key: which weights of a file that holds several, see `util.weights.nested_weights`.

    Returns:
        the model, on the CPU; what else the file holds, with what was assumed of it under `ASSUMED`
        (see `util.weights.assumed.assumptions`) and what was taken from it under `LOADED`.

    Raises:
        BadInput: unreadable, of another architecture, or weights that do not fit.
    """
    state = load_file(weights_file(path))
    return build_segmenter(state, path, name, num_heads, weights_key)


def build_segmenter(
    state: Mapping[str, Any],
    path: str,
    name: str | None = None,
    num_heads: int | None = None,
    weights_key: str | None = None,
) -> tuple[UperNet, dict[str, Any]]:
    """`load_segmenter` of what was read."""
    place = find_weights(state, path, weights_key)
    weights, rest = place.weights, beside_weights(state, place)
    said = rest.get("model_args")
    if is_mmseg_segmenter(weights):
        has = said or {"lscale_init": None, "relative_bias": None}
        scales, biases = has["lscale_init"] is not None, has["relative_bias"]
        weights = segmenter_from_mmseg(weights, path, scales=scales, biases=biases)
    elif not is_segmenter(weights):
        raise BadInput(
            f"{path} holds no segmenter, neither ours nor mmsegmentation's; an encoder alone goes "
            "to --finetune"
        )
    arguments = dict(said or segmenter_arguments(weights, path))
    kind, assumed = arguments.get("encoder_kind"), list[str]()
    if kind is not None:
        check_kind(name, kind, arguments, path)
    else:
        arguments["num_heads"], assumed = settle_heads(arguments, path, name, num_heads)
    if said is None:
        assumed += list_assumptions(state, arguments["img_size"])
    model = segmenter_from(arguments)
    if name is not None and kind is None:
        _check_name(model, name, path)
    load_weights(model, weights, path)
    found = {**rest, PLACE: place, "style": "segmenter", "notes": []}
    return model, {**rest, ASSUMED: assumed, LOADED: Loading().lines(model, found)}


def to_mmseg_names(model: UperNet) -> dict[str, Tensor]:
    """The weights of a whole segmentor of mmsegmentation, to be saved as its `state_dict`.

    Raises:
        BadInput: it has no such model: for patches of 4, or that are not square.
    """
    if model.described is not None:
        raise BadInput(f"--to mmseg takes vision transformers alone, not {model.encoder.called}")
    if (tokens := model.encoder.cls_tokens) > 1:
        raise BadInput(f"mmsegmentation's backbones have one class token, this model {tokens}")
    (ph, pw), ratio = model.patch_size, model.arguments["mlp_ratio"]
    if ph != pw or ratio != int(ratio) or min(model.neck.factors) < 0.25:
        raise BadInput(
            f"mmsegmentation takes square patches of 8 pixels or more and a whole mlp_ratio, not "
            f"{(ph, pw)} and {ratio}"
        )
    weights = {k: v.detach() for k, v in model.state_dict().items()}
    heads: Any = model.encoder.blocks[0]
    index = relative_index(model.grid, model.grid)
    return segmenter_to_mmseg(weights, model.grid, heads.attn.num_heads, index)


def mmseg_config(model: UperNet) -> str:
    """The `model` of a config of mmsegmentation that takes `to_mmseg_names`, as Python text."""
    a, D = model.arguments, model.encoder.num_features
    last = f"num_classes={a['num_classes']}, dropout_ratio={a['dropout']}, align_corners=False"
    last += ", norm_cfg=dict(type='SyncBN')"
    backbone = (
        f"type='MAE', img_size={tuple(a['img_size'])}, patch_size={a['patch_size'][0]}, "
        f"in_channels={a['in_chans']}, embed_dims={D}, num_layers={a['depth']}, "
        f"num_heads={a['num_heads']}, mlp_ratio={int(a['mlp_ratio'])}, "
        f"out_indices={tuple(a['taps'])}, drop_path_rate={a['drop_path']}, init_values=1.0, "
        "norm_cfg=dict(type='LN', eps=1e-6)"
    )
    parts = {
        "backbone": backbone,
        "neck": f"type='Feature2Pyramid', embed_dim={D}, rescales={model.neck.factors}",
        "decode_head": f"type='UPerHead', in_channels={[D] * 4}, in_index=[0, 1, 2, 3], "
        f"pool_scales={tuple(a['pool_scales'])}, channels={a['channels']}, {last}",
        "auxiliary_head": f"type='FCNHead', in_channels={D}, in_index={a['aux_tap']}, "
        f"channels={a['aux_channels']}, num_convs=1, concat_input=False, {last}",
    }
    inside = ", ".join(f"{name}=dict({text})" for name, text in parts.items())
    return f"model=dict(type='EncoderDecoder', {inside})"


def holds_segmenter(state: Mapping[str, Any], path: str, weights_key: str | None = None) -> bool:
    """Whether a file holds a whole segmenter, of ours or of mmsegmentation."""
    weights = find_weights(state, path, weights_key).weights
    return is_segmenter(weights) or is_mmseg_segmenter(weights)


def _check_name(model: UperNet, name: str, path: str) -> None:
    expected, found = model_arguments(name), model.arguments
    expected["patch_size"] = [expected["patch_size"]] * 2
    differing = [
        f"{key} {found.get(key, 1)}, {name} has {expected.get(key, 1)}"
        for key in ("embed_dim", "depth", "num_heads", "patch_size", "cls_tokens")
        if found.get(key, 1) != expected.get(key, 1)
    ]
    if differing:
        raise BadInput(f"{path} has a different architecture: {'; '.join(differing)}")
