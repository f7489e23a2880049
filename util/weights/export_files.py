"""Export to files that differ in names and layout alone: official MAE, mmsegmentation, ours."""

from pathlib import Path

from util.errors import BadInput
from util.styles import EPS, STYLES, find_writer
from util.weights.export_model import (
    NO_DECODER,
    ExportTarget,
    LoadedModel,
    metadata,
    write_and_compare,
)

OFFICIAL_SIZES = {(768, 12, 16): "base", (1024, 24, 16): "large", (1280, 32, 14): "huge"}


def to_official(source: LoadedModel, path: Path) -> list[str]:
    """The layout of the official MAE code: `{"model": ...}`, a probe with its BatchNorm."""
    kept = source.arguments
    if source.kind != "vit":
        style = find_writer(source.kind, "official", kept, "the checkpoint")
        named = source.written(style, "encoder.", keep_probe=True)
        state = {"model": named, **metadata(source, ours=False)}
        return [write_and_compare(source, path, state)]
    sides = (*kept["img_size"], *kept["patch_size"])
    if sides[0] != sides[1] or sides[2] != sides[3] or source.eps != EPS:
        raise BadInput(
            f"the official MAE code has square images and patches and an epsilon of {EPS}, this "
            f"model {kept['img_size']}, {kept['patch_size']} and {source.eps}; use "
            "--to timm, onnx or mmae"
        )
    weights = source.plain_weights(keep_probe=True)
    # The official code takes `model` and passes over what we need to read it again.
    line = write_and_compare(source, path, {"model": weights, **metadata(source, ours=False)})
    if kept.get("cls_tokens", 1) > 1:
        return [line, "Pixio's code takes it, with a model of these sizes and class tokens"]
    name = OFFICIAL_SIZES.get((kept["embed_dim"], kept["depth"], sides[2]))
    prefix = "mae_vit" if source.part == "decoder" else "vit"
    called = f"{prefix}_{name}_patch{sides[2]}" if name else "none of its models has this size"
    return [line, f"the official code's --model: {called}, --input_size {sides[0]}"]


def to_mmsegmentation(source: LoadedModel, path: Path) -> list[str]:
    """mmsegmentation's names, and the backbone that they are of."""
    kept = source.arguments
    if source.kind != "vit":
        raise BadInput(f"--to mmseg takes vision transformers alone, this is a {source.kind}")
    if (tokens := kept.get("cls_tokens", 1)) > 1:
        raise BadInput(f"mmsegmentation's backbones have one class token, this model {tokens}")
    (ph, pw), ratio = kept["patch_size"], kept["mlp_ratio"]
    if ph != pw or ratio != int(ratio):
        raise BadInput(
            f"mmsegmentation takes square patches and a whole mlp_ratio, not {(ph, pw)} and "
            f"{ratio}; use --to timm"
        )
    named = STYLES["mmseg"].write(source.plain_weights(keep_lscale=True))
    line = write_and_compare(source, path, {"state_dict": named, **metadata(source, ours=False)})
    backbone = (
        f"backbone=dict(type='MAE', img_size={kept['img_size']}, patch_size={ph}, "
        f"in_channels={kept['in_chans']}, embed_dims={kept['embed_dim']}, "
        f"num_layers={kept['depth']}, num_heads={kept['num_heads']}, mlp_ratio={int(ratio)}, "
        f"init_values=1.0, norm_cfg=dict(type='LN', eps={source.eps}), "
        f"init_cfg=dict(type='Pretrained', checkpoint={str(path)!r}))"
    )
    return [line, backbone]


def to_mmae(source: LoadedModel, path: Path) -> list[str]:
    """A file of ours: every tensor as it was."""
    described = metadata(source)
    if source.kind != "vit" and source.part == "decoder":
        if "model_name" not in source.state:
            raise BadInput(
                f"a whole {type(source.model).__name__} of another program is read as it is "
                "wherever a checkpoint is asked for; --part encoder writes its encoder alone"
            )
        # As its run has it: its class and the arguments of the whole say more than its encoder.
        described = {k: v for k, v in described.items() if k != "encoder_kind"}
        described["model_args"] = source.state["model_args"]
    state = {"task": "export", "step": 0, **described, "model": source.model.state_dict()}
    return [write_and_compare(source, path, state)]


OFFICIAL = ExportTarget(to_official)
MMSEG = ExportTarget(
    to_mmsegmentation,
    refused={
        **NO_DECODER,
        "head": "takes no head: segmentors have their own; use --part encoder",
    },
    takes_segmenter=True,
    keeps_lscale=True,
)
MMAE = ExportTarget(to_mmae, like_mae=False, takes_segmenter=True)
