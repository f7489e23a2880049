"""Take weights to another program, or bring them from one; each file is verified before it appears.

python main_export.py --checkpoint RUN/checkpoint-last.pth --to timm --output vit.safetensors
python main_export.py --checkpoint FOLDER_OF_TRANSFORMERS --to mmae --output weights.pth
"""

if __name__ == "__main__":  # before the imports that take seconds
    from util.signals import take_interrupt

    take_interrupt()

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import models_zoo
from models_layers import pair
from models_mmae import MaskedAutoencoderViT
from models_segmenters import holds_segmenter, mmseg_config, segmenter_of, to_mmseg_names
from models_upernet import UperNet
from models_vit import VisionTransformer
from util.config.flag_parser import load_plugins
from util.config.flags import FlagParser, add_heads_flag, add_weights_key_flag, number, size_pair
from util.console import print_text
from util.data.preprocessing import Preprocessing, preprocessing_of
from util.errors import BadInput, command, needs
from util.flag_types import MOST_WIDTH, expanded_path
from util.train.checkpoint import load_file, local_file, peek, write_signed
from util.weights.assumed import assumptions
from util.weights.convert_names import EPS, config_of, to_mmseg, to_transformers
from util.weights.export import (
    appearing,
    check_same,
    fold_lscale,
    fold_probe,
    has_lscale,
    run_onnx,
    save_folder,
    save_onnx,
    save_safetensors,
)
from util.weights.files import CONFIG, PREPROCESSOR, load_state, read_json, weights_file
from util.weights.load_table import LOADED

PARTS = ("auto", "decoder", "head", "encoder", "segmenter")
# Targets that take a whole segmenter; to the others goes its encoder.
SEGMENTER_TARGETS = ("mmseg", "mmae")
# Largest difference / largest output. A folded BatchNorm divides by small deviations.
BOUND, LOOSE = 1e-5, 1e-4
IMAGES = 2
BAKED = "the learned phases are baked into the positions: resizing these is no longer by formula"
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
OFFICIAL_SIZES = {(768, 12, 16): "base", (1024, 24, 16): "large", (1280, 32, 14): "huge"}


@dataclass
class LoadedModel:
    """A model that was read, and what is known of it.

    Attributes:
        model: in evaluation mode; a `MaskedAutoencoderViT` if `part` is decoder.
        arguments: of its class. state: what else the file holds.
        part: decoder | head | encoder, what of it is exported.
        eps: of its LayerNorms.
        lost: what the new file will not hold, to be said.
    """

    model: Any
    arguments: dict[str, Any]
    state: dict[str, Any]
    part: str
    eps: float
    lost: list[str] = field(default_factory=list)

    def images(self) -> Tensor:
        """Random images: float32 [2, C, H, W]."""
        generator = torch.Generator().manual_seed(0)
        shape = (IMAGES, self.arguments["in_chans"], *pair(self.arguments["img_size"]))
        return torch.randn(shape, generator=generator)

    def preprocessing(self) -> Preprocessing:
        """What images need before the model sees them."""
        kept = self.arguments
        data = self.state.get("data", {})
        return preprocessing_of(data, pair(kept["img_size"]), kept["in_chans"])[0]

    def noise(self) -> Tensor:
        """Random numbers for each patch: float32 [2, L]."""
        patches = self.model.grid[0] * self.model.grid[1]
        return torch.rand(IMAGES, patches, generator=torch.Generator().manual_seed(1))

    def plain_weights(
        self, *, keep_lscale: bool = False, keep_probe: bool = False
    ) -> dict[str, Any]:
        """The weights of a model without our terms: positions baked, the rest folded.

        Says what that loses. A pretraining model keeps its decoder.
        """
        weights = {k: v.detach() for k, v in self.model.state_dict().items()}
        if self.part == "decoder":
            for part, name in (("encoder", "pos_embed"), ("decoder", "decoder_pos_embed")):
                code = self.model.position_code(part).detach()
                weights[name] = torch.cat([weights[name][:, :1], code], dim=1)
            if weights.pop("pos_phase", None) is not None:
                weights.pop("decoder_pos_phase")
                self.lost.append(BAKED)
        if has_lscale(weights) and not keep_lscale:
            weights = fold_lscale(weights)
            self.lost.append("LScale is folded into the layers before it: its values are gone")
        if "head.0.running_mean" in weights and not keep_probe:
            weights = fold_probe(weights, self.model.head[0].eps)
            self.lost.append(
                "the probe's BatchNorm is folded into the head: its statistics are gone"
            )
        return weights


def build_parser() -> FlagParser:
    """The flags."""
    parser = FlagParser(
        description=__doc__.split("\n")[0],
        example="python main_export.py --checkpoint RUN/checkpoint-last.pth --to timm \\\n"
        "  --output vit.safetensors",
        first=(
            "checkpoint", "to", "output", "part", "input_size", "keep_lscale", "ema", "model",
            "num_heads",
        ),
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint",
        type=expanded_path,
        metavar="FILE",
        help="of ours, official MAE, timm, mmsegmentation, ONNX; or a folder of transformers; "
        "path or https URL; no default",
    )
    parser.add_argument("--to", choices=list(TARGETS), help="whose file to write; no default")
    parser.add_argument(
        "--output",
        type=expanded_path,
        help="file to write; for transformers a new folder, for timm either; no default",
    )
    parser.add_argument(
        "--part",
        choices=PARTS,
        default="auto",
        help="what to take along; auto: all that the file has and --to takes",
    )
    parser.add_argument(
        "--keep_lscale",
        action="store_true",
        help="timm: leave LScale as timm's LayerScale instead of folding it; mmseg always does",
    )
    parser.add_argument(
        "--ema", action="store_true", help="take the averaged weights of a fine-tuning"
    )
    parser.add_argument(
        "--input_size", type=size_pair, help="pixels to run at; default: the file's"
    )
    parser.add_argument(
        "--pos_resize",
        choices=("rescale", "extend"),
        default="rescale",
        help="positions at another --input_size: rescale keeps the image's extent, extend the "
        "distance of patches",
    )
    group = parser.add_argument_group("for weights that do not say what they are")
    group.add_argument(
        "--model", metavar="NAME", help="name of the model in the file; default: by the file"
    )
    add_heads_flag(group)
    add_weights_key_flag(group)
    group.add_argument(
        "--decoder_num_heads",
        type=number(int, 1, MOST_WIDTH),
        help="the same of the decoder; default alike",
    )
    group.add_argument(
        "--norm_pix_loss", action="store_true", help="the decoder predicts normalised pixels"
    )
    return parser


def read_segmenter(args: argparse.Namespace) -> tuple[UperNet, dict[str, Any]] | None:
    """The whole segmenter that is to be exported, and what else its file holds; None: no such.

    Raises:
        BadInput: it was asked for, and cannot be.
    """
    asked, place = args.part == "segmenter", weights_file(args.checkpoint)
    if args.to not in SEGMENTER_TARGETS:
        if asked:
            raise BadInput(
                f"--to {args.to} takes no segmenter; {' and '.join(SEGMENTER_TARGETS)} do"
            )
        return None
    if args.part not in ("auto", "segmenter") or place.is_dir() or place.suffix == ".onnx":
        return None
    state = load_file(place)
    if not asked and not holds_segmenter(state, args.checkpoint, args.weights_key):
        return None
    if args.input_size is not None:
        raise BadInput("--input_size resizes encoders (--part encoder); a segmenter takes any size")
    model, rest = segmenter_of(state, args.checkpoint, args.model, args.num_heads, args.weights_key)
    for line in [*rest[LOADED], *assumptions(rest, args.checkpoint)]:
        print_text(line)
    return model, rest


@torch.inference_mode()
def write_segmenter(
    model: UperNet, state: dict[str, Any], path: Path, args: argparse.Namespace
) -> None:
    """Write a whole segmenter, see that the file is the same function, and say what it is."""
    said: dict[str, Any] = {k: state[k] for k in ("classes", "data") if k in state}
    said |= {"model_args": model.arguments, "norm_eps": EPS}
    contents: dict[str, Any]
    if args.to == "mmseg":
        contents = {"state_dict": to_mmseg_names(model), **said}
    else:
        contents = {"task": "export", "step": 0, **said, "model": model.state_dict()}
    shape = (IMAGES, model.in_chans, *model.encoder.img_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with appearing(path) as temporary:
        write_signed(temporary, contents)
        again, _ = segmenter_of(load_file(temporary), str(path))
        expected, found = model.eval()(images), again.eval()(images)
        line = check_same(expected, found, BOUND, "the new file")
    print_text(f"{args.checkpoint}: segmenter to {args.to}")
    print_text(f"verified  {line}\nwritten   {path}")
    if args.to == "mmseg":
        print_text(mmseg_config(model))


def read_source(args: argparse.Namespace) -> LoadedModel:
    """Read the checkpoint, as much of it as is to be exported.

    Raises:
        BadInput: unreadable, or without the part that was asked for.
    """
    path, state = args.checkpoint, load_state(args.checkpoint, args.weights_key)
    if args.ema:
        if "ema" not in state:
            raise BadInput(f"{path} holds no averaged weights; leave --ema out")
        state["model"] = state["ema"]
    part = part_of(args.part, args.to, state["model"])
    if part == "decoder":
        if args.input_size is not None and "model_args" in state:
            raise BadInput("--input_size resizes encoders; a model with its decoder keeps its size")
        model, state = models_zoo.autoencoder_of(
            state,
            path,
            args.model,
            norm_pix_loss=args.norm_pix_loss or None,
            img_size=args.input_size,
            num_heads=args.num_heads,
            decoder_num_heads=args.decoder_num_heads,
        )
        if args.to != "mmae" and (unlike := unlike_mae(model)):
            raise BadInput(
                f"--to {args.to} takes MAE's decoder, and this one has {unlike}; leave it out with "
                "--part encoder, for example --to timm"
            )
        arguments = arguments_of(model)
        if "lscale_init" in state.get("model_args", {}):
            arguments["lscale_init"] = state["model_args"]["lscale_init"]
    else:
        model, arguments, state = models_zoo.classifier_of(
            state,
            path,
            args.model,
            head="own" if part == "head" else "none",
            img_size=args.input_size,
            pos_resize=args.pos_resize,
            num_heads=args.num_heads,
        )
        arguments |= {name: pair(arguments[name]) for name in ("img_size", "patch_size")}
        # How a model was trained does not belong to its weights.
        arguments |= {"drop_path": 0.0}
    for line in [*state[LOADED], *assumptions(state, path)]:
        print_text(line)
    lost = losses_of(state, part, other="other" if args.ema else "averaged (--ema)")
    return LoadedModel(model.eval(), arguments, state, part, state.get("norm_eps", EPS), lost)


def unlike_mae(model: MaskedAutoencoderViT) -> str | None:
    """What no other program's masked autoencoder has room for; None: nothing."""
    if model.decoder != "full":
        return f"decoder {model.decoder!r} (CrossMAE's)"
    if model.encoder_mask_tokens:
        return "its mask token in the encoder"
    return None if model.pca_components is None else "PCA coefficients as its target"


def part_of(asked: str, to: str, weights: dict[str, Tensor]) -> str:
    """Which part of a model is exported: decoder | head | encoder.

    Raises:
        BadInput: the target does not take what was asked for.
    """
    decoder, head = (any(k.startswith(p) for k in weights) for p in ("decoder_", "head."))
    if asked == "decoder" and to in ("timm", "mmseg", "onnx"):
        raise BadInput(f"--to {to} takes no decoder; choose official or transformers")
    if asked == "head" and to == "mmseg":
        raise BadInput("--to mmseg takes no head: segmentors have their own; use --part encoder")
    if asked != "auto":
        return asked
    if decoder and to in ("official", "transformers", "mmae"):
        return "decoder"
    return "head" if head and to != "mmseg" else "encoder"


def losses_of(state: dict[str, Any], part: str, other: str) -> list[str]:
    """What of a file's contents is not exported, whatever the target.

    Args:
        other: which weights stay behind, where the file has averaged ones.
    """
    weights, lost = state["model"], list(state["notes"])
    decoder, head = (any(k.startswith(p) for k in weights) for p in ("decoder_", "head."))
    if decoder and part != "decoder":
        lost.append("the decoder is left out")
        if "pos_phase" in weights:
            lost.append(BAKED)
    if head and part == "encoder":
        lost.append("the head is left out")
    if "norm.weight" not in weights and "fc_norm.weight" not in weights:
        lost.append("the file has no final norm; the new one has a fresh one")
    if "ema" in state:
        lost.append(f"the {other} weights are left out")
    if "optimizer" in state:
        lost.append("the optimiser's state, and all else that a resume needs, is left out")
    return lost


def arguments_of(model: MaskedAutoencoderViT) -> dict[str, Any]:
    """What makes a pretraining model of the same shape."""
    first: Any = model.blocks[0]
    decoder: Any = model.decoder_blocks[0]
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
    }


@torch.inference_mode()
def outputs_of(model: Any, source: LoadedModel) -> dict[str, Tensor]:
    """What a model of ours gives for the random images, by name."""
    images = source.images()
    if source.part == "decoder":
        # As transformers masks: the largest three quarters of the noise.
        noise = source.noise()
        visible = max(1, int(noise.shape[1] * 0.25))
        mask = noise.argsort(dim=1).argsort(dim=1) >= visible
        out = model(images, mask)
        return {"loss": out["loss"], "pred": out["pred"]}
    if source.part == "head":
        return {"logits": model(images)}
    tokens = model.forward_features(images)
    return {"features": model.forward_head(tokens), "tokens": tokens}


def about(source: LoadedModel, *, ours: bool = True) -> dict[str, Any]:
    """What a file has to say beside its weights, for us to read it again; plain types.

    Args:
        ours: the model as it is; else a plain one, with its positions baked.
    """
    arguments = {
        k: list(v) if isinstance(v, tuple) else v
        for k, v in source.arguments.items()
        # Positions that were not made by our formula must not be made again by it.
        if k != "pos_offset" or (ours and "pos_offset" in source.state.get("model_args", {}))
    }
    if not ours:
        arguments["lscale_init"] = None
    said = {"model_args": arguments, "norm_eps": source.eps}
    if ours and source.part == "decoder":
        said["model_name"] = source.state.get("model_name")
    for name, wanted in (("classes", source.part == "head"), ("data", True)):
        if wanted and name in source.state:
            said[name] = source.state[name]
    return said


def write_and_compare(source: LoadedModel, path: Path, state: dict[str, Any]) -> str:
    """Write a file, read it again as any of that style, and see that it is the same function."""
    with appearing(path) as temporary:
        write_signed(temporary, state)
        again = load_state(str(temporary))
        if source.part == "decoder":
            model, _ = models_zoo.autoencoder_of(again, str(path))
        else:
            head = "own" if source.part == "head" else "none"
            model, _, _ = models_zoo.classifier_of(again, str(path), head=head)
        return check_same(
            outputs_of(source.model, source),
            outputs_of(model.eval(), source),
            BOUND,
            "the new file",
        )


@torch.inference_mode()
def outputs_of_transformers(model: Any, source: LoadedModel) -> dict[str, Tensor]:
    """As `outputs_of`, of a model of transformers; of an encoder the tokens alone."""
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


def check_reading(source: LoadedModel, path: str) -> str | None:
    """Compare what was read with what its own program computes, where that can be asked.

    Returns:
        a line that says how equal they are, or None: official and mmsegmentation files say nothing
        of their code, and timm's encoder is ours.

    Raises:
        BadInput: the outputs differ.
    """
    place = local_file(path)
    expected = outputs_of(source.model, source)
    if place.suffix == ".onnx":
        names = list(expected)
        found = run_onnx(place, source.images(), names)
        return check_same(expected, found, LOOSE, "the ONNX file")
    folder = place if place.is_dir() else place.parent
    if source.state["style"] != "transformers" or not (folder / CONFIG).is_file():
        return None
    library = needs("transformers", "transformers")
    kind = read_json(folder / CONFIG).get("architectures", ["ViTModel"])[0]
    theirs = getattr(library, kind).from_pretrained(folder).eval()
    found = outputs_of_transformers(theirs, source)
    return check_same({name: expected[name] for name in found}, found, LOOSE, "transformers")


# ---- Targets -------------------------------------------------------------------------------------
# Each writes to a temporary name, has what it wrote read again, and compares; it returns the lines
# to print.


def to_timm(source: LoadedModel, path: Path, args: argparse.Namespace) -> list[str]:
    """A plain ViT of timm, a file or a folder as on its hub, and the call that loads it."""
    kept = source.arguments
    weights = source.plain_weights(keep_lscale=args.keep_lscale)
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
    seen = source.preprocessing().for_timm()
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
            outputs_of(source.model, source), outputs_of(theirs.eval(), source), bound, "timm"
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


def to_official(source: LoadedModel, path: Path, args: argparse.Namespace) -> list[str]:
    """The layout of the official MAE code: `{"model": ...}`, a probe with its BatchNorm."""
    kept = source.arguments
    sides = (*kept["img_size"], *kept["patch_size"])
    if sides[0] != sides[1] or sides[2] != sides[3] or source.eps != EPS:
        raise BadInput(
            f"the official MAE code has square images and patches and an epsilon of {EPS}, this "
            f"model {kept['img_size']}, {kept['patch_size']} and {source.eps}; use --to timm"
        )
    weights = source.plain_weights(keep_probe=True)
    # The official code takes `model` and passes over what we need to read it again.
    line = write_and_compare(source, path, {"model": weights, **about(source, ours=False)})
    name = OFFICIAL_SIZES.get((kept["embed_dim"], kept["depth"], sides[2]))
    prefix = "mae_vit" if source.part == "decoder" else "vit"
    called = f"{prefix}_{name}_patch{sides[2]}" if name else "none of its models has this size"
    return [line, f"the official code's --model: {called}, --input_size {sides[0]}"]


def to_mmsegmentation(source: LoadedModel, path: Path, args: argparse.Namespace) -> list[str]:
    """mmsegmentation's names, and the backbone that they are of."""
    kept = source.arguments
    (ph, pw), ratio = kept["patch_size"], kept["mlp_ratio"]
    if ph != pw or ratio != int(ratio):
        raise BadInput(
            f"mmsegmentation takes square patches and a whole mlp_ratio, not {(ph, pw)} and "
            f"{ratio}; use --to timm"
        )
    named = to_mmseg(source.plain_weights(keep_lscale=True))
    line = write_and_compare(source, path, {"state_dict": named, **about(source, ours=False)})
    backbone = (
        f"backbone=dict(type='MAE', img_size={kept['img_size']}, patch_size={ph}, "
        f"in_channels={kept['in_chans']}, embed_dims={kept['embed_dim']}, "
        f"num_layers={kept['depth']}, num_heads={kept['num_heads']}, mlp_ratio={int(ratio)}, "
        f"init_values=1.0, norm_cfg=dict(type='LN', eps={source.eps}), "
        f"init_cfg=dict(type='Pretrained', checkpoint={str(path)!r}))"
    )
    return [line, backbone]


def to_folder(source: LoadedModel, path: Path, args: argparse.Namespace) -> list[str]:
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
    config = config_of(kept, source.eps, classes if source.part == "head" else None)
    with appearing(path) as temporary:
        save_folder(temporary, to_transformers(weights), config)
        seen = json.dumps(source.preprocessing().for_transformers(), indent=2)
        (temporary / PREPROCESSOR).write_text(f"{seen}\n")
        kind = getattr(library, config["architectures"][0])
        theirs, loading = kind.from_pretrained(temporary, output_loading_info=True)
        wrong = {k: sorted(map(str, v)) for k, v in loading.items() if v}
        if wrong:
            raise BadInput(f"not written: transformers does not take these weights: {wrong}")
        line = check_same(
            outputs_of(source.model, source),
            outputs_of_transformers(theirs.eval(), source),
            LOOSE,
            "transformers",
        )
    return [line, f"transformers.{kind.__name__}.from_pretrained({str(path)!r})"]


class Graph(nn.Module):
    """What goes into an ONNX file: logits; or the pooled features, and all tokens."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        """[B, C, H, W] to [B, classes]; or to [B, D] and [B, 1 + L, D]."""
        if self.model.num_classes:
            return self.model(images)
        tokens = self.model.forward_features(images)
        return self.model.forward_head(tokens), tokens


def to_onnx(source: LoadedModel, path: Path, args: argparse.Namespace) -> list[str]:
    """An ONNX file, checked with onnxruntime on batches of other sizes."""
    expected = outputs_of(source.model, source)
    names = list(expected)
    entry = {**about(source), "keys": list(source.model.state_dict())}
    with appearing(path) as temporary:
        save_onnx(temporary, Graph(source.model).eval(), source.images(), names, entry)
        line = check_same(expected, run_onnx(temporary, source.images(), names), LOOSE, "ONNX")
        one = {name: value[:1] for name, value in expected.items()}
        check_same(one, run_onnx(temporary, source.images()[:1], names), LOOSE, "ONNX of one image")
    shape = ["batch", *source.images().shape[1:]]
    return [
        line,
        f"images float32 {shape} -> {', '.join(names)}; LScale and probe are in the graph",
    ]


def to_mmae(source: LoadedModel, path: Path, args: argparse.Namespace) -> list[str]:
    """A file of ours: every tensor as it was."""
    state = {"task": "export", "step": 0, **about(source), "model": source.model.state_dict()}
    return [write_and_compare(source, path, state)]


TARGETS: dict[str, Callable[[LoadedModel, Path, argparse.Namespace], list[str]]] = {
    "timm": to_timm,
    "transformers": to_folder,
    "mmseg": to_mmsegmentation,
    "official": to_official,
    "onnx": to_onnx,
    "mmae": to_mmae,
}
SUFFIXES = {"timm": (".pth", ".safetensors", ""), "onnx": (".onnx",)}


def words_of_images(source: LoadedModel) -> str:
    """How images are to be prepared, for a reader who does it by hand."""
    kept, data = source.arguments, source.state.get("data", {})
    seen, said = preprocessing_of(data, pair(kept["img_size"]), kept["in_chans"])
    whose = "" if said else " (ImageNet's, for the file says none)"
    return (
        f"scaled (bicubic) to cover {seen.size[0]} x {seen.size[1]} / {seen.share:g}, centre crop; "
        f"0..1, then less mean {seen.mean}, over deviation {seen.std}{whose}"
    )


def check_flags(args: argparse.Namespace) -> None:
    """See that the flags can work together.

    Raises:
        BadInput: they cannot.
    """
    for name in ("checkpoint", "to", "output"):
        if not getattr(args, name):
            raise BadInput(f"--{name} is missing")
    suffixes = SUFFIXES.get(args.to, (".pth",))
    path = Path(args.output)
    if path.suffix not in suffixes and args.to != "transformers":
        known = [suffix or "nothing (a folder)" for suffix in suffixes]
        raise BadInput(f"--output {path} must end in {' or '.join(known)} for --to {args.to}")
    if args.keep_lscale and args.to not in ("timm", "mmseg"):
        raise BadInput(f"--keep_lscale is for timm; --to {args.to} folds LScale or always keeps it")
    if not path.name:
        raise BadInput(f"--output {path} is no name of a file or of a new folder")
    if path.exists() and path.resolve() == weights_file(args.checkpoint).resolve():
        raise BadInput(f"--output {path} is the --checkpoint itself; choose another name")
    if path.is_file() and path.name.startswith("checkpoint-") and peek(path) is not None:
        raise BadInput(f"--output {path} is a checkpoint of a run; choose another name")


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Write one file for another program; see the module."""
    load_plugins(argv)
    args = build_parser().parse(argv)
    check_flags(args)
    segmenter = read_segmenter(args)
    if segmenter is not None:
        return write_segmenter(*segmenter, Path(args.output), args)
    source = read_source(args)
    # At another size a file of another program has no answer to compare with.
    read = check_reading(source, args.checkpoint) if args.input_size is None else None
    path = Path(args.output)
    lines = TARGETS[args.to](source, path, args)
    print_text(f"{args.checkpoint}: {source.part} to {args.to}")
    print_text("\n".join(f"lost      {what}" for what in source.lost) or "lost      nothing")
    if read is not None:
        print_text(f"read      {read}")
    print_text(f"verified  {lines[0]}")
    print_text(f"written   {path}")
    print_text(f"images    {words_of_images(source)}")
    if len(lines) > 1:
        print_text(lines[1])


if __name__ == "__main__":
    main()
