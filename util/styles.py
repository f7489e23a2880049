"""The names that other programs give to the tensors of our encoders.

The file of an encoder's names registers them here, and `util.weights` applies them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from util.errors import BadInput
from util.names import Registry

Weights = dict[str, Tensor]

EPS = 1e-6  # of MAE's LayerNorms; what other programs' files say goes before it


@dataclass(frozen=True)
class Style:
    """How a program names the tensors of one kind of encoder.

    Attributes:
        recognises: whether the keys of a file are its names. One key tells: of a file that mixes
            names, the others come out as unexpected when it is loaded.
        read: weights in our names, and what was left out, of weights and the file's name. A key
            that no rule knows keeps its name, so that the strict loading names it.
        write: weights of ours in its names.
        arguments: what its config.json says of the model (`model_args` of our class, and more), of
            the configuration and the file's name; None: it has no such file.
        config: that file, of our arguments, eps and names of classes.
        kind: of encoder, see `util.spec.EncoderState`.
        infer: for other kinds than vit, the constructor's arguments, of weights in our names, and
            what was assumed of them, of weights and the file's name.
        programs: that take what `write` gives, of timm, transformers and official.
        timm_model: the name and the settings of timm's model, of our arguments.
        eps: of LayerNorms in the program, where nothing is said.
        classifier: what the program calls the head.
        pretraining: transformers' class of the model with what predicts; None: it has none.
        limit: what of our arguments these programs have no place for; None: nothing.
    """

    recognises: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Tensor], str], tuple[Weights, list[str]]]
    write: Callable[[Mapping[str, Tensor]], Weights]
    arguments: Callable[[Mapping[str, Any], str], dict[str, Any]] | None = None
    config: Callable[[Mapping[str, Any], float, list[str] | None], dict[str, Any]] | None = None
    kind: str = "vit"
    infer: Callable[[Mapping[str, Tensor], str], tuple[dict[str, Any], list[str]]] | None = None
    programs: tuple[str, ...] = ()
    timm_model: Callable[[Mapping[str, Any]], tuple[str, dict[str, Any]]] | None = None
    eps: float = EPS
    classifier: str = "head"
    pretraining: str | None = None
    limit: Callable[[Mapping[str, Any]], str | None] = lambda arguments: None


# In the order in which a file is tried; what none recognises has our names, which are timm's.
STYLES: Registry[Style] = Registry("program that writes weights")


def find_writer(kind: str, program: str, arguments: Mapping[str, Any], source: str) -> Style:
    """The style in which a program takes a kind of encoder.

    Args:
        arguments: of the encoder. source: whose it is, for the message.

    Raises:
        BadInput: the program has no such model.
    """
    for style in STYLES.values():
        if style.kind == kind and program in style.programs:
            if (limit := style.limit(arguments)) is None:
                return style
            others = [
                other
                for found in STYLES.values()
                if found.kind == kind and found.limit(arguments) is None
                for other in found.programs
            ]
            raise BadInput(
                f"{program} cannot hold this model: {limit}; use --to "
                f"{', '.join([*others, 'onnx'])} or mmae"
            )
    raise BadInput(
        f"{source} holds an encoder of kind {kind}: {program} has no such model, and ours takes "
        "its checkpoint as it is"
    )


def translate(weights: Mapping[str, Tensor], rules: Mapping[str, str | None]) -> Weights:
    """Weights under other names.

    Args:
        rules: regular expressions that a whole name has to match, in order, and what it becomes;
            None: it is left out. A name that none matches stays.
    """
    named: Weights = {}
    for name, tensor in weights.items():
        for rule, to in rules.items():
            if (match := re.fullmatch(rule, name)) is not None:
                if to is not None:
                    named[match.expand(to)] = tensor
                break
        else:
            named[name] = tensor
    return named


def fuse(weights: Mapping[str, Tensor], parts: Sequence[str], whole: str) -> Weights:
    """Tensors that another program keeps apart, in one: query, key and value.

    Args:
        parts: how their names end, each after what they have in common.
        whole: how the name of all ends. Parts that do not make one stay as they are, for the
            loading to name them.
    """
    fused = dict(weights)
    for name in [name for name in weights if name.endswith(parts[0])]:
        stem = name.removesuffix(parts[0])
        tensors = [weights.get(stem + part) for part in parts]
        found = [t for t in tensors if t is not None]
        if len(found) == len(parts) and len({t.shape for t in found}) == 1:
            for part in parts:
                del fused[stem + part]
            fused[stem + whole] = torch.cat(found)
    return fused


def split(weights: Mapping[str, Tensor], whole: str, parts: Sequence[str]) -> Weights:
    """The contrary of `fuse`."""
    named: Weights = {}
    for name, tensor in weights.items():
        if not name.endswith(whole):
            named[name] = tensor
            continue
        for part, piece in zip(parts, tensor.chunk(len(parts)), strict=True):
            named[name.removesuffix(whole) + part] = piece
    return named


# ---- transformers --------------------------------------------------------------------------------
# In files: the names of version 4, which version 5 also reads, and mostly writes. In memory version
# 5 has others, which files of its pre-releases hold.

PARTS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
PARTS_IN_MEMORY = {"attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}


def make_labels(names: Sequence[str] | None, count: int) -> dict[str, Any]:
    """What a config.json says of classes; None: they have numbers alone."""
    names = names or [f"LABEL_{i}" for i in range(count)]
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def read_labels(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """`classes`, where a config.json has names for them."""
    labels = config.get("id2label", {})
    if not labels or all(v == f"LABEL_{k}" for k, v in labels.items()):
        return {}
    return {"classes": [labels[k] for k in sorted(labels, key=int)]}


def read_sizes(
    config: Mapping[str, Any], source: str, names: Mapping[str, str], fixed: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of ours that a config.json says.

    Args:
        names: ours to theirs.
        fixed: what ours cannot be otherwise; a config that does not say has the same.

    Raises:
        BadInput: something is missing, or another.
    """
    for name, expected in fixed.items():
        if config.get(name, expected) != expected:
            raise BadInput(
                f"{source} has {name} {config[name]}, our encoder's is {expected}: its outputs "
                "would differ"
            )
    if absent := [name for name in names.values() if name not in config]:
        raise BadInput(f"the config.json of {source} lacks {', '.join(absent)}")
    return {ours: config[theirs] for ours, theirs in names.items()}
