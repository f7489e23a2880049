"""From a file of weights to a model: a masked autoencoder with its decoder, or its encoder."""

from collections.abc import Mapping
from inspect import signature
from typing import Any

from models_layers import pair
from models_load_kinds import (
    build_of_kind,
    cut_depth,
    find_whole,
    first_blocks,
    head_rows,
    load_kind,
    match_eps,
)
from models_mmae import MaskedAutoencoderViT
from models_protocols import PretrainModel
from models_registry import (
    DEFAULT,
    ENCODER_SIZES,
    MODELS,
    model_arguments,
)
from models_vit import VisionTransformer
from util.errors import BadInput
from util.spec import Pair
from util.styles import EPS
from util.train.checkpoint import load_file, load_weights
from util.weights.assumed import ASSUMED, settle_number
from util.weights.convert import (
    HEAD_KEYS,
    NORM_KEYS,
    PLACE,
    in_our_names,
    infer_grid,
    read_encoder,
    read_flags,
)
from util.weights.files import OPENERS, load_state, weights_file
from util.weights.load_table import LOADED, Loading, positions_resized
from util.weights.nested_weights import USUAL, NestedWeights


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
    state = read_pretraining(path)
    if state is not None and (model := rebuild(state, path)) is not None:
        if name is not None and name != state["model_name"]:
            raise BadInput(f"{path} is a {state['model_name']}, not a {name}; leave --model out")
        rest = {k: v for k, v in state.items() if k not in ("model", "optimizer")}
        return model, rest | {ASSUMED: [], LOADED: []}
    return build_autoencoder(load_state(path, weights_key, state), path, name, **overrides)


def read_pretraining(path: str) -> dict[str, Any] | None:
    """The contents of a file of weights; None: it is a folder, or of a kind that has no dict."""
    place = weights_file(path)
    return load_file(place) if place.is_file() and place.suffix != ".onnx" else None


def rebuild(state: Mapping[str, Any], path: str) -> PretrainModel | None:
    """The model of a pretraining of ours, or of its export; None: M-MAE's, as other files hold it.

    Raises:
        BadInput: weights that do not fit.
    """
    name = state.get("model_name")
    ours = state.get("task") in ("pretrain", "export")
    if not ours or not isinstance(name, str) or name not in MODELS:
        return None
    kind, known = MODELS[name]
    if issubclass(kind, MaskedAutoencoderViT) and not overrides_encoder(kind):
        return None
    model = kind(**(known | state["model_args"]))
    load_weights(model, state["model"], path)
    return model


def overrides_encoder(kind: type[MaskedAutoencoderViT]) -> bool:
    """Whether a subclass makes the encoder otherwise, which then only it can say."""
    own = kind.__mro__[: kind.__mro__.index(MaskedAutoencoderViT)]
    names = ("__init__", "encoder_state", "position_code")
    return any(name in vars(one) for one in own for name in names)


def open_encoder(state: dict[str, Any], path: str) -> dict[str, Any] | None:
    """A file of ours as one of its encoder, where the names in it are its method's own.

    Returns:
        None: the file is read by the names of its weights, as those of other programs are.
    """
    said: dict[str, Any] = {"style": "timm", "notes": []}
    if state.get("encoder_kind", "vit") != "vit":  # fine-tuned
        place = NestedWeights(path, USUAL[:1], "", "", dict(state["model"]))
        return state | said | {ASSUMED: [], LOADED: [], PLACE: place}
    model = rebuild(state, path)
    if model is None:
        return None
    found = model.encoder_state()
    inside = {tensor.data_ptr() for tensor in found.weights.values()}
    beside = {n: t for n, t in model.state_dict().items() if t.data_ptr() not in inside}
    place = NestedWeights(path, USUAL[:1], "", "", dict(found.weights), beside)
    parts = {
        "encoder_kind": found.kind,
        "model": dict(found.weights),
        "model_args": dict(found.arguments),
    }
    if found.kind != "vit":
        parts |= said | {PLACE: place}
    return state | parts


OPENERS.append(open_encoder)


def holds_decoder(state: Mapping[str, Any]) -> bool:
    """Whether a file, as `load_state` has read it, also holds what predicts."""
    if state.get("encoder_kind", "vit") == "vit":
        return any(name.startswith("decoder_") for name in state["model"])
    return state.get("model_name") in MODELS or find_whole(state) is not None


def build_autoencoder(
    state: dict[str, Any], path: str, name: str | None = None, **overrides: Any
) -> tuple[Any, dict[str, Any]]:
    """`load_pretrained` of what `load_state` has read."""
    if state.get("encoder_kind", "vit") != "vit":
        return build_of_kind(state, path, name)
    named = in_our_names(state, path)
    weights = named["model"]
    if not any(key.startswith("decoder_") for key in weights):
        raise BadInput(
            f"{path} holds no decoder: encoder-only weights cannot reconstruct; use a pretraining "
            "checkpoint of ours or official weights with their decoder (mae_visualize_*)"
        )
    flags = read_flags(state)
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
            check_name(name, arguments | {"patch_size": pair(arguments["patch_size"])}, path)
    else:
        reason = "--model" if name else "its flags" if flags.get("model") else "its shapes"
        said = flags.get("model")
        name = name or (said if said in MODELS else _find_name(weights))
        if name is None:
            raise BadInput(
                f"{path} does not say which model it is; name it, for example --model {DEFAULT}"
            )
        arguments = model_arguments(name)
        arguments["norm_pix_loss"] = flags.get("norm_pix_loss", False)
        if "cls_token" in weights:
            arguments["cls_tokens"] = weights["cls_token"].shape[1]
        arguments["img_size"] = flags.get("input_size", _find_side(weights, arguments))
        state[ASSUMED] = _list_assumptions(arguments, f"as {name}, by {reason}", flags | given)
        arguments |= given
    name = name or state.get("model_name")
    kind, known = MODELS.get(name or "", (MaskedAutoencoderViT, {}))
    if strange := sorted(map(str, arguments.keys() - signature(kind).parameters.keys())):
        raise BadInput(f"{path} describes a model that ours cannot be: {', '.join(strange)}")
    model = kind(**(known | arguments))
    load_weights(model, weights, path)
    state[LOADED] = Loading().lines(model, named)
    match_eps(model, state.get("norm_eps", EPS))
    return model, state


def _list_assumptions(
    arguments: Mapping[str, Any], reason: str, said: Mapping[str, Any]
) -> list[str]:
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


def _find_name(weights: Mapping[str, Any]) -> str | None:
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
        for name, (kind, known) in MODELS.items()
        if issubclass(kind, MaskedAutoencoderViT)
        and found
        == (
            known["embed_dim"],
            *pair(known["patch_size"]),
            known["depth"],
            known["decoder_depth"],
            known["decoder_embed_dim"],
        )
    ]
    return names[0] if len(names) == 1 else None


def _find_side(weights: Mapping[str, Any], arguments: dict[str, Any]) -> Any:
    """The image side of a square grid of positions; the model's own where they are none."""
    table, patch = weights.get("pos_embed"), pair(arguments["patch_size"])
    first = arguments.get("cls_tokens", 1)
    grid = None if table is None else infer_grid(table.shape[1] - first, patch, None, None)
    return arguments["img_size"] if grid is None else (grid[0] * patch[0], grid[1] * patch[1])


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
    return build_classifier(
        load_state(path, weights_key),
        path,
        name,
        head=head,
        img_size=img_size,
        pos_resize=pos_resize,
        num_heads=num_heads,
        **overrides,
    )


def build_classifier(
    state: dict[str, Any],
    path: str,
    name: str | None = None,
    *,
    head: str = "new",
    img_size: Pair | None = None,
    pos_resize: str = "rescale",
    num_heads: int | None = None,
    blocks: int | None = None,
    **overrides: Any,
) -> tuple[VisionTransformer, dict[str, Any], dict[str, Any]]:
    """`load_classifier` of what `load_state` has read.

    Args:
        blocks: the first so many alone, without the final norm; None: all.
    """
    for what, given, known in (
        ("head", head, ("own", "new", "none")),
        ("pos_resize", pos_resize, ("rescale", "extend")),
    ):
        if given not in known:
            raise BadInput(f"unknown {what} {given!r}, choose from {', '.join(known)}")
    if state.get("encoder_kind", "vit") != "vit":
        return load_kind(
            state, path, name, head, img_size, pos_resize, num_heads, blocks, overrides
        )
    stored = read_encoder(state, path, img_size)
    heads, assumed = settle_heads(stored.arguments, path, name, num_heads)
    state[ASSUMED] = assumed + stored.assumed
    arguments = stored.arguments | {"num_heads": heads}
    check_name(name, arguments, path)
    if head == "own" and not stored.classes:
        raise BadInput(f"{path} holds no classification head; fine-tune it first (--finetune)")
    arguments |= {"num_classes": stored.classes, "global_pool": stored.pool, "probe": stored.probe}
    if head == "none":
        arguments |= {"num_classes": 0, "probe": False}
    arguments |= {k: v for k, v in overrides.items() if v is not None}
    arguments["img_size"] = img_size or arguments["img_size"]
    arguments |= cut_depth(arguments, blocks, path)
    arguments = {k: list(v) if isinstance(v, tuple) else v for k, v in arguments.items()}
    model = VisionTransformer(**arguments)
    weights = first_blocks(stored.weights, blocks)
    weights["pos_embed"] = stored.positions(model.grid, pos_resize)
    loading = Loading(resized=positions_resized(model.grid, stored.grid, pos_resize))
    if head != "own":
        weights = {k: v for k, v in weights.items() if not k.startswith(HEAD_KEYS)}
        # Behind a block in the middle no norm was trained.
        fresh = (*HEAD_KEYS, *(NORM_KEYS.values() if blocks else [NORM_KEYS["avg"]]))
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
        match_eps(model, stored.eps)
    return model, arguments, state


def count_channels(state: Mapping[str, Any], path: str, img_size: Pair | None) -> int:
    """Channels of the images that the encoder in a file takes; arguments as `build_classifier`."""
    if state.get("encoder_kind", "vit") != "vit":
        return int(state["model_args"]["in_chans"])
    return int(read_encoder(state, path, img_size).arguments["in_chans"])


def count_classes(state: Mapping[str, Any], path: str, img_size: Pair | None) -> int:
    """Outputs of the head in a file, 0: it has none; arguments as `build_classifier`."""
    if state.get("encoder_kind", "vit") != "vit":
        return head_rows(state["model"])
    return read_encoder(state, path, img_size).classes


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


def check_name(name: str | None, arguments: Mapping[str, Any], path: str) -> None:
    """Refuse weights of another architecture than the name's.

    Args:
        arguments: of the encoder in the file; what it does not say is not compared.
    """
    if name is None:
        return
    expected = model_arguments(name)
    expected["patch_size"] = pair(expected["patch_size"])
    differing = [
        f"{key} {arguments.get(key, 1)}, {name} has {expected.get(key, 1)}"
        for key in ("embed_dim", "depth", "num_heads", "patch_size", "cls_tokens")
        if (key in arguments or key == "cls_tokens")
        and arguments.get(key, 1) != expected.get(key, 1)
    ]
    if differing:
        raise BadInput(
            f"{path} has a different architecture: {'; '.join(differing)}; leave --model out to "
            f"take "
            "the file's"
        )
