"""The one list of model names; from a name, or from a file of weights, to a model."""

from collections.abc import Mapping
from inspect import signature
from typing import Any

from torch import nn

from models_layers import pair
from models_mmae import MaskedAutoencoderViT
from models_protocols import PretrainModel
from models_upernet import UperNet
from models_vit import VisionTransformer
from util.errors import BadInput
from util.names import Registry, did_you_mean
from util.spec import Pair
from util.train.checkpoint import load_weights
from util.weights.assumed import ASSUMED, settle_number
from util.weights.convert import (
    HEAD_KEYS,
    NORM_KEYS,
    flags_of,
    grid_of,
    in_our_names,
    read_encoder,
)
from util.weights.convert_names import EPS
from util.weights.files import load_state
from util.weights.load_table import LOADED, Loading, positions_resized

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
        known = {one: kind for kind in reversed(classes) for one in list_methods(kind)}
        if method not in known:
            raise BadInput(
                f"argument --method: invalid choice: {method!r}{did_you_mean(method, known)}; "
                f"choose from {', '.join(dict.fromkeys(known))}"
            )
        kind = known[method]
    first = next(name for name, (one, _) in MODELS.items() if one is kind)
    return kind, kind.default_model or first


def list_methods(kind: type[PretrainModel]) -> dict[str, Mapping[str, Any]]:
    """What `--method` can be with a class, the default first, and what each presets."""
    return dict(kind.methods) or {kind.__name__.lower(): {}}


def list_models() -> list[str]:
    """All names of pretraining models."""
    return list(MODELS)


def list_classifiers() -> list[str]:
    """All names of encoders with a head."""
    return list(CLASSIFIERS)


# Of `UperNet` beside its encoder; the other arguments of a segmenter are `VisionTransformer`'s.
SEGMENTER_ARGUMENTS = (
    "num_classes",
    "taps",
    "channels",
    "aux_channels",
    "aux_tap",
    "dropout",
    "pool_scales",
    "relative_bias",
)


def list_segmenters() -> list[str]:
    """All names of encoders that `create_segmenter` takes."""
    return list(CLASSIFIERS)


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
    if name not in CLASSIFIERS:
        hint = did_you_mean(name, CLASSIFIERS)
        raise BadInput(
            f"unknown encoder {name!r}{hint}; UPerNet takes: {', '.join(list_segmenters())}"
        )
    return segmenter_from(CLASSIFIERS[name][1] | kwargs | {"num_classes": num_classes})


def segmenter_from(arguments: Mapping[str, Any]) -> UperNet:
    """UPerNet of arguments alone, as `UperNet.arguments` gives them and checkpoints hold them."""
    heads = {k: v for k, v in arguments.items() if k in SEGMENTER_ARGUMENTS}
    encoder = {k: v for k, v in arguments.items() if k not in SEGMENTER_ARGUMENTS}
    return UperNet(VisionTransformer(**encoder, num_classes=0), **heads)


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
    own = read_encoder(state, pretrained, kwargs.get("img_size")).classes
    wanted = kwargs.get("num_classes")
    head = "new" if wanted and wanted != own else ("none" if wanted == 0 or not own else "own")
    return classifier_of(state, pretrained, name, head=head, **kwargs)[0]


def load_pretrained(
    path: str, name: str | None = None, *, weights_key: str | None = None, **overrides: Any
) -> tuple[Any, dict[str, Any]]:
    """A masked autoencoder with its decoder, from a file of weights.

    Ours say what they are, and so do folders of transformers. Official MAE files (`{"model": ...}`)
    say it in the `Namespace` beside the weights or not at all; then `name` does, or the one listed
    model of these shapes.

    Args:
        path: checkpoint file, folder of transformers, or https URL.
        name: model name, for weights that do not say.
        weights_key: which weights of a file that holds several, see `util.weights.nested_weights`.
        overrides: arguments of the model, for weights that do not say; None is ignored.

    Returns:
        the model, on the CPU, and what else the file holds, with what was assumed of it under
        `ASSUMED` (see `util.weights.assumed.assumptions`) and what was taken from it under
        `LOADED`.

    Raises:
        BadInput: unreadable, unnamed or encoder-only weights, or weights that do not fit.
    """
    return autoencoder_of(load_state(path, weights_key), path, name, **overrides)


def autoencoder_of(
    state: dict[str, Any], path: str, name: str | None = None, **overrides: Any
) -> tuple[Any, dict[str, Any]]:
    """`load_pretrained` of what `load_state` has read."""
    named = in_our_names(state, path)
    weights = named["model"]
    if not any(key.startswith("decoder_") for key in weights):
        raise BadInput(
            f"{path} holds no decoder: encoder-only weights cannot reconstruct; use a pretraining "
            "checkpoint of ours or official weights with their decoder (mae_visualize_*)"
        )
    flags = flags_of(state)
    given = {k: v for k, v in overrides.items() if v is not None}
    arguments = dict(state.get("model_args", {}))
    if "model_args" in state:
        for key in given.keys() & {"num_heads", "decoder_num_heads"}:
            heads, _ = settle_number(key, arguments.get(key), given[key], lambda: (0, ""), path)
            arguments[key] = heads
        said = state.get("model_name")
        if name and said and said != name:
            raise BadInput(f"{path} is a {said}, not a {name}; leave --model out")
        if name and not said and name in MODELS:
            _check_name(name, arguments | {"patch_size": pair(arguments["patch_size"])}, path)
    else:
        reason = "--model" if name else "its flags" if flags.get("model") else "its shapes"
        name = name or flags.get("model") or _name_of(weights)
        if name is None:
            raise BadInput(
                f"{path} does not say which model it is; name it, for example --model {DEFAULT}"
            )
        arguments = model_arguments(name)
        arguments["norm_pix_loss"] = flags.get("norm_pix_loss", False)
        arguments["img_size"] = flags.get("input_size", _side_of(weights, arguments))
        state[ASSUMED] = _assumed_of(arguments, f"as {name}, by {reason}", flags | given)
        arguments |= given
    name = name or state.get("model_name")
    kind, known = MODELS.get(name or "", (MaskedAutoencoderViT, {}))
    if strange := sorted(map(str, arguments.keys() - signature(kind).parameters.keys())):
        raise BadInput(f"{path} says of its model what ours has not: {', '.join(strange)}")
    model = kind(**(known | arguments))
    load_weights(model, weights, path)
    state[LOADED] = Loading().lines(model, named)
    _match_eps(model, state.get("norm_eps", EPS))
    return model, state


def _assumed_of(arguments: Mapping[str, Any], reason: str, said: Mapping[str, Any]) -> list[str]:
    """What is taken for granted of an autoencoder whose file has weights alone.

    Args:
        reason: from what its heads are known. said: what the file's flags or the user say.
    """
    heads = [n for n in ("num_heads", "decoder_num_heads") if n not in said]
    texts = [f"{n} {arguments[n]} ({reason}; else --{n} N)" for n in heads]
    if "norm_pix_loss" not in said:
        texts.append("pixels predicted as they are (else --norm_pix_loss)")
    size = arguments["img_size"]
    if "input_size" not in said and "img_size" not in said:
        texts.append(f"images of {' x '.join(map(str, pair(size)))} (square)")
    return [*texts, f"LayerNorm eps {EPS:g}", "GELU"]


def _name_of(weights: Mapping[str, Any]) -> str | None:
    """The listed autoencoder of these shapes; None: no or several, or not the official names."""
    projection, embed = weights.get("patch_embed.proj.weight"), weights.get("decoder_embed.weight")
    if projection is None or projection.ndim != 4 or embed is None or not embed.ndim:
        return None
    depths = [
        len({key.split(".")[1] for key in weights if key.startswith(trunk)})
        for trunk in ("blocks.", "decoder_blocks.")
    ]
    found = (projection.shape[0], projection.shape[2], projection.shape[3], *depths, len(embed))
    names = [
        name
        for name, (_, known) in MODELS.items()
        if found
        == (
            known["embed_dim"],
            *pair(known["patch_size"]),
            known["depth"],
            known["decoder_depth"],
            known["decoder_embed_dim"],
        )
    ]
    return names[0] if len(names) == 1 else None


def _side_of(weights: Mapping[str, Any], arguments: dict[str, Any]) -> Any:
    """The image side of a square grid of positions; the model's own where they are none."""
    table, patch = weights.get("pos_embed"), pair(arguments["patch_size"])
    grid = None if table is None else grid_of(table.shape[1] - 1, patch, None, None)
    return arguments["img_size"] if grid is None else (grid[0] * patch[0], grid[1] * patch[1])


def _match_eps(model: nn.Module, eps: float) -> None:
    """Give the LayerNorms the epsilon of the file, where it is not MAE's."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps


def load_classifier(
    path: str,
    name: str | None = None,
    *,
    head: str = "new",
    img_size: Pair | None = None,
    pos_resize: str = "rescale",
    num_heads: int | None = None,
    weights_key: str | None = None,
    **overrides: Any,
) -> tuple[VisionTransformer, dict[str, Any], dict[str, Any]]:
    """An encoder with a head, from any file of weights that `util.weights.files.load_state` reads.

    Size, LScale and positions are the file's. Heads of attention are not in foreign files: they
    are `num_heads`, or the name's, or those of our model of that width and depth, or one for every
    64 channels.

    Args:
        path: checkpoint file, folder of transformers, or https URL.
        name: model name that the file has to agree with; None: whatever it is.
        head: own: the file's head; new: a fresh one, and a fresh norm where the file has no such;
            none: features only.
        img_size: (height, width) to run at; None: the file's.
        pos_resize: rescale | extend, see `EncoderWeights.positions`.
        num_heads: of attention, for a file that does not say.
        weights_key: which weights of a file that holds several, see `util.weights.nested_weights`.
        overrides: `VisionTransformer`'s num_classes, global_pool, probe and drop_path; None is
            ignored.

    Returns:
        the model, on the CPU; its arguments in plain types; what else the file holds, with what was
        assumed of it under `ASSUMED` (see `util.weights.assumed.assumptions`) and what was taken
        from it under `LOADED` (see `util.weights.load_table`).

    Raises:
        BadInput: unreadable, of another architecture, with another number of heads, or weights that
            do not fit.

    The LayerNorms get the file's epsilon, but 1e-6 with a new head: what is trained here is ours.
    """
    return classifier_of(
        load_state(path, weights_key),
        path,
        name,
        head=head,
        img_size=img_size,
        pos_resize=pos_resize,
        num_heads=num_heads,
        **overrides,
    )


def classifier_of(
    state: dict[str, Any],
    path: str,
    name: str | None = None,
    *,
    head: str = "new",
    img_size: Pair | None = None,
    pos_resize: str = "rescale",
    num_heads: int | None = None,
    **overrides: Any,
) -> tuple[VisionTransformer, dict[str, Any], dict[str, Any]]:
    """`load_classifier` of what `load_state` has read."""
    for what, given, known in (
        ("head", head, ("own", "new", "none")),
        ("pos_resize", pos_resize, ("rescale", "extend")),
    ):
        if given not in known:
            raise BadInput(f"unknown {what} {given!r}, choose from {', '.join(known)}")
    stored = read_encoder(state, path, img_size)
    heads, assumed = settle_heads(stored.arguments, path, name, num_heads)
    state[ASSUMED] = assumed + stored.assumed
    arguments = stored.arguments | {"num_heads": heads}
    _check_name(name, arguments, path)
    if head == "own" and not stored.classes:
        raise BadInput(f"{path} holds no classification head; fine-tune it first (--finetune)")
    arguments |= {"num_classes": stored.classes, "global_pool": stored.pool, "probe": stored.probe}
    if head == "none":
        arguments |= {"num_classes": 0, "probe": False}
    arguments |= {k: v for k, v in overrides.items() if v is not None}
    arguments["img_size"] = img_size or arguments["img_size"]
    arguments = {k: list(v) if isinstance(v, tuple) else v for k, v in arguments.items()}
    model = VisionTransformer(**arguments)
    weights = dict(stored.weights)
    weights["pos_embed"] = stored.positions(model.grid, pos_resize)
    loading = Loading(resized=positions_resized(model.grid, stored.grid, pos_resize))
    if head != "own":
        weights = {k: v for k, v in weights.items() if not k.startswith(HEAD_KEYS)}
        fresh = (*HEAD_KEYS, NORM_KEYS["avg"])
        own = model.state_dict()
        loading.new = [k for k in own if k.startswith(fresh) and k not in weights]
        weights |= {k: own[k] for k in loading.new}
        unused = NORM_KEYS["cls" if arguments["global_pool"] == "avg" else "avg"]
        weights = {k: v for k, v in weights.items() if not k.startswith(unused)}
    load_weights(model, weights, path)
    named = in_our_names(state, path)
    loading.left = [k for k in named["model"] if k not in weights or k in loading.new]
    state[LOADED] = loading.lines(model, named)
    if head != "new":
        _match_eps(model, stored.eps)
    return model, arguments, state


def load_encoder(
    path: str,
    name: str | None = None,
    *,
    img_size: Pair | None = None,
    pos_resize: str = "rescale",
    num_heads: int | None = None,
    weights_key: str | None = None,
) -> tuple[VisionTransformer, dict[str, Any]]:
    """An encoder for its features, from any file that `load_classifier` takes; arguments as there.

    Returns:
        the model without a head, on the CPU; what else the file holds.
    """
    model, _, state = load_classifier(
        path,
        name,
        head="none",
        img_size=img_size,
        pos_resize=pos_resize,
        num_heads=num_heads,
        weights_key=weights_key,
    )
    return model, state


def settle_heads(
    stored: Mapping[str, Any], path: str, name: str | None, given: int | None
) -> tuple[int, list[str]]:
    """Attention heads of an encoder, and what was assumed of them: the shapes do not tell.

    Args:
        stored: the encoder's arguments, as far as the file says.
        name: model that it has to be, or None. given: what the user says, or None.

    Raises:
        BadInput: file and user contradict each other.
    """
    return settle_number(
        "num_heads",
        stored.get("num_heads"),
        given,
        lambda: _usual_heads(name, stored["embed_dim"], stored["depth"]),
        path,
    )


def _usual_heads(name: str | None, width: int, depth: int) -> tuple[int, str]:
    """Heads of the name, or our encoder's of that shape, or one for 64 channels; and from what."""
    if name is not None:
        return model_arguments(name)["num_heads"], f"as {name}"
    for size, (w, d, heads) in ENCODER_SIZES.items():
        if (w, d) == (width, depth):
            return heads, f"as ViT-{size} of width {width} and depth {depth}"
    return max(1, width // 64), f"one for 64 of {width} channels"


def _check_name(name: str | None, arguments: dict[str, Any], path: str) -> None:
    """Refuse weights of another architecture than the name's."""
    if name is None:
        return
    expected = model_arguments(name)
    expected["patch_size"] = pair(expected["patch_size"])
    differing = [
        f"{key} {arguments[key]}, {name} has {expected[key]}"
        for key in ("embed_dim", "depth", "num_heads", "patch_size")
        if arguments[key] != expected[key]
    ]
    if differing:
        raise BadInput(
            f"{path} is another architecture: {'; '.join(differing)}; leave --model out to take "
            "the file's"
        )
