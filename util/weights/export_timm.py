"""Export to timm: a plain ViT, as one file or as a folder like those on its hub."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import timm
from torch import nn

from util.errors import BadInput
from util.styles import EPS
from util.train.checkpoint import write_signed
from util.weights.export import appearing, check_same, has_lscale, save_folder, save_safetensors
from util.weights.export_model import (
    BOUND,
    LOOSE,
    NO_DECODER,
    ExportTarget,
    LoadedModel,
    compute_outputs,
)

# Width, depth, heads and patch of timm's plain models; of others its base, with arguments.
TIMM_BASE = "vit_base_patch16_224"
TIMM_NAMES = {
    (192, 12, 3, 16): "vit_tiny_patch16_224",
    (384, 12, 6, 16): "vit_small_patch16_224",
    (768, 12, 12, 16): TIMM_BASE,
    (1024, 24, 16, 16): "vit_large_patch16_224",
    (1280, 32, 16, 14): "vit_huge_patch14_224",
}
TIMM_FOLDER = "local-dir:"  # of timm.create_model, before a folder


def to_timm(source: LoadedModel, path: Path) -> list[str]:
    """A plain ViT of timm, a file or a folder as on its hub, and the call that loads it."""
    kept = source.arguments
    weights = source.plain_weights(keep_lscale=source.keep_lscale)
    (ph, pw), D = kept["patch_size"], kept["embed_dim"]
    shape = (D, kept["depth"], kept["num_heads"], ph if ph == pw else 0)
    name = TIMM_NAMES.get(shape, TIMM_BASE)
    more: dict[str, Any] = {}
    if shape not in TIMM_NAMES:
        more = {
            "patch_size": ph if ph == pw else (ph, pw),
            "embed_dim": D,
            "depth": kept["depth"],
            "num_heads": kept["num_heads"],
        }
    if kept["mlp_ratio"] != 4:
        more["mlp_ratio"] = kept["mlp_ratio"]
    if has_lscale(weights):
        more["init_values"] = 1.0
    settings = {
        "num_classes": kept["num_classes"],
        "img_size": kept["img_size"],
        "in_chans": kept["in_chans"],
        "global_pool": "avg" if kept["global_pool"] == "avg" else "token",
        **more,
    }
    norm = {} if source.eps == EPS else {"norm_layer": partial(nn.LayerNorm, eps=source.eps)}
    if norm and not path.suffix:
        raise BadInput(
            f"timm's folders cannot say a LayerNorm epsilon of {source.eps}; give --output a name "
            "that ends in .safetensors"
        )
    seen = source.preprocessing.for_timm()
    config = timm_config(name, settings, seen, source)
    bound = LOOSE if kept.get("probe") else BOUND
    with appearing(path) as temporary:
        given: dict[str, Any] = {"checkpoint_path": str(temporary)}
        if not path.suffix:
            save_folder(temporary, weights, config)
            theirs = timm.create_model(f"{TIMM_FOLDER}{temporary}", pretrained=True)
        else:
            if path.suffix == ".safetensors":
                save_safetensors(temporary, weights, {"timm": json.dumps(config)})
            else:
                write_signed(temporary, weights)
            theirs = timm.create_model(name, **settings, **norm, **given)
        line = check_same(
            compute_outputs(source.model, source),
            compute_outputs(theirs.eval(), source),
            bound,
            "timm",
        )
    if not path.suffix:
        return [line, f"timm.create_model({f'{TIMM_FOLDER}{path}'!r}, pretrained=True)"]
    written = [f"{key}={value!r}" for key, value in settings.items()]
    if norm:
        written.append(f"norm_layer=functools.partial(torch.nn.LayerNorm, eps={source.eps})")
    written += [f"pretrained_cfg_overlay={seen!r}", f"checkpoint_path={str(path)!r}"]
    return [line, f"timm.create_model({name!r}, {', '.join(written)})"]


def timm_config(
    name: str, settings: dict[str, Any], seen: dict[str, Any], source: LoadedModel
) -> dict[str, Any]:
    """The config.json of a model folder of timm.

    Args:
        settings: of `timm.create_model`, beside the name.
        seen: how images are prepared, see `Preprocessing.for_timm`.
    """
    config: dict[str, Any] = {
        "architecture": name,
        "num_classes": settings["num_classes"],
        "num_features": source.arguments["embed_dim"],
        "global_pool": settings["global_pool"],
        "model_args": {k: v for k, v in settings.items() if k not in ("num_classes",)},
        "pretrained_cfg": {
            **seen,
            "num_classes": settings["num_classes"],
            "fixed_input_size": True,
            "pool_size": None,
            # timm makes RGB weights of it into weights of other channels; these are what they are.
            "first_conv": "patch_embed.proj" if settings["in_chans"] == 3 else None,
            "classifier": "head",
        },
    }
    classes = source.state.get("classes")
    if source.part == "head" and classes is not None and len(classes) == settings["num_classes"]:
        config["label_names"] = list(classes)
    return config


TIMM = ExportTarget(
    to_timm, suffixes=(".pth", ".safetensors", ""), refused=NO_DECODER, keeps_lscale=True
)
