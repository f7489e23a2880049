"""How evaluation looks at images, in the words of the programs that exported weights go to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from util.data.images import IMAGENET_MEAN, IMAGENET_STD
from util.data.transforms import EvalTransform, has_margin

BICUBIC = 3  # of Pillow, which transformers' files name by number


@dataclass(frozen=True)
class Preprocessing:
    """`EvalTransform` and `normalize` as numbers.

    Attributes:
        size: (h, w) of the centre crop.
        share: of each side of the scaled image that the crop keeps.
        mean, std: of each channel, in 0..1 units.
    """

    size: tuple[int, int]
    share: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def for_timm(self) -> dict[str, Any]:
        """The part of a `pretrained_cfg` that `timm.data.resolve_model_data_config` reads."""
        return {
            "input_size": (len(self.mean), *self.size),
            "mean": self.mean,
            "std": self.std,
            "crop_pct": self.share,
            "crop_mode": "center",
            "interpolation": "bicubic",
        }

    def for_transformers(self) -> dict[str, Any]:
        """A preprocessor_config.json.

        Of its processors this one scales the short side, keeps the aspect and crops the centre;
        that of ViT in version 4 squeezes the whole image into a square. Where the image is not
        square, the short side is scaled to the longer side of the crop.
        """
        return {
            "image_processor_type": "BitImageProcessor",
            "do_convert_rgb": len(self.mean) == 3,
            "do_resize": True,
            "size": {"shortest_edge": int(max(self.size) / self.share)},
            "resample": BICUBIC,
            "do_center_crop": True,
            "crop_size": {"height": self.size[0], "width": self.size[1]},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def describe(self, said: bool) -> str:
        """The same for a reader who does it by hand.

        Args:
            said: whether mean and deviation are the file's own.
        """
        whose = "" if said else " (ImageNet's, for the file says none)"
        return (
            f"scaled (bicubic) to cover {self.size[0]} x {self.size[1]} / {self.share:g}, centre "
            f"crop; 0..1, then less mean {self.mean}, over deviation {self.std}{whose}"
        )


def find_preprocessing(
    data: Mapping[str, Any], size: Sequence[int], channels: int
) -> tuple[Preprocessing, bool]:
    """What an exported model's images need, and whether its file said their mean and deviation.

    Args:
        data: what a checkpoint says of its data set, or nothing: then ImageNet's numbers are taken,
            for gray images their mean.
        size: (h, w) of the model's images.
    """
    shape = (size[0], size[1])
    share = EvalTransform(shape, has_margin(data)).share
    said = all(len(data.get(name) or ()) == channels for name in ("mean", "std"))
    stats = [
        tuple(data[name]) if said else known if channels == 3 else (sum(known) / 3,) * channels
        for name, known in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD))
    ]
    return Preprocessing(shape, share, stats[0], stats[1]), said
