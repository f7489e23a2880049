"""A plugin for tests: clips, hidden in a grid of three axes, and a set of made ones."""

import numpy as np
import torch
from torch import nn

from models_protocols import PretrainModel
from models_zoo import register_model
from util.data.datasets import DATASETS
from util.data.source import Source
from util.mask.patches import patchify, unpatchify
from util.spec import InputSpec

PATCH = (2, 4, 4)


class ClipModel(PretrainModel):
    """Patches of two frames, mixed by one attention layer."""

    def __init__(self, img_size=16, in_chans=3, frames=4):
        super().__init__()
        side = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.input = InputSpec(in_chans, (frames, *side))
        self.mask_grid = tuple(n // p for n, p in zip(self.input.size, PATCH, strict=True))
        places = int(np.prod(self.mask_grid))
        self.embed = nn.Linear(32 * in_chans, 32)
        self.position = nn.Parameter(0.02 * torch.randn(1, places, 32))
        self.token = nn.Parameter(torch.zeros(1, 1, 32))
        self.mix = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        self.predict = nn.Linear(32, 32 * in_chans)

    def forward(self, x, mask, num_visible=None, **drawn):
        patches, hidden = patchify(x, PATCH), mask[..., None]
        tokens = torch.where(hidden, self.token, self.embed(patches)) + self.position
        pred = self.predict(self.mix(tokens))
        error = (pred.float() - patches).square().mean(dim=-1, keepdim=True)
        return {"loss": (error * hidden).sum() / hidden.sum(), "pred": pred}

    def reconstruct(self, x, mask, num_visible=None):
        return unpatchify(self(x, mask)["pred"].float(), PATCH, self.mask_grid)


@DATASETS.register("made_clips")
class MadeClips(Source):
    """A bright square that moves, four frames of 16 x 16, each a function of its index."""

    def __init__(self, split, data_path):
        super().__init__("made_clips", split, (0.5,) * 3, (0.25,) * 3, ["right", "down"])

    def __len__(self):
        return 24 if self.split == "train" else 8

    def __getitem__(self, index):
        rng = np.random.default_rng((self.split == "train", index))
        clip, (y, x) = torch.full((3, 4, 16, 16), 40, dtype=torch.uint8), rng.integers(0, 8, 2)
        for t in range(4):
            down, right = (t, 0) if index % 2 else (0, t)
            clip[index % 3, t, y + down : y + down + 5, x + right : x + right + 5] = 220
        return clip, index % 2


register_model("clips", ClipModel)
