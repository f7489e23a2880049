"""Names of models: which class one stands for, and which arguments of it.

Whoever creates or loads a model calls `models_zoo`.
"""

from collections.abc import Mapping
from typing import Any

import models_pixio
import models_simmim
import models_swin
import models_swin_names
import models_vit_names
import models_vit_relative
import models_vit_relative_names
from models_mmae import MaskedAutoencoderViT
from models_protocols import Encoder, PretrainModel
from models_vit import VisionTransformer
from util.errors import BadInput
from util.names import Registry, did_you_mean
from util.styles import STYLES

DEFAULT = "mae_vit_base_patch16"

# Sizes of encoders: width, depth, heads. Base, large and huge as in ViT and MAE; tiny and small as
# in DeiT.
ENCODER_SIZES = {
    "micro": (128, 4, 4),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
# Decoders: width, depth, heads. MAE's is 512, 8, 16; smaller encoders get a lighter one.
DECODER_SIZES = {"micro": (96, 2, 4), "tiny": (128, 4, 4), "small": (256, 4, 8)}
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
    embed_dim, depth, num_heads = ENCODER_SIZES[size]
    decoder_embed_dim, decoder_depth, decoder_num_heads = DECODER_SIZES.get(size, MAE_DECODER)
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


Named = tuple[type[Any], dict[str, Any]]  # a class, and what a name stands for of its arguments

# Pretraining models, see `models_protocols.PretrainModel`.
MODELS: Registry[Named] = Registry(
    "model",
    {
        f"mae_vit_{size}_patch{patch}": (MaskedAutoencoderViT, _mae(size, patch, side))
        for size, patches in SIZES.items()
        for patch, side in patches.items()
    },
)


def _vit(size: str, patch_size: int, img_size: int) -> dict[str, Any]:
    arguments = _mae(size, patch_size, img_size)
    return {k: v for k, v in arguments.items() if not k.startswith("decoder_")}


# Encoders with a head.
CLASSIFIERS: Registry[Named] = Registry(
    "encoder",
    {
        f"vit_{size}_patch{patch}": (VisionTransformer, _vit(size, patch, side))
        for size, patches in SIZES.items()
        for patch, side in patches.items()
    },
)


# Classes of encoders by `EncoderState.kind`.
ENCODER_KINDS: Registry[type[Any]] = Registry("kind of encoder", {"vit": VisionTransformer})
# Whose names weights of them can have; what several would recognise is the first one's.
for _styles in (models_swin_names.STYLES, models_vit_relative_names.STYLES):
    for _program, _style in _styles.items():
        STYLES.add(_program, _style)
STYLES.add("transformers", models_vit_names.TRANSFORMERS)
STYLES.add("mmseg", models_vit_names.MMSEG)


def register_encoder(kind: str, encoder: type[Encoder], **names: Mapping[str, Any]) -> None:
    """Give a class of encoders its kind, which `EncoderState.kind` says and checkpoints hold.

    Args:
        names: names for `main_finetune.py --model`, each with what it stands for of the class's
            arguments.

    Raises:
        BadInput: a name is taken, or the class is no `Encoder`.
    """
    if not (isinstance(encoder, type) and issubclass(encoder, Encoder)):
        raise BadInput(f"encoder {kind!r} must be a subclass of models_protocols.Encoder")
    ENCODER_KINDS.add(kind, encoder)
    for name, arguments in names.items():
        CLASSIFIERS.add(name, (encoder, dict(arguments)))


def describe_kind(model: Any) -> dict[str, str]:
    """What a checkpoint holds of an encoder's kind: nothing of a vision transformer's."""
    return describe_class(type(model))


def describe_class(encoder: type) -> dict[str, str]:
    """The same of an encoder's class."""
    # A sharded model's class is a subclass that torch made.
    kinds = {known: kind for kind, known in ENCODER_KINDS.items()}
    kind = next(kinds[parent] for parent in encoder.__mro__ if parent in kinds)
    return {} if kind == "vit" else {"encoder_kind": kind}


def register_model(name: str, model: type[PretrainModel], **arguments: Any) -> None:
    """Give a pretraining model a name, which stands for these arguments of its constructor.

    Raises:
        BadInput: the name is taken, or the class is no `PretrainModel`.
    """
    if not (isinstance(model, type) and issubclass(model, PretrainModel)):
        raise BadInput(f"model {name!r} must be a subclass of models_protocols.PretrainModel")
    if name in CLASSIFIERS:
        raise BadInput(f"model {name!r} is the name of an encoder; choose another")
    MODELS.add(name, (model, arguments))


def find_class(name: str | None, method: str | None) -> tuple[type[PretrainModel], str]:
    """The class of a pretraining model, and the name of the model itself.

    Args:
        name: of a model; None: the default of the method's class.
        method: `--method`; None: that of the name, or M-MAE.

    Raises:
        BadInput: unknown name or method.
    """
    classes = list(dict.fromkeys(kind for kind, _ in MODELS.values()))
    if name is not None:
        return MODELS.find(name)[0], name
    kind = MaskedAutoencoderViT
    if method is not None:
        known = {one: kind for kind in reversed(classes) for one in kind.presets({})}
        if method not in known:
            raise BadInput(
                f"argument --method: invalid choice: {method!r}{did_you_mean(method, known)}; "
                f"choose from {', '.join(dict.fromkeys(known))}"
            )
        kind = known[method]
    first = next(name for name, (one, _) in MODELS.items() if one is kind)
    return kind, kind.default_model or first


def list_methods(name: str) -> Mapping[str, Mapping[str, Any]]:
    """What `--method` can be with a pretraining model, the default first; and what each presets."""
    kind, arguments = MODELS.find(name)
    return kind.presets(arguments)


def list_models() -> list[str]:
    """All names of pretraining models."""
    return list(MODELS)


def list_classifiers() -> list[str]:
    """All names of encoders with a head."""
    return list(CLASSIFIERS)


def model_arguments(name: str) -> dict[str, Any]:
    """What the name stands for: the arguments of its class.

    Raises:
        BadInput: unknown name; the message lists the valid ones, the nearest first.
    """
    known = {**MODELS, **CLASSIFIERS}
    if name not in known:
        hint = did_you_mean(name, known)
        raise BadInput(f"unknown model {name!r}{hint}; valid names: {', '.join(known)}")
    return dict(known[name][1])


# ---- The methods and encoders beside M-MAE's -----------------------------------------------------

register_encoder("swin", models_swin.SwinTransformer, **models_swin.NAMES)
register_encoder(
    "vit_relative", models_vit_relative.RelativeVisionTransformer, **models_vit_relative.NAMES
)
for _name, _arguments in models_simmim.NAMES.items():
    register_model(_name, models_simmim.SimMIM, **_arguments)
for _name, _arguments in models_pixio.NAMES.items():
    register_model(_name, models_pixio.Pixio, **_arguments)
for _name, _arguments in models_pixio.ENCODERS.items():
    CLASSIFIERS.add(_name, (VisionTransformer, _arguments))
