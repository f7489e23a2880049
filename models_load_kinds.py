"""Encoders that are no plain vision transformers, from what a file of weights holds."""

import re
from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any

from torch import nn

from models_protocols import PretrainModel
from models_registry import CLASSIFIERS, ENCODER_KINDS, MODELS
from util.errors import BadInput
from util.spec import EncoderState, Pair
from util.train.checkpoint import load_weights
from util.weights.assumed import ASSUMED
from util.weights.convert import HEAD_KEYS, NORM_KEYS, PLACE
from util.weights.load_table import LOADED, Loading
from util.weights.nested_weights import NestedWeights

# The linear layer of a head, without and with a probe's BatchNorm before it.
HEAD_WEIGHTS = ("head.weight", "head.1.weight")


def head_rows(weights: Mapping[str, Any]) -> int:
    """Outputs of the head among an encoder's weights, 0: it has none."""
    return next((len(weights[name]) for name in HEAD_WEIGHTS if name in weights), 0)


def with_defaults(encoder: type[Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a constructor, with those that it would take where nothing is said."""
    known = signature(encoder).parameters.values()
    usual = {p.name: p.default for p in known if p.default is not Parameter.empty}
    return usual | dict(arguments)


def cut_depth(arguments: Mapping[str, Any], blocks: int | None, path: str) -> dict[str, Any]:
    """`depth` of an encoder of its first so many blocks; None: as it is.

    Raises:
        BadInput: it has fewer.
    """
    if blocks is None:
        return {}
    if blocks > arguments["depth"]:
        raise BadInput(f"--probe_block {blocks}: {path} has {arguments['depth']} blocks")
    return {"depth": blocks}


def first_blocks(weights: Mapping[str, Any], blocks: int | None) -> dict[str, Any]:
    """Weights without the blocks from `blocks` on, and without the norm behind the last."""
    if blocks is None:
        return dict(weights)
    numbers = {name: re.match(r"blocks\.(\d+)\.", name) for name in weights}
    return {
        name: weights[name]
        for name, found in numbers.items()
        if not name.startswith(tuple(NORM_KEYS.values())) and (not found or int(found[1]) < blocks)
    }


def load_kind(
    state: dict[str, Any],
    path: str,
    name: str | None,
    head: str,
    img_size: Pair | None,
    pos_resize: str,
    num_heads: int | None,
    blocks: int | None,
    overrides: Mapping[str, Any],
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """`models_load.build_classifier` for an encoder that is no plain vision transformer."""
    kind = state["encoder_kind"]
    encoder = ENCODER_KINDS.find(kind)
    stored = dict(state["model_args"])
    if num_heads is not None:
        raise BadInput(f"--num_heads with {path}: an encoder of kind {kind} says its own sizes")
    check_kind(name, kind, stored, path)
    classes = head_rows(state["model"])
    if head == "own" and not classes:
        raise BadInput(f"{path} holds no classification head; fine-tune it first (--finetune)")
    arguments = with_defaults(encoder, encoder.fit_arguments(stored, img_size))
    arguments |= {"probe": "head.1.weight" in state["model"], "num_classes": classes}
    if head == "none":
        arguments |= {"num_classes": 0, "probe": False}
    arguments |= {k: v for k, v in overrides.items() if v is not None}
    if blocks is not None and not encoder.plain_blocks:
        raise BadInput(f"--probe_block with {path}: the blocks of a {kind} are of several widths")
    arguments |= cut_depth(arguments, blocks, path)
    arguments = {k: list(v) if isinstance(v, tuple) else v for k, v in arguments.items()}
    model = encoder(**arguments)
    weights, fitted = model.fit_weights(state["model"], stored, pos_resize)
    weights = first_blocks(weights, blocks)
    own, loading = model.state_dict(), Loading(fitted=fitted)
    if head != "own":
        # Behind a block in the middle, and in a segmenter, no norm was trained.
        normless = blocks is not None or state.get("style") == "segmenter"
        fresh = (*HEAD_KEYS, *(NORM_KEYS.values() if normless else [NORM_KEYS["avg"]]))
        weights = {k: v for k, v in weights.items() if not k.startswith(HEAD_KEYS)}
        loading.new = [k for k in own if k.startswith(fresh) and k not in weights]
        weights |= {k: own[k] for k in loading.new}
    load_weights(model, weights, path)
    gone = (k for k in state["model"] if k not in weights or k in loading.new)
    loading.left = [k for k in gone if k not in model.moved]
    state |= {ASSUMED: state.get("assumed", []), LOADED: loading.lines(model, state)}
    if head != "new" and "norm_eps" in state:
        match_eps(model, state["norm_eps"])
    return model, arguments, state


def build_of_kind(
    state: dict[str, Any], path: str, name: str | None
) -> tuple[PretrainModel, dict[str, Any]]:
    """`models_load.build_autoencoder` for an encoder that is no plain vision transformer.

    Raises:
        BadInput: the file holds no whole model, or one of another name.
    """
    model = find_whole(state)
    if model is None:
        raise BadInput(
            f"{path} holds an encoder of kind {state['encoder_kind']} and nothing that predicts: "
            "encoder-only weights cannot reconstruct; use a pretraining checkpoint"
        )
    if name is not None and not isinstance(model, MODELS.find(name)[0]):
        raise BadInput(f"{path} holds a {type(model).__name__}, not a {name}; leave --model out")
    if "norm_eps" in state:
        match_eps(model, state["norm_eps"])
    return model, state | {ASSUMED: state.get("assumed", []), LOADED: []}


def find_whole(state: Mapping[str, Any]) -> PretrainModel | None:
    """The model of a file that holds what predicts beside such an encoder; None: it does not."""
    place: NestedWeights | None = state.get(PLACE)
    found = EncoderState(state["encoder_kind"], state["model_args"], state["model"])
    kinds = dict.fromkeys(kind for kind, _ in MODELS.values())
    rest = {} if place is None else {**place.weights, **place.beside}
    return next((m for kind in kinds if (m := kind.from_encoder(found, rest)) is not None), None)


def check_kind(name: str | None, kind: str, stored: Mapping[str, Any], path: str) -> None:
    """Refuse a name of another kind of encoder, or of other sizes."""
    if name is None:
        return
    known, expected = CLASSIFIERS.find(name)
    if known is not ENCODER_KINDS[kind]:
        raise BadInput(f"{path} holds an encoder of kind {kind}, and {name} is none; leave it out")
    differing = [
        f"{key} {stored[key]}, {name} has {value}"
        for key, value in expected.items()
        if key in stored.keys() - {"img_size", "window_size"} and not alike(stored[key], value)
    ]
    if differing:
        raise BadInput(
            f"{path} has a different architecture: {'; '.join(differing)}; leave --model out to "
            "take the file's"
        )


def alike(one: Any, other: Any) -> bool:
    """Whether two arguments mean the same: a side may be given once or twice."""
    lists = [list(v) if isinstance(v, tuple | list) else [v] for v in (one, other)]
    longest = max(map(len, lists))
    return len({tuple(v * longest if len(v) == 1 else v) for v in lists}) == 1


def match_eps(model: nn.Module, eps: float) -> None:
    """Give the LayerNorms the epsilon of the file, where it is not MAE's."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
