"""The one list of model names."""

import argparse
import difflib
from collections.abc import Callable
from typing import Any

from torch import nn

from models_mmae import MaskedAutoencoderViT
from util.checkpoint import load_file, load_weights
from util.errors import BadInput

DEFAULT = "mae_vit_base_patch16"

# Encoders: width, depth, heads. Base, large and huge as in ViT and MAE; tiny and small as in DeiT.
ENCODERS = {
    "micro": (128, 4, 4),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
# Decoders: width, depth, heads. MAE's is 512, 8, 16; smaller encoders get a lighter one.
DECODERS = {"micro": (96, 2, 4), "tiny": (128, 4, 4), "small": (256, 4, 8)}
MAE_DECODER = (512, 8, 16)
# Patch sizes of each encoder, and the image side that the name stands for where none is given.
SIZES = {
    "micro": {4: 32, 8: 64},
    "tiny": {4: 32, 8: 64, 16: 224},
    "small": {4: 32, 8: 96, 16: 224},
    "base": {8: 96, 16: 224},
    "large": {16: 224},
    "huge": {14: 224},
}


def _mae(size: str, patch_size: int, img_size: int) -> dict[str, Any]:
    embed_dim, depth, num_heads = ENCODERS[size]
    decoder_embed_dim, decoder_depth, decoder_num_heads = DECODERS.get(size, MAE_DECODER)
    return {
        "img_size": img_size,
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "decoder_embed_dim": decoder_embed_dim,
        "decoder_depth": decoder_depth,
        "decoder_num_heads": decoder_num_heads,
    }


MODELS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    f"mae_vit_{size}_patch{patch}": (MaskedAutoencoderViT, _mae(size, patch, side))
    for size, patches in SIZES.items()
    for patch, side in patches.items()
}


def list_models() -> list[str]:
    """All names that `create_model` knows."""
    return list(MODELS)


def model_arguments(name: str) -> dict[str, Any]:
    """What the name stands for: the arguments of its class.

    Raises:
        BadInput: unknown name; the message lists the valid ones, the nearest first.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise BadInput(f"unknown model {name!r}{hint}; valid names: {', '.join(MODELS)}")
    return dict(MODELS[name][1])


def create_model(name: str, **kwargs: Any) -> Any:
    """A model (an `nn.Module`) by name; `kwargs` override what the name stands for.

    >>> create_model("mae_vit_base_patch16")  # MAE
    >>> create_model("mae_vit_base_patch16", lscale_init=0.1, pos_offset="learned")  # M-MAE

    Raises:
        BadInput: unknown name or settings that do not fit.
    """
    arguments = model_arguments(name) | kwargs
    return MODELS[name][0](**arguments)


def load_pretrained(
    path: str, name: str | None = None, **overrides: Any
) -> tuple[Any, dict[str, Any]]:
    """A masked autoencoder with its decoder, from a file of weights.

    Ours say what they are. Official MAE files (`{"model": ...}`) say it in the `Namespace` beside
    the weights or not at all; then `name` does.

    Args:
        path: checkpoint file.
        name: model name, for weights that do not say.
        overrides: arguments of the model, for weights that do not say; None is ignored.

    Returns:
        the model, on the CPU, and what else the file holds.

    Raises:
        BadInput: unreadable, unnamed or encoder-only weights, or weights that do not fit.
    """
    state = load_file(path)
    weights = state.get("model", state)
    if not any(key.startswith("decoder_") for key in weights):
        raise BadInput(
            f"{path} holds no decoder: encoder-only weights cannot reconstruct; use a pretraining "
            "checkpoint of ours or official weights with their decoder (mae_visualize_*)"
        )
    flags = vars(state.get("args", argparse.Namespace()))
    if name and state.get("model_name", name) != name:
        raise BadInput(f"{path} is a {state['model_name']}, not a {name}; leave --model out")
    name = name or state.get("model_name") or flags.get("model")
    if name is None:
        raise BadInput(
            f"{path} does not say which model it is; name it, for example --model {DEFAULT}"
        )
    arguments = dict(state.get("model_args", {}))
    if "model_args" not in state:
        arguments["norm_pix_loss"] = flags.get("norm_pix_loss", False)
        arguments["img_size"] = flags.get("input_size", model_arguments(name)["img_size"])
        arguments |= {k: v for k, v in overrides.items() if v is not None}
    model = create_model(name, **arguments)
    load_weights(model, weights, path)
    return model, state
