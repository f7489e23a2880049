"""SimMIM: the encoder sees the mask tokens, and one linear layer predicts raw pixels.

Any encoder can be its own that gives its patches before the blocks (`embed`), takes them back with
mask tokens among them (`encode`) and says what map that is (`to_map`): Swin, and a vision
transformer with relative position bias.

Source: Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling" (arXiv 2111.09886).

Shape legend: B images, L patches, gh and gw sides of their grid, C channels.
"""

import argparse
import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from models_layers import drop_path_factors, pair
from models_protocols import PretrainModel, add_drop_path_flag, check_drop_path
from models_swin import NAMES as SWIN_NAMES
from models_swin import SwinTransformer
from models_vit_relative import NAMES as VIT_NAMES
from models_vit_relative import RelativeVisionTransformer
from util.errors import BadInput
from util.flag_types import MOST_SIDE, number
from util.spec import EncoderState, InputSpec, Pair

ENCODERS: dict[str, type[SwinTransformer] | type[RelativeVisionTransformer]] = {
    kind.kind: kind for kind in (SwinTransformer, RelativeVisionTransformer)
}
# Names, and what they stand for of the constructor's arguments; the official code's transformer
# drops paths in pretraining, and its Swin does not.
NAMES: dict[str, dict[str, Any]] = {
    **{f"simmim_{name}": {"encoder": "swin", **sizes} for name, sizes in SWIN_NAMES.items()},
    **{
        f"simmim_{name.replace('_relative', '')}": {
            "encoder": "vit_relative",
            "drop_path": 0.1,
            **sizes,
        }
        for name, sizes in VIT_NAMES.items()
    },
}
# A masked cell, in pixels: the paper's, and one for small pictures, which have few of those.
CELL, SMALL_CELL, SMALL_SIDE = 32, 8, 96
# The published recipe of 100 epochs.
RECIPE: dict[str, Any] = {
    "mask": "random",
    "mask_ratio": 0.6,
    "epochs": 100,
    "warmup_epochs": 10.0,
    "blr": 2e-4,
    "warmup_lr": 1e-6,
    "min_lr": 1e-5,
    "lr_batch": 512,
    "schedule": "full_cosine",
    "betas": [0.9, 0.999],
    "clip_grad": 5.0,
    "crop_scale": [0.67, 1.0],
    "interpolation": "bilinear",
}


class SimMIM(PretrainModel):
    """An encoder, a mask token for its masked patches, and a linear head.

    Args:
        encoder: kind of encoder: swin | vit_relative.
        img_size: side or (height, width), pixels.
        in_chans: channels of the image.
        drop_path: stochastic depth of the encoder while training, rising linearly to this. It is
            drawn with each image, so that a run does not depend on how its batches are split.
        sizes: the encoder's other arguments.

    Raises:
        BadInput: an unknown encoder, or sizes that do not fit each other.
    """

    published = (1e-4, 2048)
    default_model = "simmim_swin_base_patch4_window6"

    def __init__(
        self,
        encoder: str,
        img_size: int | Pair = 224,
        in_chans: int = 3,
        drop_path: float = 0.0,
        **sizes: Any,
    ) -> None:
        super().__init__()
        if encoder not in ENCODERS:
            raise BadInput(f"unknown encoder {encoder!r}, choose from {', '.join(ENCODERS)}")
        check_drop_path(drop_path)
        if encoder == "vit_relative" and "window_size" in sizes:
            raise BadInput("window_size is Swin's; this encoder has no windows")
        if encoder == "vit_relative":  # one table for all blocks, and a final norm
            sizes = {"shared_bias": True, "global_pool": "cls", **sizes}
        self.arguments = {"img_size": img_size, "in_chans": in_chans, **sizes}
        self.encoder = ENCODERS[encoder](**self.arguments, num_classes=0)
        self.drop_path = drop_path
        self.input, self.mask_grid = InputSpec(in_chans, self.encoder.img_size), self.encoder.grid
        if self.encoder.stride[0] != self.encoder.stride[1]:
            raise BadInput(f"SimMIM predicts square patches, not {self.encoder.stride}")
        stride, embedded = self.encoder.stride[0], self.encoder.patch_embed.proj.out_channels
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 1, embedded))
        self.decoder = nn.Sequential(
            nn.Conv2d(self.encoder.num_features, stride * stride * in_chans, 1),
            nn.PixelShuffle(stride),
        )
        # The official code cuts the transformer's normal distribution at one deviation.
        cut = 0.02 if encoder == "vit_relative" else 2.0
        if isinstance(self.encoder, RelativeVisionTransformer):
            self.encoder.init_weights(cut)
        trunc_normal_(self.mask_token, std=0.02, a=-cut, b=cut)

    # ------------------------------------------------------------------- what everybody is told

    @classmethod
    def presets(cls, arguments: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """See `PretrainModel.presets`: cells of 32 pixels, of 8 for images below 96."""
        side, patch = pair(arguments.get("img_size", 224))[0], arguments.get("patch_size", 4)
        cell = SMALL_CELL if side < SMALL_SIDE else CELL
        return {"simmim": {**RECIPE, "mask_cell": [max(1, cell // pair(patch)[0])]}}

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        """`--patch_size`, `--window_size` and `--drop_path`."""
        group = parser.add_argument_group("architecture (unset sizes follow --model)")
        group.add_argument(
            "--patch_size",
            type=number(int, 1, MOST_SIDE),
            help="patch size in pixels; --mask_cell counts in these; default: that of --model",
        )
        group.add_argument(
            "--window_size",
            type=number(int, 1, MOST_SIDE),
            help="side of Swin's windows, in patches; default: that of --model",
        )
        add_drop_path_flag(group)

    @classmethod
    def from_args(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """See `PretrainModel.from_args`."""
        names = ("patch_size", "window_size", "drop_path")
        return {name: values[name] for name in names if values[name] is not None}

    @property
    def draws(self) -> Mapping[str, tuple[int, ...]]:  # type: ignore[override]
        """`kept`: which branches an image drops."""
        return {"kept": (len(self.encoder.stages), 2)} if self.drop_path else {}

    @staticmethod
    def num_visible(places: int, ratio: float) -> int:
        """SimMIM's count: L - ceil(r L).

        Raises:
            BadInput: nothing would be visible, or nothing masked.
        """
        if not 0 < ratio < 1:
            raise BadInput(f"mask_ratio must lie between 0 and 1, not {ratio}")
        masked = math.ceil(places * ratio)
        if masked >= places:
            raise BadInput(
                f"mask_ratio {ratio} hides all {places} cells; lower it, or make --mask_cell "
                "smaller"
            )
        return places - masked

    def no_weight_decay(self) -> set[str]:
        """The encoder's; and Swin's mask token, while the transformer's does decay (official)."""
        names = {f"encoder.{name}" for name in self.encoder.no_weight_decay()}
        return names | ({"mask_token"} if self.encoder.kind == "swin" else set())

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the encoder's blocks again in the backward pass."""
        self.encoder.set_grad_checkpointing(enable)

    def encoder_state(self) -> EncoderState:
        """See `PretrainModel.encoder_state`."""
        arguments = {**self.arguments, "img_size": list(self.encoder.img_size)}
        return EncoderState(self.encoder.kind, arguments, self.encoder.state_dict())

    @classmethod
    def from_encoder(cls, encoder: EncoderState, rest: Mapping[str, Tensor]) -> "SimMIM | None":
        """See `PretrainModel.from_encoder`: files of SimMIM's own code, and transformers' Swin.

        Raises:
            BadInput: weights that do not fit.
        """
        parts = {
            name: tensor
            for name in ("mask_token", "decoder.0.weight", "decoder.0.bias")
            for key, tensor in rest.items()
            if key == name or key.endswith(f".{name}")
        }
        if encoder.kind not in ENCODERS or len(parts) < 3:
            return None
        unused = ("global_pool", "num_classes", "probe", "drop_path")
        model = cls(encoder.kind, **{k: v for k, v in encoder.arguments.items() if k not in unused})
        weights = {f"encoder.{name}": tensor for name, tensor in encoder.weights.items()}
        weights |= {**parts, "mask_token": parts["mask_token"].reshape(model.mask_token.shape)}
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise BadInput(f"not SimMIM's weights: {error}") from error
        return model

    def beside_encoder(self) -> dict[str, Tensor]:
        """See `PretrainModel.beside_encoder`."""
        names = ("decoder.0.weight", "decoder.0.bias")
        own = self.state_dict()
        return {"mask_token": own["mask_token"].reshape(1, 1, -1), **{n: own[n] for n in names}}

    # ------------------------------------------------------------------------------- the model

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        mask: Tensor,
        num_visible: int | None = None,
        kept: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One pretraining pass.

        Args:
            x: float [B, C, H, W], normalised.
            mask: bool [B, L] over patches, True = masked.
            num_visible: False entries in each row. None: counted, which waits for the device.
            kept: [B, blocks, 2], what `draws` asks for, while training.

        Returns:
            loss: absolute error, its sum over masked pixels / their count / C.
            pred: the whole image as predicted, [B, C, H, W].
        """
        if num_visible is None:
            num_visible = self.count_unmasked(mask)
        self.check_images(x, mask)
        if kept is not None and not self.drop_path:
            raise BadInput("a model without drop_path keeps every branch")
        (gh, gw), (H, W) = self.encoder.grid, self.encoder.img_size
        hidden_BHW = mask.view(-1, gh, gw)
        tokens_BHWC = self.encoder.embed(x)
        token = self.mask_token.to(tokens_BHWC.dtype)
        tokens_BHWC = torch.where(hidden_BHW.unsqueeze(-1), token, tokens_BHWC)
        factors = None if kept is None else drop_path_factors(kept, self.drop_path)
        pred = self.decoder(self.encoder.to_map(self.encoder.encode(tokens_BHWC, factors)))
        pred = pred.to(x.dtype)
        area = H // gh * (W // gw)
        hidden = hidden_BHW.repeat_interleave(H // gh, 1).repeat_interleave(W // gw, 2)
        error = (pred - x).abs() * hidden.unsqueeze(1)
        # The official code adds 1e-5 to the count, in float32, where it is lost from 256 pixels on.
        masked = len(x) * (self.num_places - num_visible) * area
        return {"loss": error.sum() / masked / self.input.channels, "pred": pred}

    @property
    def num_places(self) -> int:
        """L."""
        return self.mask_grid[0] * self.mask_grid[1]

    def reconstruct(self, x: Tensor, mask: Tensor, num_visible: int | None = None) -> Tensor:
        """See `PretrainModel.reconstruct`."""
        return self(x, mask, num_visible)["pred"].float()
