"""Export to transformers: a folder with its weights, config and image processor."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from util.errors import BadInput, needs
from util.styles import STYLES, find_writer
from util.weights.export import appearing, check_same, save_folder
from util.weights.export_model import IMAGES, LOOSE, ExportTarget, LoadedModel, compute_outputs
from util.weights.files import PREPROCESSOR


def to_transformers_folder(source: LoadedModel, path: Path) -> list[str]:
    """A folder of transformers: ViTMAEForPreTraining, ViTForImageClassification, or PixioModel."""
    if source.kind == "vit":
        style, reason = STYLES["transformers"], list_vit_limits(source)
    else:
        style = find_writer(source.kind, "transformers", source.arguments, "the checkpoint")
        if source.part == "decoder" and style.pretraining is None:
            raise BadInput(
                "transformers has no such model with what predicts: --part encoder, or --to "
                "official or mmae"
            )
        reason = None
    kept = source.arguments
    if reason:
        other = "onnx or mmae" if source.arguments.get("cls_tokens", 1) > 1 else "timm"
        raise BadInput(f"transformers cannot hold this model: {reason}; use --to {other}")
    if path.exists():
        raise BadInput(f"{path} exists already; choose another --output")
    library = needs("transformers", "transformers")
    plain = source.kind == "vit"
    named = style.write(source.plain_weights()) if plain else source.written(style)
    classes = source.state.get("classes")
    assert style.config is not None
    config = style.config(kept, source.eps, classes if source.part == "head" else None)
    if not plain and source.part == "decoder":
        config["architectures"] = [style.pretraining]
    with appearing(path) as temporary:
        save_folder(temporary, named, config)
        seen = json.dumps(source.preprocessing.for_transformers(), indent=2)
        (temporary / PREPROCESSOR).write_text(f"{seen}\n")
        kind = getattr(library, config["architectures"][0])
        theirs, loading = kind.from_pretrained(temporary, output_loading_info=True)
        wrong = {k: sorted(map(str, v)) for k, v in loading.items() if v}
        if wrong:
            raise BadInput(f"not written: transformers does not take these weights: {wrong}")
        expected = compute_outputs(source.model, source)
        if source.part == "encoder":
            expected = {"tokens": expected["tokens"]}
        line = check_same(
            expected,
            compute_transformers(theirs.eval(), source),
            LOOSE,
            "transformers",
        )
    return [line, f"transformers.{kind.__name__}.from_pretrained({str(path)!r})"]


def list_vit_limits(source: LoadedModel) -> str | None:
    """What its vision transformers have no place for; None: nothing."""
    kept = source.arguments
    (h, w), (ph, pw) = kept["img_size"], kept["patch_size"]
    if (tokens := kept.get("cls_tokens", 1)) > 1:
        if source.part != "encoder":
            return f"its models with {tokens} class tokens are encoders alone (--part encoder)"
        if h != w or ph != pw or kept["mlp_ratio"] != int(kept["mlp_ratio"]):
            return (
                f"its Pixio takes square images and patches and a whole mlp_ratio, this model "
                f"{(h, w)}, {(ph, pw)} and {kept['mlp_ratio']}"
            )
        if kept["global_pool"] != "cls":
            return "its Pixio ends with a norm of all tokens, and this model has one after pooling"
        return None
    if source.part == "encoder":
        return "its classes need a decoder or a head, and this is an encoder alone"
    if source.part == "decoder" and (h != w or ph != pw):
        return f"its ViTMAE takes square images and patches, this model {(h, w)}, {(ph, pw)}"
    if source.part == "head" and kept["global_pool"] != "cls":
        return "its classifier reads the class token, this model the mean of the patches"
    if source.part == "head" and ph != pw:
        return f"its classifier takes square patches, not {(ph, pw)}"
    return None


@torch.inference_mode()
def compute_transformers(model: Any, source: LoadedModel) -> dict[str, Tensor]:
    """As `compute_outputs`, of a model of transformers; of an encoder the tokens alone."""
    images = source.images()
    if source.part == "head":
        return {"logits": model(images).logits}
    if source.part == "decoder" and source.kind != "vit":
        out = model(images, bool_masked_pos=source.mask())
        return {"loss": out.loss, "pred": out.reconstruction}
    if source.part == "decoder":
        out = model(images, noise=source.noise())
        hidden = out.mask.bool()
        pred = out.logits[hidden].reshape(IMAGES, -1, out.logits.shape[-1])
        return {"loss": out.loss, "pred": pred}
    more = {}
    if model.config.model_type == "vit_mae":  # nothing masked, and the patches in their order
        model.config.mask_ratio = 0.0
        patches = source.model.grid[0] * source.model.grid[1]
        more["noise"] = torch.arange(patches).float().expand(IMAGES, -1)
    inside = getattr(model, "vit", getattr(model, "pixio", model))
    tokens = inside(images, **more).last_hidden_state
    # Ours may be a map, of which its tokens are the rows one after the other.
    own = source.model.forward_features(images[:1])
    return {"tokens": tokens.reshape(len(images), *own.shape[1:])}


TRANSFORMERS = ExportTarget(to_transformers_folder, makes_folder=True)
