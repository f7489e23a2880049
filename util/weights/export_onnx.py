"""Export to ONNX: one file whose graph runs without Python."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from util.weights.export import appearing, check_same, has_lscale, run_onnx, save_onnx
from util.weights.export_model import (
    LOOSE,
    NO_DECODER,
    ExportTarget,
    LoadedModel,
    compute_outputs,
    metadata,
    pool,
)


class Graph(nn.Module):
    """What goes into an ONNX file: logits; or the pooled features, and all tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        """[B, C, H, W] to [B, classes]; or to [B, D] and [B, 1 + L, D]."""
        if self.model.num_classes:
            return self.model(images)
        tokens = self.model.forward_features(images)
        return pool(self.model, tokens), tokens


def to_onnx(source: LoadedModel, path: Path) -> list[str]:
    """An ONNX file, checked with onnxruntime on batches of other sizes."""
    expected = compute_outputs(source.model, source)
    names = list(expected)
    entry = {**metadata(source), "keys": list(source.model.state_dict())}
    with appearing(path) as temporary:
        save_onnx(temporary, Graph(source.model).eval(), source.images(), names, entry)
        line = check_same(expected, run_onnx(temporary, source.images(), names), LOOSE, "ONNX")
        one = {name: value[:1] for name, value in expected.items()}
        check_same(one, run_onnx(temporary, source.images()[:1], names), LOOSE, "ONNX of one image")
    shape = ["batch", *source.images().shape[1:]]
    weights = source.model.state_dict()
    terms = {"LScale": has_lscale(weights), "the probe": "head.0.running_mean" in weights}
    inside = " and ".join(name for name, there in terms.items() if there)
    graph = f"; {inside} in the graph" if inside else ""
    return [line, f"images float32 {shape} -> {', '.join(names)}{graph}"]


ONNX = ExportTarget(to_onnx, suffixes=(".onnx",), refused=NO_DECODER)
