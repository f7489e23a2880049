"""Files of weights, our own and those of other programs, read into our names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from util.errors import BadInput, needs
from util.files import reading
from util.styles import STYLES
from util.train.checkpoint import LAST, list_checkpoints, load_file, local_file
from util.weights.convert import in_our_names

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
# What transformers calls its weights; an index names the parts of large ones.
FILES = ("model.safetensors", "pytorch_model.bin")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
ONNX_KEY = "mmae"  # our entry in the metadata of ONNX files
ONNX_PREFIX = "model."  # the model's name in what is traced


# Each gives, of the contents of a file and its name, those of an encoder's file, or None where it
# is of no such kind: for methods whose weights have names of their own. `models_load` adds one.
OPENERS: list[Callable[[dict[str, Any], str], dict[str, Any] | None]] = []


def load_state(
    path: str, key: str | None = None, read: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The contents of a file of weights, with its tensors under `model` in our names.

    Args:
        path: checkpoint file of ours, of the official MAE code, of timm, of mmsegmentation, or of
            a program whose encoder has the names of one of these, see
            `util.weights.nested_weights`; a folder of transformers, or the weights in it; a run
            folder, whose `checkpoint-last.pth` is taken; an ONNX file of ours; an https URL of one
            of these files.
        key: which weights of a file that holds several, as `--weights_key` takes it.
        read: what `load_file` gave of it, if it was read before.

    Raises:
        BadInput: unreadable, or without weights.
    """
    place = weights_file(path)
    if place.is_dir():
        state = read_folder(place)
    elif place.suffix == ".onnx":
        state = read_onnx(place)
    else:
        state = load_file(place) if read is None else read
        for opener in OPENERS:
            opened = opener(state, str(place))
            if opened is not None and opened["encoder_kind"] != "vit":
                return opened
            state = opened or state
        if place.name in FILES and (place.parent / CONFIG).is_file():
            state = {"model": state} | said_by(place.parent, state)
    return dict(in_our_names(state, path if "://" in path else str(place), key))


def take_averaged(state: dict[str, Any], path: str) -> None:
    """Put a fine-tuning's averaged weights in the place of the others, as `--ema` asks for.

    Args:
        state: what `load_state` gave; changed in place. path: the file, for the message.

    Raises:
        BadInput: there are none.
    """
    if "ema" not in state:
        raise BadInput(f"{path} holds no averaged weights; leave --ema out")
    state["model"] = state["ema"]


def weights_file(path: str) -> Path:
    """The place of weights: a file, downloaded if it is an address, or a folder of transformers.

    Of a run folder it is `checkpoint-last.pth`.

    Raises:
        BadInput: a download failed, or the folder holds several last checkpoints.
    """
    place = local_file(path)
    with reading(place):
        theirs = any((place / name).is_file() for name in (*FILES, *INDICES))
        lasts = [] if theirs else [p.name for p in list_checkpoints(place) if "-last" in p.name]
    if len(lasts) > 1:
        raise BadInput(
            f"{place} holds the last checkpoints of several tasks ({', '.join(lasts)}); give one "
            "of these files"
        )
    return place / lasts[0] if lasts else place


def read_folder(folder: Path) -> dict[str, Any]:
    """What transformers' `save_pretrained` wrote.

    Raises:
        BadInput: no such folder, or a part of it is missing.
    """
    for name in FILES:
        if (folder / name).is_file():
            weights = load_file(folder / name)
            return {"model": weights} | said_by(folder, weights)
    for name in INDICES:
        if (folder / name).is_file():
            parts = sorted(set(read_json(folder / name).get("weight_map", {}).values()))
            weights = {k: v for part in parts for k, v in load_file(folder / part).items()}
            return {"model": weights} | said_by(folder, weights)
    raise BadInput(
        f"{folder} holds no weights of transformers ({CONFIG} with {' or '.join(FILES)}) and no "
        f"{LAST} of a run; give a checkpoint file in it"
    )


def said_by(folder: Path, weights: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of the weights beside it.

    Raises:
        BadInput: it is missing, says nothing of use, or is of other weights.
    """
    if not (folder / CONFIG).is_file():
        raise BadInput(f"{folder} holds weights but no {CONFIG}, which says what they are")
    config = read_json(folder / CONFIG)
    if "architecture" in config and "model_type" not in config:
        return said_by_timm(config)
    found = (s.arguments for s in STYLES.values() if s.arguments and s.recognises(weights))
    read_config = next(found, STYLES["transformers"].arguments)
    assert read_config is not None
    said = read_config(config, str(folder))
    projection = next(
        (v for k, v in weights.items() if k.endswith("patch_embeddings.projection.weight")), None
    )
    if projection is not None:
        arguments = said["model_args"]
        patch = arguments["patch_size"]
        sides = (patch, patch) if isinstance(patch, int) else tuple(patch)
        expected = (arguments["embed_dim"], arguments["in_chans"], *sides)
        if tuple(projection.shape) != expected:
            raise BadInput(
                f"{folder / CONFIG} does not fit the weights beside it: their patch projection is "
                f"{tuple(projection.shape)}, by the config it is {expected}"
            )
    if (folder / PREPROCESSOR).is_file():
        said |= said_by_processor(read_json(folder / PREPROCESSOR))
    return said


def said_by_processor(config: dict[str, Any]) -> dict[str, Any]:
    """How a folder of transformers has its images normalised, as a checkpoint of ours says it."""
    if not config.get("do_normalize") or not all(k in config for k in ("image_mean", "image_std")):
        return {}
    data = {"mean": config["image_mean"], "std": config["image_std"]}
    if config.get("do_center_crop") and isinstance(config.get("crop_size"), dict):
        shortest = config.get("size", {}).get("shortest_edge", 0)
        data["eval_margin"] = shortest > max(config["crop_size"].values())
    return {"data": data}


def said_by_timm(config: dict[str, Any]) -> dict[str, Any]:
    """What the config.json of a folder of timm says that the shapes of the weights do not."""
    kept = config.get("pretrained_cfg", {})
    said: dict[str, Any] = {}
    if "mean" in kept and "std" in kept:
        said["data"] = {"mean": kept["mean"], "std": kept["std"]}
        said["data"]["eval_margin"] = kept.get("crop_pct") != 1
    if isinstance(config.get("label_names"), list):
        said["classes"] = config["label_names"]
    return said


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Raises:
        BadInput: it does not.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not readable: {error}") from error
    if not isinstance(found, dict):
        raise BadInput(f"{path} holds a {type(found).__name__}, expected a mapping")
    return found


def read_onnx(path: Path) -> dict[str, Any]:
    """The weights in an ONNX file that `main_export.py` wrote, and what it says of itself.

    Raises:
        BadInput: unreadable, or written by another program: its graph keeps no names.
    """
    if not path.is_file():
        raise BadInput(f"checkpoint {path} does not exist or is not a file")
    onnx = needs("onnx", "onnx")
    try:
        model = onnx.load(str(path))
        tensors = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    except Exception as error:  # protobuf's own, which it does not export
        raise BadInput(f"{path} is not readable: {type(error).__name__}: {error}") from error
    entries = {entry.key: entry.value for entry in model.metadata_props}
    if ONNX_KEY not in entries:
        raise BadInput(
            f"{path} was not written by main_export.py; only those say which model they are of"
        )
    state = json.loads(entries[ONNX_KEY])
    keys = set(state.pop("keys"))
    named = {name.removeprefix(ONNX_PREFIX): array for name, array in tensors.items()}
    weights = {k: torch.from_numpy(v.copy()) for k, v in named.items() if k in keys}
    if "head.0.running_mean" in keys:
        weights["head.0.num_batches_tracked"] = torch.tensor(0)  # nothing in the graph needs it
    return {"model": weights, **state}
