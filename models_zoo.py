"""The one door to all models: from a name, or from a file of weights, to a model.

Names are in `models_registry`, files of weights are read by `models_load`; callers need neither.
"""

from collections.abc import Mapping
from typing import Any

from models_layers import pair
from models_load import (
    build_autoencoder,
    build_classifier,
    check_name,
    count_channels,
    count_classes,
    holds_decoder,
    load_classifier,
    load_encoder,
    load_pretrained,
    settle_heads,
)
from models_protocols import Encoder, PretrainModel
from models_registry import (
    CLASSIFIERS,
    DECODER_SIZES,
    DEFAULT,
    ENCODER_KINDS,
    ENCODER_SIZES,
    MAE_DECODER,
    MODELS,
    SIZES,
    describe_class,
    describe_kind,
    find_class,
    list_classifiers,
    list_methods,
    list_models,
    model_arguments,
    register_encoder,
    register_model,
)
from models_upernet import UperNet
from models_vit import VisionTransformer
from util.errors import BadInput
from util.names import did_you_mean
from util.weights.convert_upernet import SEGMENTER_ARGUMENTS
from util.weights.files import load_state

__all__ = [
    "CLASSIFIERS",
    "DECODER_SIZES",
    "DEFAULT",
    "ENCODER_KINDS",
    "ENCODER_SIZES",
    "MAE_DECODER",
    "MODELS",
    "SIZES",
    "Encoder",
    "PretrainModel",
    "build_autoencoder",
    "build_classifier",
    "check_name",
    "count_channels",
    "count_classes",
    "create_model",
    "create_segmenter",
    "describe_kind",
    "find_class",
    "holds_decoder",
    "list_classifiers",
    "list_methods",
    "list_models",
    "list_segmenters",
    "load_classifier",
    "load_encoder",
    "load_pretrained",
    "model_arguments",
    "register_encoder",
    "register_model",
    "segmenter_from",
    "settle_heads",
]


def list_segmenters() -> list[str]:
    """All names of encoders that `create_segmenter` takes."""
    return [
        name
        for name, (kind, _) in CLASSIFIERS.items()
        if kind is VisionTransformer or kind.pyramid is not Encoder.pyramid
    ]


def create_segmenter(name: str, num_classes: int, **kwargs: Any) -> UperNet:
    """UPerNet on an encoder that is called as a classifier is.

    >>> create_segmenter("vit_base_patch16", 150, img_size=512, drop_path=0.1)

    Args:
        num_classes: K, without an ignored label.
        kwargs: `UperNet`'s and `VisionTransformer`'s: img_size, the side of the training crop (the
            name's own otherwise), drop_path, lscale_init, channels, relative_bias ...

    Raises:
        BadInput: unknown name, or settings that do not fit.
    """
    if name not in list_segmenters():
        hint = did_you_mean(name, list_segmenters())
        raise BadInput(
            f"unknown encoder {name!r}{hint}; UPerNet takes: {', '.join(list_segmenters())}"
        )
    kind, arguments = CLASSIFIERS[name]
    described = {} if kind is VisionTransformer else describe_class(kind)
    return segmenter_from(described | arguments | kwargs | {"num_classes": num_classes})


def segmenter_from(arguments: Mapping[str, Any]) -> UperNet:
    """UPerNet of arguments alone, as `UperNet.arguments` gives them and checkpoints hold them."""
    heads = {k: v for k, v in arguments.items() if k in SEGMENTER_ARGUMENTS}
    encoder = {k: v for k, v in arguments.items() if k not in SEGMENTER_ARGUMENTS}
    if "encoder_kind" not in encoder:
        return UperNet(VisionTransformer(**encoder, num_classes=0), **heads)
    kind = ENCODER_KINDS.find(encoder["encoder_kind"])
    if kind.pyramid is Encoder.pyramid:
        raise BadInput(
            f"an encoder of kind {encoder['encoder_kind']} gives no maps for segmentation"
        )
    own = kind.for_any_size({k: v for k, v in encoder.items() if k != "encoder_kind"})
    own = {k: list(v) if isinstance(v, tuple) else v for k, v in own.items()}
    described = {"encoder_kind": encoder["encoder_kind"], **own}
    return UperNet(kind(**own, num_classes=0), encoder_arguments=described, **heads)


def create_model(
    name: str, pretrained: str | None = None, *, weights_key: str | None = None, **kwargs: Any
) -> Any:
    """A model (an `nn.Module`) by name; `kwargs` override what the name stands for.

    >>> create_model("mae_vit_base_patch16")  # MAE
    >>> create_model("mae_vit_base_patch16", lscale_init=0.1, pos_offset="learned")  # M-MAE
    >>> create_model("vit_base_patch16", num_classes=365)  # its encoder, with a head
    >>> create_model("vit_base_patch16", pretrained="RUN/checkpoint-last.pth")  # trained

    Args:
        pretrained: path or https URL of weights, see `util.weights.files.load_state`. They decide
            the architecture, which has to be the name's; `kwargs` are then those of
            `load_classifier` (num_classes, global_pool, probe, drop_path, img_size, pos_resize,
            num_heads) or, for a model with a decoder, of `load_pretrained`. Without `num_classes`
            the head is the file's, or none.
        weights_key: which weights of a file that holds several, see `util.weights.nested_weights`.

    Raises:
        BadInput: unknown name, settings or weights that do not fit.
    """
    arguments = model_arguments(name) | kwargs
    if pretrained is None and weights_key is not None:
        raise BadInput(f"weights_key {weights_key} without pretrained: there is no file to look in")
    if pretrained is None:
        return {**MODELS, **CLASSIFIERS}[name][0](**arguments)
    if name in MODELS:
        model, state = load_pretrained(pretrained, name, weights_key=weights_key, **kwargs)
        said = state.get("model_args", kwargs)
        for key, value in kwargs.items():
            if said.get(key) not in (value, list(value) if isinstance(value, tuple) else value):
                raise BadInput(f"{key} of {pretrained} is {said.get(key)}, not {value}")
        return model
    taken = {"num_classes", "global_pool", "probe", "drop_path", "img_size", "pos_resize"}
    taken.add("num_heads")
    if fixed := sorted(kwargs.keys() - taken):
        raise BadInput(
            f"{', '.join(fixed)} come with the weights of {pretrained}; what may be given beside "
            f"them: {', '.join(sorted(taken))}"
        )
    if kwargs.get("img_size") is not None:
        kwargs["img_size"] = pair(kwargs["img_size"])
    state = load_state(pretrained, weights_key)
    own = count_classes(state, pretrained, kwargs.get("img_size"))
    wanted = kwargs.get("num_classes")
    head = "new" if wanted and wanted != own else ("none" if wanted == 0 or not own else "own")
    return build_classifier(state, pretrained, name, head=head, **kwargs)[0]
