"""A plugin for tests: Pixio at a size at which a run takes seconds."""

from models_pixio import Pixio
from models_zoo import register_model

register_model(
    "pixio_vit_nano", Pixio, img_size=32, patch_size=4, embed_dim=32, depth=4, num_heads=2,
    decoder_embed_dim=16, decoder_depth=3, decoder_num_heads=2, cls_tokens=3, positions="learned",
    drop_path=0.3,
)  # fmt: skip
