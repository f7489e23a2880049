"""Models and batches small enough to follow by hand."""

import pytest
import torch
from torch import Tensor, nn

import models_zoo
from models_mmae import MaskedAutoencoderViT

# Not square, so that height and width cannot change places unseen: 2 x 3 patches.
SMALL = {
    "img_size": (8, 12), "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2,
    "decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2,
}  # fmt: skip
MMAE = {"lscale_init": 0.1, "pos_offset": "learned"}
VISIBLE = 2


def names_of(kind: type) -> list[str]:
    """The models and encoders of a class, by name."""
    known = {**models_zoo.MODELS, **models_zoo.CLASSIFIERS}
    return [name for name, (made, _) in known.items() if issubclass(made, kind)]


def small(seed: int = 0, **arguments: object) -> MaskedAutoencoderViT:
    """A model of `SMALL` with other or more arguments, in fp32."""
    torch.manual_seed(seed)
    return MaskedAutoencoderViT(**(SMALL | arguments))


def batch(
    model: nn.Module, B: int = 3, visible: int = VISIBLE, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Images and a mask that differs from row to row, in the dtype of the model."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(B, model.in_chans, *model.img_size, generator=generator)
    order = torch.rand(B, model.grid[0] * model.grid[1], generator=generator).argsort(dim=1)
    mask = torch.ones(order.shape, dtype=torch.bool).scatter_(1, order[:, :visible], False)
    return images.to(model.pos_embed.dtype), mask


def add_small_models(patch: pytest.MonkeyPatch) -> None:
    """Names for models so small that a run is its files; a segmenter takes four blocks or more.

    The wide ones are for plans, in which what is small is 0.
    """
    sizes = {
        "nano": (32, 2, 2), "heads": (32, 2, 4), "pico": (32, 1, 2), "deep": (32, 4, 2),
        "deeper": (32, 5, 2), "wide": (384, 4, 6),
    }  # fmt: skip
    for name, (width, depth, heads) in sizes.items():
        size = {"embed_dim": width, "depth": depth, "num_heads": heads}
        size |= {"img_size": 16, "patch_size": 4}
        decoder = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
        for names, prefix, arguments in (
            (models_zoo.MODELS, "mae_vit", size | decoder),
            (models_zoo.CLASSIFIERS, "vit", size),
        ):
            kind = names[f"{prefix}_micro_patch4"][0]
            patch.setitem(names, f"{prefix}_{name}_patch4", (kind, arguments))
