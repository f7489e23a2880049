"""A plugin for tests: SimMIM's models at a size at which a run takes seconds."""

from models_simmim import SimMIM
from models_swin import SwinTransformer
from models_vit_relative import RelativeVisionTransformer
from models_zoo import CLASSIFIERS, register_model

SWIN = {
    "img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 2, 1], "num_heads": [2, 2, 4],
    "window_size": 4,
}  # fmt: skip
VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}

register_model("simmim_swin_nano", SimMIM, encoder="swin", **SWIN)
register_model("simmim_vit_nano", SimMIM, encoder="vit_relative", drop_path=0.3, **VIT)
CLASSIFIERS.add("swin_nano", (SwinTransformer, SWIN))
CLASSIFIERS.add("vit_relative_nano", (RelativeVisionTransformer, VIT))

# For segmentation, which reads four maps or blocks.
FOUR = {**SWIN, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 4, 4]}
register_model("simmim_swin_four", SimMIM, encoder="swin", **FOUR)
register_model("simmim_vit_four", SimMIM, encoder="vit_relative", **{**VIT, "depth": 4})
