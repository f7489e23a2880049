"""The programs that `main_export.py` writes weights for, and what of a file goes to each."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from util.errors import BadInput, needs
from util.styles import STYLES
from util.train.checkpoint import local_file, peek
from util.weights.export import check_same, has_lscale, run_onnx
from util.weights.export_files import MMAE, MMSEG, OFFICIAL
from util.weights.export_model import BAKED, LOOSE, ExportTarget, LoadedModel, compute_outputs
from util.weights.export_onnx import ONNX
from util.weights.export_timm import TIMM
from util.weights.export_transformers import TRANSFORMERS, compute_transformers
from util.weights.files import CONFIG, read_json, weights_file

# By the name that --to takes.
TARGETS: dict[str, ExportTarget] = {
    "timm": TIMM,
    "transformers": TRANSFORMERS,
    "mmseg": MMSEG,
    "official": OFFICIAL,
    "onnx": ONNX,
    "mmae": MMAE,
}
PARTS = ("auto", "decoder", "head", "encoder", "segmenter")
# To the other targets goes a segmenter's encoder.
SEGMENTER_TARGETS = [name for name, target in TARGETS.items() if target.takes_segmenter]


def check_request(to: str, path: Path, checkpoint: str, keep_lscale: bool) -> None:
    """See that a target can be written to a path.

    Args:
        to: one of `TARGETS`. path: the new file or folder. checkpoint: what is read.
        keep_lscale: whether scales are to stay as they are.

    Raises:
        BadInput: it cannot.
    """
    target = TARGETS[to]
    if path.suffix not in target.suffixes and not target.makes_folder:
        known = [suffix or "nothing (a folder)" for suffix in target.suffixes]
        raise BadInput(f"--output {path} must end in {' or '.join(known)} for --to {to}")
    if keep_lscale and not target.keeps_lscale:
        raise BadInput(f"--keep_lscale is for timm; --to {to} folds LScale or always keeps it")
    if not path.name:
        raise BadInput(f"--output {path} is no name of a file or of a new folder")
    if path.exists() and path.resolve() == weights_file(checkpoint).resolve():
        raise BadInput(f"--output {path} is the --checkpoint itself; choose another name")
    if path.is_file() and path.name.startswith("checkpoint-") and peek(path) is not None:
        raise BadInput(f"--output {path} is a checkpoint of a run; choose another name")


def choose_part(asked: str, to: str, state: Mapping[str, Any], decoder: bool) -> str:
    """Which part of a model is exported: decoder | head | encoder.

    Args:
        asked: one of these, or auto: all that there is and that the target takes.
        to: one of `TARGETS`. state: what the file holds. decoder: whether something that predicts
            is in it.

    Raises:
        BadInput: the target does not take what was asked for.
    """
    refused = TARGETS[to].refused
    if asked in refused:
        raise BadInput(f"--to {to} {refused[asked]}")
    if asked != "auto":
        return asked
    if decoder and "decoder" not in refused and takes_whole(to, state):
        return "decoder"
    head = any(key.startswith("head.") for key in state["model"])
    return "head" if head and "head" not in refused else "encoder"


def takes_whole(to: str, state: Mapping[str, Any]) -> bool:
    """Whether a target that takes decoders has one for this kind of encoder."""
    kind = state.get("encoder_kind", "vit")
    if kind == "vit" or to == "mmae":
        return kind == "vit" or "model_name" in state
    return any(
        style.kind == kind and to in style.programs and (to == "official" or style.pretraining)
        for style in STYLES.values()
    )


def list_losses(state: Mapping[str, Any], part: str, other: str, decoder: bool) -> list[str]:
    """What of a file's contents is not exported, whatever the target.

    Args:
        other: which weights stay behind, where the file has averaged ones.
        decoder: whether something that predicts is in the file.
    """
    weights, lost = state["model"], list(state.get("notes", ()))
    head = any(name.startswith("head.") for name in weights)
    if decoder and part != "decoder":
        plain = state.get("encoder_kind", "vit") == "vit"
        what = "the decoder is" if plain else "the mask token and what predicts are"
        lost.append(f"{what} left out")
        if "pos_phase" in weights:
            lost.append(BAKED)
    if head and part == "encoder":
        lost.append("the head is left out")
    if not any(name in weights for name in ("norm.weight", "fc_norm.weight")):
        lost.append("the file has no final norm; the new one has a fresh one")
    if "ema" in state:
        lost.append(f"the {other} weights are left out")
    if "optimizer" in state:
        lost.append("the optimiser's state, and all else that a resume needs, is left out")
    return lost


def unlike_mae(model: Any) -> str | None:
    """What no other program's masked autoencoder has room for; None: nothing."""
    if model.decoder not in ("full", "partial"):  # the same parameters
        return f"decoder {model.decoder!r} (CrossMAE's)"
    if model.encoder_mask_tokens:
        return "its mask token in the encoder"
    return None if model.pca_components is None else "PCA coefficients as its target"


def autoencoder_arguments(model: Any) -> dict[str, Any]:
    """The arguments of `MaskedAutoencoderViT` that make a model of the same shape."""
    first, decoder = model.blocks[0], model.decoder_blocks[0]
    return {
        "img_size": model.img_size,
        "patch_size": model.patch_size,
        "in_chans": model.in_chans,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": first.attn.num_heads,
        "mlp_ratio": first.mlp.fc1.out_features / model.embed_dim,
        "decoder_embed_dim": model.decoder_norm.weight.shape[0],
        "decoder_depth": len(model.decoder_blocks),
        "decoder_num_heads": decoder.attn.num_heads,
        "norm_pix_loss": model.norm_pix_loss,
        "lscale_init": 1.0 if has_lscale(model.state_dict()) else None,
        "pos_offset": model.pos_offset,
        "decoder": model.decoder,
        "predict_ratio": model.predict_ratio,
        "encoder_mask_tokens": model.encoder_mask_tokens,
        "pca_components": model.pca_components,
        "predict_cell": list(model.predict_cells.size),
        "cls_tokens": model.cls_tokens,
        "positions": model.positions,
    }


def check_reading(source: LoadedModel, path: str) -> str | None:
    """Compare what was read with what its own program computes, where that can be asked.

    Returns:
        a line that says how equal they are, or None: official and mmsegmentation files say nothing
        of their code, and timm's encoder is ours.

    Raises:
        BadInput: the outputs differ.
    """
    place = local_file(path)
    expected = compute_outputs(source.model, source)
    if place.suffix == ".onnx":
        names = list(expected)
        found = run_onnx(place, source.images(), names)
        return check_same(expected, found, LOOSE, "the ONNX file")
    folder = place if place.is_dir() else place.parent
    if (
        not source.state.get("style", "").startswith("transformers")
        or not (folder / CONFIG).is_file()
    ):
        return None
    library = needs("transformers", "transformers")
    kind = read_json(folder / CONFIG).get("architectures", ["ViTModel"])[0]
    theirs = getattr(library, kind).from_pretrained(folder).eval()
    found = compute_transformers(theirs, source)
    return check_same({name: expected[name] for name in found}, found, LOOSE, "transformers")
