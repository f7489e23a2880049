"""A plugin for tests: a mask with a setting of its own, two data sets and a target."""

import math

import numpy as np
import torch
from PIL import Image

from models_targets import TARGETS, Target
from util.data.datasets import DATASETS
from util.data.segmentation_sets import SEGMENTATION_SETS
from util.data.source import Source
from util.mask.strategies import STRATEGIES, keep_smallest


@STRATEGIES.register("stripes")
class Stripes:
    """Rows of the grid are hidden in turns of `stripe_width`, shifted at random."""

    uses_averages = False

    def __init__(self, stripe_width: int = 1) -> None:
        self.width = stripe_width

    @staticmethod
    def add_flags(group):
        group.add_argument("--stripe_width", type=int, default=1, help="rows of a stripe")

    def draw(self, grid, generator):
        shift = int(torch.randint(2 * self.width, (1,), generator=generator))
        rows = (torch.arange(grid[-2]) + shift) // self.width % 2
        ties = torch.rand(math.prod(grid), generator=generator)
        return (rows.repeat_interleave(grid[-1]) * 2 + ties)[None]

    def mask(self, noise, averages, num_visible):
        return keep_smallest(noise[:, 0], num_visible)


@DATASETS.register("ramps")
class Ramps(Source):
    """Gray ramps, to the right or down."""

    def __init__(self, split, data_path):
        super().__init__("ramps", split, (0.5,) * 3, (0.3,) * 3, ["right", "down"])

    def __len__(self):
        return 24 if self.split == "train" else 10

    def __getitem__(self, index):
        ramp = torch.arange(20, dtype=torch.uint8).mul(10).expand(20, 20)
        ramp = (ramp if index % 2 else ramp.T) + index
        return Image.fromarray(ramp.contiguous().numpy()).convert("RGB"), index % 2


class RampPairs(Ramps):
    """The same, and of each pixel whether it is in the bright half."""

    target = "mask"

    def __getitem__(self, index):
        image, _ = super().__getitem__(index)
        return image, (np.asarray(image)[..., 0] > 95).astype(np.uint8)


@SEGMENTATION_SETS.register("ramp_pairs")
def ramp_pairs(split, data_path, num_classes, size):
    pairs = RampPairs(split, data_path)
    pairs.classes = ["dark", "bright"]
    return pairs


@TARGETS.register("contrast")
class Contrast(Target):
    """Pixels less the patch's mean, times a setting."""

    note = "Contrast alone is predicted; each hidden patch is shown with its true mean."

    def __init__(self, patch_values: int, contrast_by: float = 2.0) -> None:
        super().__init__(patch_values)
        self.by = contrast_by

    @staticmethod
    def add_flags(group):
        group.add_argument("--contrast_by", type=float, default=2.0, help="factor of the contrast")

    @staticmethod
    def from_args(values):
        return {"contrast_by": values["contrast_by"]}

    def forward(self, patches):
        return (patches - patches.mean(dim=-1, keepdim=True)) * self.by

    def to_pixels(self, pred, true_patches):
        return pred / self.by + true_patches.mean(dim=-1, keepdim=True)
