"""A plugin for tests: mask tokens among the encoder's own, hidden in squares of 2 x 2 patches."""

import torch
from torch import nn

from models_protocols import PretrainModel
from models_vit import VisionTransformer
from models_zoo import register_model
from util.mask.patches import patchify, unpatchify
from util.spec import EncoderState, InputSpec


class TokenModel(PretrainModel):
    def __init__(self, img_size=16, in_chans=3, dim_by=0.1, **sizes):
        super().__init__()
        self.sizes = {"img_size": img_size, "patch_size": 4, "in_chans": in_chans, **sizes}
        self.encoder = vit = VisionTransformer(num_classes=0, global_pool="cls", **self.sizes)
        self.input, self.dim_by = InputSpec(in_chans, vit.img_size), dim_by
        self.mask_grid = (vit.grid[0] // 2, vit.grid[1] // 2)
        self.draws = {"dim": (1,)}
        self.mask_token = nn.Parameter(torch.zeros(1, 1, vit.num_features))
        self.predict = nn.Linear(vit.num_features, 16 * in_chans)

    @classmethod
    def add_flags(cls, parser):
        parser.add_argument("--dim_by", type=float, default=0.1, help="dim images by up to so much")

    @classmethod
    def from_args(cls, values):
        return {"dim_by": values["dim_by"]}

    def forward(self, x, mask, num_visible=None, **drawn):
        if drawn:
            x = x * (1 - self.dim_by * (drawn["dim"][..., None, None] + 0.5))
        vit = self.encoder
        hidden = mask.unflatten(1, self.mask_grid)
        hidden = hidden.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)[..., None]
        tokens = vit.patch_embed.proj(x).flatten(2).transpose(1, 2)
        tokens = torch.where(hidden, self.mask_token.to(tokens.dtype), tokens)
        tokens = torch.cat([vit.cls_token.expand(len(x), -1, -1), tokens], dim=1) + vit.pos_embed
        for block in vit.blocks:
            tokens = block(tokens)
        pred = self.predict(vit.norm(tokens)[:, 1:])
        error = (pred.float() - patchify(x, (4, 4))).square().mean(dim=-1, keepdim=True)
        return {"loss": (error * hidden).sum() / hidden.sum(), "pred": pred}

    def reconstruct(self, x, mask, num_visible=None):
        return unpatchify(self(x, mask)["pred"].float(), (4, 4), self.encoder.grid)

    def encoder_state(self):
        return EncoderState("vit", self.sizes, self.encoder.state_dict())


register_model("tokens", TokenModel, img_size=16, embed_dim=32, depth=4, num_heads=2)
