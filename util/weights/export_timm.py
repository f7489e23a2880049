"""Export to timm: a plain ViT, as one file or as a folder like those on its hub."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import timm
from torch import nn

from util.errors import BadInput
from util.styles import Style, find_writer
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
# Its plain vision transformer has our names and settings.
PLAIN = Style(lambda weights: True, lambda weights, source: (dict(weights), []), dict)
TIMM_FOLDER = "local-dir:"  # of timm.create_model, before a folder


def to_timm(source: LoadedModel, path: Path) -> list[str]:
    """A plain ViT of timm, a file or a folder as on its hub, and the call that loads it."""
    kept = source.arguments
    name, settings, weights, style = describe_timm(source)
    norm = {} if source.eps == style.eps else {"norm_layer": partial(nn.LayerNorm, eps=source.eps)}
    if norm and not path.suffix:
        raise BadInput(
            f"timm's folders cannot say a LayerNorm epsilon of {source.eps}; give --output a name "
            "that ends in .safetensors"
        )
    seen = source.preprocessing.for_timm()
    config = timm_config(name, settings, seen, source, style.classifier)
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


def describe_timm(source: LoadedModel) -> tuple[str, dict[str, Any], dict[str, Any], Style]:
    """The name and the settings of timm's model, its weights, and how it names them.

    Raises:
        BadInput: it has no such model.
    """
    kept = source.arguments
    both = {name: kept[name] for name in ("num_classes", "img_size", "in_chans")}
    if source.kind != "vit":
        style = find_writer(source.kind, "timm", kept, "the checkpoint")
        assert style.timm_model is not None
        name, more = style.timm_model(kept)
        return name, both | more, source.written(style), style
    weights = source.plain_weights(keep_lscale=source.keep_lscale)
    (ph, pw), D = kept["patch_size"], kept["embed_dim"]
    shape = (D, kept["depth"], kept["num_heads"], ph if ph == pw else 0)
    name, settings = TIMM_NAMES.get(shape, TIMM_BASE), dict[str, Any]()
    if shape not in TIMM_NAMES:
        settings = {
            "patch_size": ph if ph == pw else (ph, pw),
            "embed_dim": D,
            "depth": kept["depth"],
            "num_heads": kept["num_heads"],
        }
    if kept["mlp_ratio"] != 4:
        settings["mlp_ratio"] = kept["mlp_ratio"]
    if has_lscale(weights):
        settings["init_values"] = 1.0
    both["global_pool"] = "avg" if kept["global_pool"] == "avg" else "token"
    if (tokens := kept.get("cls_tokens", 1)) > 1:
        if both["global_pool"] == "token":
            raise BadInput(
                f"timm pools the first of several class tokens, this model the mean of its {tokens}"
                "; fine-tune it with --global_pool, or use --to onnx, official or mmae (an encoder "
                "alone: transformers too)"
            )
        # One class token of timm's, and register tokens; all have positions.
        settings["reg_tokens"] = tokens - 1
        weights["cls_token"], weights["reg_token"] = weights["cls_token"].split([1, tokens - 1], 1)
    return name, both | settings, weights, PLAIN


def timm_config(
    name: str,
    settings: dict[str, Any],
    seen: dict[str, Any],
    source: LoadedModel,
    classifier: str,
) -> dict[str, Any]:
    """The config.json of a model folder of timm.

    Args:
        settings: of `timm.create_model`, beside the name.
        seen: how images are prepared, see `Preprocessing.for_timm`.
        classifier: what timm calls the head.
    """
    config: dict[str, Any] = {
        "architecture": name,
        "num_classes": settings["num_classes"],
        "num_features": source.model.num_features,
        "global_pool": settings["global_pool"],
        "model_args": {k: v for k, v in settings.items() if k not in ("num_classes",)},
        "pretrained_cfg": {
            **seen,
            "num_classes": settings["num_classes"],
            "fixed_input_size": True,
            "pool_size": None,
            # timm makes RGB weights of it into weights of other channels; these are what they are.
            "first_conv": "patch_embed.proj" if settings["in_chans"] == 3 else None,
            "classifier": classifier,
        },
    }
    classes = source.state.get("classes")
    if source.part == "head" and classes is not None and len(classes) == settings["num_classes"]:
        config["label_names"] = list(classes)
    return config


TIMM = ExportTarget(
    to_timm, suffixes=(".pth", ".safetensors", ""), refused=NO_DECODER, keeps_lscale=True
)
