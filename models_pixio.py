"""Pixio: MAE with masked cells, several class tokens, learned positions and a deep decoder.

All of it are pieces of `models_mmae`, each a flag there; this file says which Pixio has.

Source: Yang et al., "In Pursuit of Pixel Supervision for Visual Pre-training" (arXiv 2512.15715).
Its authors' code and weights are for non-commercial use; none of them is here.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from models_layers import pair
from models_mmae import METHODS, MaskedAutoencoderViT

CLS_TOKENS = 8
CELLS = 4  # along each side of an image at the size of its name
# Side and patch in pixels; encoder and decoder: width, depth, heads; drop path, where it is known.
Size = tuple[int, int, tuple[int, int, int], tuple[int, int, int], float]
DECODER = (512, 32, 16)
SIZES: dict[str, Size] = {
    "micro": (32, 4, (128, 4, 4), (96, 8, 4), 0.0),
    "tiny": (32, 4, (192, 12, 3), (128, 8, 4), 0.0),
    "base": (256, 16, (768, 12, 12), DECODER, 0.0),
    "large": (256, 16, (1024, 24, 16), DECODER, 0.0),
    "huge": (256, 16, (1280, 32, 16), DECODER, 0.4),
    "1b": (256, 16, (1536, 48, 24), DECODER, 0.0),
}
SHAPE = ("embed_dim", "depth", "num_heads")
# Names, and what they stand for of the constructor's arguments.
NAMES: dict[str, dict[str, Any]] = {
    f"pixio_vit_{size}_patch{patch}": {
        "img_size": side,
        "patch_size": patch,
        **dict(zip(SHAPE, encoder, strict=True)),
        **dict(zip((f"decoder_{name}" for name in SHAPE), decoder, strict=True)),
        "cls_tokens": CLS_TOKENS,
        "positions": "learned",
        "drop_path": drop_path,
    }
    for size, (side, patch, encoder, decoder, drop_path) in SIZES.items()
}
# The encoders alone, for names of `vit`; they start from the code, as all of these do.
ENCODERS: dict[str, dict[str, Any]] = {
    f"vit_{size}_patch{patch}_cls{CLS_TOKENS}": {
        "img_size": side,
        "patch_size": patch,
        **dict(zip(SHAPE, encoder, strict=True)),
        "cls_tokens": CLS_TOKENS,
    }
    for size, (side, patch, encoder, _, _) in SIZES.items()
}
# The published recipe on ImageNet, of ViT-H.
RECIPE: dict[str, Any] = {
    **METHODS["mae"],
    "mask_ratio": 0.75,
    "target": "norm_pixels",
    "norm_pix_loss": True,
    "epochs": 400,
    "warmup_epochs": 40.0,
    "blr": 2.5e-5,
}


class Pixio(MaskedAutoencoderViT):
    """`MaskedAutoencoderViT`, of which a name of `NAMES` says what is different."""

    published: ClassVar[tuple[float, int]] = (2.5e-5, 8192)
    default_model = "pixio_vit_base_patch16"

    @classmethod
    def presets(cls, arguments: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """See `PretrainModel.presets`: cells so large that 4 x 4 of them cover an image."""
        grid = pair(arguments.get("img_size", 256))[0] // pair(arguments.get("patch_size", 16))[0]
        return {"pixio": {**RECIPE, "mask_cell": [max(1, grid // CELLS)]}}
