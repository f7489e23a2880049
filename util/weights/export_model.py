"""A model on its way to another program: its weights, its outputs, and what a target is.

Each target is a file beside this one, `export_*.py`, and an entry in `export_targets.py`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from util.mask.strategies import mask_settings
from util.styles import Style, Weights
from util.train.checkpoint import write_signed
from util.weights.export import appearing, check_same, fold_lscale, fold_probe, has_lscale

# Largest difference / largest output. A folded BatchNorm divides by small deviations.
BOUND, LOOSE = 1e-5, 1e-4
IMAGES = 2
BAKED = "the learned phases are baked into the positions: resizing these is no longer by formula"
# What most targets answer who are asked for a decoder.
NO_DECODER = {
    "decoder": "takes no decoder; choose official, mmae or, of MAE and Swin, transformers"
}


class ExportPreprocessing(Protocol):
    """How images are prepared, for other programs; see `util.data.preprocessing`."""

    def for_timm(self) -> dict[str, Any]:
        """See `util.data.preprocessing.Preprocessing.for_timm`."""
        ...

    def for_transformers(self) -> dict[str, Any]:
        """See `util.data.preprocessing.Preprocessing.for_transformers`."""
        ...

    def describe(self, said: bool) -> str:
        """See `util.data.preprocessing.Preprocessing.describe`."""
        ...


@dataclass
class LoadedModel:
    """A model that was read, and what is known of it.

    Attributes:
        model: in evaluation mode; a masked autoencoder if `part` is decoder, else a classifier.
        arguments: of its class, img_size and patch_size as pairs. state: what else the file holds.
        part: decoder | head | encoder, what of it is exported.
        eps: of its LayerNorms.
        preprocessing: what images need before the model sees them.
        own_statistics: whether the file says their mean and deviation.
        read_again: makes a model of a file that was written in place of the checkpoint; takes
            where it is, and the name for messages.
        keep_lscale: leave LScale as the other program's own scale, where the target can.
        lost: what the new file will not hold, to be said.
    """

    model: Any
    arguments: dict[str, Any]
    state: dict[str, Any]
    part: str
    eps: float
    preprocessing: ExportPreprocessing
    own_statistics: bool
    read_again: Callable[[Path, str], Any]
    keep_lscale: bool = False
    lost: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """Of the encoder."""
        return self.state.get("encoder_kind", "vit")

    def images(self) -> Tensor:
        """Random images: float32 [2, C, H, W]."""
        generator = torch.Generator().manual_seed(0)
        shape = (IMAGES, self.arguments["in_chans"], *self.arguments["img_size"])
        return torch.randn(shape, generator=generator)

    def noise(self) -> Tensor:
        """Random numbers for each patch: float32 [2, L]."""
        patches = math.prod(self.model.mask_grid)
        return torch.rand(IMAGES, patches, generator=torch.Generator().manual_seed(1))

    def mask(self) -> Tensor:
        """As transformers masks: the largest three quarters of the noise; bool [2, L]."""
        noise = self.noise()
        visible = max(1, int(noise.shape[1] * 0.25))
        return noise.argsort(dim=1).argsort(dim=1) >= visible

    def written(self, style: Style, before: str = "", *, keep_probe: bool = False) -> Weights:
        """The weights in another program's names, of an encoder that is no plain one.

        Args:
            before: what the names of a pretrained model's encoder begin with.
        """
        if self.part != "decoder":
            return style.write(self.plain_weights(keep_probe=keep_probe))
        rest = {k: v.detach() for k, v in self.model.beside_encoder().items()}
        inside = {k: v for k, v in rest.items() if not k.startswith("decoder")}
        encoder = style.write({**self.model.encoder_state().weights, **inside})
        outside = {k: v for k, v in rest.items() if k not in inside}
        return {f"{before}{name}": tensor for name, tensor in encoder.items()} | outside

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
                first = weights[name][:, : self.model.cls_tokens]
                weights[name] = torch.cat([first, code], dim=1)
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


@dataclass(frozen=True)
class ExportTarget:
    """Another program, or another layout of files, that weights are written for.

    Attributes:
        write: writes to a temporary name, has what it wrote read again, and compares. Takes the
            model and the path, and returns the line about that, and how the file is loaded. Raises
            BadInput where the target cannot hold the model.
        suffixes: that the path may end in; "": a folder, too.
        refused: why a part (decoder, head) is not taken, by part.
        like_mae: whether a decoder has to be MAE's.
        takes_segmenter: whether a whole segmenter can be written, too.
        keeps_lscale: whether `--keep_lscale` is understood.
        makes_folder: whether a new folder is written, whatever its name.
    """

    write: Callable[[LoadedModel, Path], list[str]]
    suffixes: tuple[str, ...] = (".pth",)
    refused: Mapping[str, str] = field(default_factory=dict)
    like_mae: bool = True
    takes_segmenter: bool = False
    keeps_lscale: bool = False
    makes_folder: bool = False


@torch.inference_mode()
def compute_outputs(model: Any, source: LoadedModel) -> dict[str, Tensor]:
    """What a model of ours gives for the random images, by name."""
    images = source.images()
    if source.part == "decoder":
        out = model(images, source.mask())
        return {"loss": out["loss"], "pred": out["pred"]}
    if source.part == "head":
        return {"logits": model(images)}
    tokens = model.forward_features(images)
    return {"features": pool(model, tokens), "tokens": tokens}


def pool(model: Any, tokens: Tensor) -> Tensor:
    """The features of a model without a head, of its tokens: timm's, and plain ours, or another."""
    if hasattr(model, "forward_head"):
        return model.forward_head(tokens)
    return model.pool(tokens, model.global_pool)


def metadata(source: LoadedModel, *, ours: bool = True) -> dict[str, Any]:
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
    if not ours and source.kind == "vit":
        arguments["lscale_init"] = None
    said = {"model_args": arguments, "norm_eps": source.eps}
    if ours and source.kind != "vit":  # else its names tell
        said["encoder_kind"] = source.kind
    if ours and source.part == "decoder":
        said["model_name"] = source.state.get("model_name")
    if source.part == "decoder":  # pictures of it are made with its run's masks
        trained = source.state.get("arithmetic", {})
        said["arithmetic"] = {n: trained[n] for n in mask_settings() if n in trained}
    for name, wanted in (("classes", source.part == "head"), ("data", True)):
        if wanted and name in source.state:
            said[name] = source.state[name]
    return said


def write_and_compare(source: LoadedModel, path: Path, state: dict[str, Any]) -> str:
    """Write a file, read it again as any of that style, and see that it is the same function.

    Returns:
        a line that says how equal the outputs are.

    Raises:
        BadInput: they differ; then nothing is written.
    """
    with appearing(path) as temporary:
        write_signed(temporary, state)
        again = source.read_again(temporary, str(path))
        return check_same(
            compute_outputs(source.model, source),
            compute_outputs(again.eval(), source),
            BOUND,
            "the new file",
        )
