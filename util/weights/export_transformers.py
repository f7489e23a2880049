"""Export to transformers: a folder with its weights, config and image processor."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from util.errors import BadInput, needs
from util.styles import STYLES
from util.weights.export import appearing, check_same, save_folder
from util.weights.export_model import IMAGES, LOOSE, ExportTarget, LoadedModel, compute_outputs
from util.weights.files import PREPROCESSOR


def to_transformers_folder(source: LoadedModel, path: Path) -> list[str]:
    """A folder of transformers: ViTMAEForPreTraining, or ViTForImageClassification."""
    kept, reason = source.arguments, None
    (h, w), (ph, pw) = kept["img_size"], kept["patch_size"]
    if source.part == "encoder":
        reason = "its classes need a decoder or a head, and this is an encoder alone"
    elif source.part == "decoder" and (h != w or ph != pw):
        reason = f"its ViTMAE takes square images and patches, this model {(h, w)}, {(ph, pw)}"
    elif source.part == "head" and kept["global_pool"] != "cls":
        reason = "its classifier reads the class token, this model the mean of the patches"
    elif source.part == "head" and ph != pw:
        reason = f"its classifier takes square patches, not {(ph, pw)}"
    if reason:
        raise BadInput(f"transformers cannot hold this model: {reason}; use --to timm")
    if path.exists():
        raise BadInput(f"{path} exists already; choose another --output")
    library = needs("transformers", "transformers")
    weights = source.plain_weights()
    classes = source.state.get("classes")
    style = STYLES["transformers"]
    assert style.config is not None
    config = style.config(kept, source.eps, classes if source.part == "head" else None)
    with appearing(path) as temporary:
        save_folder(temporary, style.write(weights), config)
        seen = json.dumps(source.preprocessing.for_transformers(), indent=2)
        (temporary / PREPROCESSOR).write_text(f"{seen}\n")
        kind = getattr(library, config["architectures"][0])
        theirs, loading = kind.from_pretrained(temporary, output_loading_info=True)
        wrong = {k: sorted(map(str, v)) for k, v in loading.items() if v}
        if wrong:
            raise BadInput(f"not written: transformers does not take these weights: {wrong}")
        line = check_same(
            compute_outputs(source.model, source),
            compute_transformers(theirs.eval(), source),
            LOOSE,
            "transformers",
        )
    return [line, f"transformers.{kind.__name__}.from_pretrained({str(path)!r})"]


@torch.inference_mode()
def compute_transformers(model: Any, source: LoadedModel) -> dict[str, Tensor]:
    """As `compute_outputs`, of a model of transformers; of an encoder the tokens alone."""
    images = source.images()
    if source.part == "head":
        return {"logits": model(images).logits}
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
    return {"tokens": getattr(model, "vit", model)(images, **more).last_hidden_state}


TRANSFORMERS = ExportTarget(to_transformers_folder, makes_folder=True)
