"""Writing weights for other programs: folding, comparing, files that appear whole or not at all.

All folding is done in float64 and rounded once.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from util.errors import BadInput, needs
from util.files import build_whole, check_folder, sweep, writing
from util.weights.files import CONFIG, FILES, ONNX_KEY

Weights = dict[str, Tensor]

# The layer before each LScale.
SCALED = {"ls1": "attn.proj", "ls2": "mlp.fc2"}
# Bytes of weights in one ONNX file: protobuf ends at 2 GiB, and the graph takes some of it.
ONE_FILE = 2_000_000_000


def has_lscale(weights: Mapping[str, Tensor]) -> bool:
    """Whether any block has scales of its own."""
    return any(key.endswith((".ls1.gamma", ".ls2.gamma")) for key in weights)


def fold_lscale(weights: Mapping[str, Tensor]) -> Weights:
    """The same function without LScale: y = gamma * (W x + b) is a layer of its own.

    Takes encoder and decoder blocks alike.
    """
    folded = dict(weights)
    for key in weights:
        block, _, part = key.removesuffix(".gamma").rpartition(".")
        if not key.endswith(".gamma") or part not in SCALED:
            continue
        gamma = folded.pop(key).double()
        weight, bias = (f"{block}.{SCALED[part]}.{kind}" for kind in ("weight", "bias"))
        folded[weight] = (gamma[:, None] * weights[weight].double()).to(weights[weight].dtype)
        folded[bias] = (gamma * weights[bias].double()).to(weights[bias].dtype)
    return folded


def fold_probe(weights: Mapping[str, Tensor], eps: float) -> Weights:
    """The same function with one linear head: a BatchNorm in evaluation is linear too.

    Args:
        weights: with `head.0.running_mean` and `running_var`, and the linear layer `head.1`.
        eps: of the BatchNorm.
    """
    folded = {k: v for k, v in weights.items() if not k.startswith("head.")}
    weight, bias = weights["head.1.weight"], weights["head.1.bias"]
    mean, var = (weights[f"head.0.running_{kind}"].double() for kind in ("mean", "var"))
    scaled = weight.double() * (var + eps).rsqrt()
    folded["head.weight"] = scaled.to(weight.dtype)
    folded["head.bias"] = (bias.double() - scaled @ mean).to(bias.dtype)
    return folded


# ---- Comparing -----------------------------------------------------------------------------------


def relative_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest difference of any output, relative to that output's largest number."""
    worst = 0.0
    for name, expected in ours.items():
        found = theirs[name]
        if found.shape != expected.shape or not (
            found.isfinite().all() and expected.isfinite().all()
        ):
            return float("inf")
        scale = float(expected.abs().max()) or 1.0
        worst = max(worst, float((found.double() - expected.double()).abs().max()) / scale)
    return worst


def check_same(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], bound: float, target: str
) -> str:
    """A line that says how equal the outputs are.

    Raises:
        BadInput: they differ by more than the bound, or are not finite.
    """
    difference = relative_difference(ours, theirs)
    what = ", ".join(ours)
    if not difference <= bound:
        raise BadInput(
            f"not written: on random images {target} gives other {what}, by {difference:.1e} of "
            f"the largest (at most {bound:.0e}); are the weights finite, and of this model?"
        )
    return f"{what} on random images: largest difference / largest number {difference:.1e}"


# ---- Files ---------------------------------------------------------------------------------------


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A name to write a file or folder to, which becomes `path` at the end.

    After an exception nothing is left, and what was at `path` is as it was.

    Raises:
        BadInput: the folder is not writable, or a folder is there already.
        CannotWrite: the disk is full ...
    """
    check_folder(path.parent)
    sweep(path.parent)
    with writing(path), build_whole(path) as temporary:
        yield temporary
        if temporary.is_dir() and path.exists():
            raise BadInput(f"{path} exists already; choose another --output")


def save_safetensors(
    path: Path, weights: Mapping[str, Tensor], about: Mapping[str, str] | None = None
) -> None:
    """A safetensors file; tensors that are parts of others become their own.

    Args:
        about: more of its metadata.
    """
    library = needs("safetensors.torch", "safetensors")
    own = {k: v.detach().clone().contiguous() for k, v in weights.items()}
    path.touch()
    usual = path.stat().st_mode  # the library makes files that nobody else may read
    try:
        library.save_file(own, path, {"format": "pt", **(about or {})})
        path.chmod(usual)
    except needs("safetensors", "safetensors").SafetensorError as error:
        raise BadInput(f"cannot write {path}: {error}") from error


def save_folder(folder: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """A folder of weights and config.json, as transformers and timm write it."""
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    save_safetensors(folder / FILES[0], weights)


def save_onnx(
    path: Path, model: nn.Module, images: Tensor, outputs: list[str], about: Mapping[str, Any]
) -> None:
    """An ONNX file with a dynamic batch, its tensors under the names that they have in the model.

    Args:
        images: an example, [B, C, H, W], B at least 2.
        outputs: names of what the model returns, in order.
        about: goes into the metadata, for `util.weights.files.read_onnx`.

    Raises:
        BadInput: the weights are too large for one file.
    """
    onnx = needs("onnx", "onnx")
    needs("onnxscript", "onnxscript")
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    if size > ONE_FILE:
        raise BadInput(
            f"these weights take {size:,} bytes, and an ONNX file ends at 2 GiB; choose a smaller "
            "model, or --to timm"
        )
    torch.onnx.export(
        model,
        (images,),
        str(path),
        input_names=["images"],
        output_names=outputs,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        optimize=False,  # folding constants would take the names from the weights
        external_data=False,
        verbose=False,
    )
    graph = onnx.load(str(path))
    onnx.helper.set_model_props(graph, {ONNX_KEY: json.dumps(dict(about))})
    onnx.checker.check_model(graph)
    onnx.save(graph, str(path))


def run_onnx(path: Path, images: Tensor, outputs: list[str]) -> dict[str, Tensor]:
    """What onnxruntime computes on the CPU."""
    runtime = needs("onnxruntime", "onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # it warns of what it does not fold, line after line
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = session.run(outputs, {"images": images.numpy()})
    return {name: torch.from_numpy(array) for name, array in zip(outputs, found, strict=True)}
