"""Augmentation and evaluation transforms on the CPU, normalisation on the device.

The transforms take a PIL image or a uint8 tensor [C, H, W] and give a uint8 tensor [C, h, w]: a
quarter of the bytes of floats to carry to the device.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from timm.data import auto_augment as auto_augmentation
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from util.data.jpeg import as_pixels
from util.errors import BadInput
from util.spec import Pair

BICUBIC = InterpolationMode.BICUBIC
# How a random crop is resampled.
INTERPOLATIONS = {"bicubic": BICUBIC, "bilinear": InterpolationMode.BILINEAR}

# Evaluation keeps the centre 224 of 256; above 224 MAE's recipe has no margin.
CROP_SHARE = 0.875
LARGEST_WITH_MARGIN = 224
WITH_MARGIN = ("imagefolder", "places365")  # sets of files, see `Source.eval_margin`


def check_crop_scale(crop_scale: tuple[float, float]) -> None:
    """Refuse what are not a smallest and a largest share of the image's area."""
    if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise BadInput(f"crop_scale {crop_scale} is not a smallest and a largest share in (0, 1]")


class PretrainTransform:
    """MAE's pretraining augmentation: random resized crop and horizontal flip, no more.

    Draws come from torch's global CPU generator alone, so the caller seeds them for each sample.

    Args:
        size: (h, w) of the result, pixels.
        crop_scale: smallest and largest share of the image's area that a crop covers.
        flip: flip half of the crops left to right.
        interpolation: of `INTERPOLATIONS`.

    Source: He et al., "Masked Autoencoders Are Scalable Vision Learners", appendix A.1.
    """

    def __init__(
        self,
        size: Pair,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        flip: bool = True,
        interpolation: str = "bicubic",
    ) -> None:
        check_crop_scale(crop_scale)
        mode = INTERPOLATIONS[interpolation]
        steps: list[torch.nn.Module] = [
            v2.RandomResizedCrop(size, scale=crop_scale, interpolation=mode, antialias=True)
        ]
        if flip:
            steps.append(v2.RandomHorizontalFlip())
        self.steps = v2.Compose([*steps, v2.PILToTensor()])

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """One augmented view: uint8 [C, h, w]."""
        return self.steps(image)


class PretrainTensorTransform:
    """`PretrainTransform` on uint8 tensors: the same crops and flips, resampled by torch's code.

    From one generator both draw the same numbers, so crop and flip are the same; pixels differ by
    rounding, of coefficients and between the axes. A PIL image is turned into a tensor once it is
    cropped.

    Args:
        size: (h, w) of the result, pixels.
        crop_scale: smallest and largest share of the image's area that a crop covers.
        flip: flip half of the crops left to right.
        interpolation: of `INTERPOLATIONS`.
    """

    # Seeding a generator to hand over is cheap; saving and restoring the three global ones is not.
    takes_generator = True

    def __init__(
        self,
        size: Pair,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        flip: bool = True,
        interpolation: str = "bicubic",
    ) -> None:
        check_crop_scale(crop_scale)
        self.size, self.crop_scale, self.flip = size, crop_scale, flip
        self.mode = INTERPOLATIONS[interpolation].value

    def __call__(
        self, image: Image.Image | Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """One augmented view: uint8 [C, h, w], channels innermost in memory.

        All frames of a clip, uint8 [C, T, H, W], have the same crop and flip.

        Args:
            generator: on the CPU; None: torch's global one.
        """
        if isinstance(image, Tensor) and image.ndim == 4:
            C, T, *size = image.shape
            frames = self(image.reshape(C * T, *size), generator)
            return frames.unflatten(0, (C, T)).contiguous()
        height, width = image.shape[1:] if isinstance(image, Tensor) else image.size[::-1]
        top, left, h, w = crop_box(height, width, self.crop_scale, generator)
        flipped = self.flip and torch.rand(1, generator=generator).item() < 0.5
        if isinstance(image, Tensor):
            part = image[:, top : top + h, left : left + w]
        else:
            part = as_pixels(image.crop((left, top, left + w, top + h)))
        # The vectorised code is for this layout alone; for others it is 2 to 4 times as slow.
        part = part.unsqueeze(0).contiguous(memory_format=torch.channels_last)
        view = torch.nn.functional.interpolate(part, self.size, mode=self.mode, antialias=True)[0]
        return view.flip(2) if flipped else view


ASPECTS = (3 / 4, 4 / 3)
LOG_ASPECTS = torch.tensor(ASPECTS).log().tolist()  # in float32, as torchvision has them
CROP_ATTEMPTS = 10


def crop_box(
    height: int, width: int, scale: tuple[float, float], generator: torch.Generator | None = None
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop, drawn as `RandomResizedCrop` draws it.

    The area's share is uniform in `scale`, the logarithm of the aspect ratio between those of 3:4
    and 4:3; what does not fit is drawn anew, at most ten times, and then the largest centred crop
    of such an aspect is taken.

    Source: torchvision's RandomResizedCrop, draw for draw.
    """
    number, area = torch.empty(1), height * width
    for _ in range(CROP_ATTEMPTS):
        target = area * number.uniform_(*scale, generator=generator).item()
        aspect = number.uniform_(*LOG_ASPECTS, generator=generator).exp_().item()
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return _below(height - h + 1, generator), _below(width - w + 1, generator), h, w
    w, h = width, height
    if width / height < ASPECTS[0]:
        h = round(w / ASPECTS[0])
    elif width / height > ASPECTS[1]:
        w = round(h * ASPECTS[1])
    return (height - h) // 2, (width - w) // 2, h, w


def _below(limit: int, generator: torch.Generator | None) -> int:
    return int(torch.randint(0, limit, (1,), generator=generator).item())


AUGMENTS = ("none", "fixed_crop", "random_crop", "crop_jitter")
JITTER = 0.4  # of brightness, contrast and saturation, as in MAE's ablation


def pretrain_transform(
    augment: str,
    decoder: str,
    size: Pair,
    crop_scale: tuple[float, float],
    *,
    flip: bool,
    channels: int,
    margin: bool,
    interpolation: str = "bicubic",
) -> Callable[[Any], Tensor]:
    """The augmentation of that name (MAE's ablation): an image to a uint8 view [C, h, w].

    Args:
        augment: none: the centre as in evaluation, never flipped; fixed_crop: scaled to cover
            size / .875, then a random place; random_crop: `PretrainTransform`, the recipe's;
            crop_jitter: the same with colours shaken.
        decoder: of `util.data.images.IMAGE_DECODERS`, which the images come from.
        size, crop_scale, flip: see `PretrainTransform`; crop_scale is for the last two.
        channels: of the images.
        margin: of the centre, see `EvalTransform`.
        interpolation: of the last two, see `INTERPOLATIONS`; the others are bicubic.

    Raises:
        BadInput: an unknown name, or colours to shake that are neither gray nor RGB.
    """
    if augment not in AUGMENTS:
        raise BadInput(f"unknown augmentation {augment!r}, choose from {', '.join(AUGMENTS)}")
    if augment == "none":
        return EvalTransform(size, margin)
    if augment == "fixed_crop":
        return FixedCropTransform(size, flip)
    kind = PretrainTransform if decoder == "pil" else PretrainTensorTransform
    crop = kind(size, crop_scale, flip, interpolation)
    if augment == "random_crop":
        return crop
    if channels not in (1, 3):
        raise BadInput(
            f"crop_jitter shakes gray and RGB images, these have {channels} channels; use "
            "--augment random_crop"
        )
    # After the crop: the same view, and fewer pixels to shake.
    jitter = v2.ColorJitter(JITTER, JITTER, JITTER if channels == 3 else 0)
    return v2.Compose([crop, jitter])


class FixedCropTransform:
    """A crop of fixed size from a random place, and horizontal flip: MAE's "crop, fixed size".

    The image is scaled until it covers size / .875, which leaves an eighth of each side to move in.
    Draws come from torch's global CPU generator alone.
    """

    def __init__(self, size: Pair, flip: bool = True) -> None:
        self.cover = (int(size[0] / CROP_SHARE), int(size[1] / CROP_SHARE))
        steps: list[torch.nn.Module] = [v2.RandomCrop(size)]
        if flip:
            steps.append(v2.RandomHorizontalFlip())
        self.steps = v2.Compose([*steps, v2.PILToTensor()])

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """One augmented view: uint8 [C, h, w]."""
        return self.steps(scale_to_cover(image, self.cover))


class FinetuneTransform:
    """Fine-tuning's augmentation: random resized crop, flip, and timm's RandAugment or jitter.

    Draws come from python's, numpy's and torch's global generators, which the caller seeds.

    Args:
        size: (h, w) of the result, pixels.
        auto_augment: timm's policy, for example rand-m9-mstd0.5-inc1; None: none.
        color_jitter: strength, without a policy; None: none.
        crop_scale: smallest and largest share of the image's area that a crop covers.
        flip: flip half of the crops left to right.
        mean: of the data set, in 0..1 units: what RandAugment fills with.

    Raises:
        BadInput: a policy that timm does not know, or one for images that Pillow cannot hold.

    Source: MAE's fine-tuning recipe (appendix A.1), by timm.
    """

    def __init__(
        self,
        size: Pair,
        *,
        auto_augment: str | None,
        color_jitter: float | None,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        flip: bool = True,
        mean: Sequence[float],
    ) -> None:
        check_crop_scale(crop_scale)
        if len(mean) not in (1, 3) and (auto_augment or color_jitter):
            raise BadInput(
                f"RandAugment and jitter know gray and RGB, not images of {len(mean)} channels; "
                "give --aa none and no --color_jitter"
            )
        if not auto_augment and color_jitter is None:
            self.steps: Callable = PretrainTransform(size, crop_scale, flip)
            return
        try:
            steps = create_transform(
                (len(mean), *size),
                is_training=True,
                use_prefetcher=True,  # uint8 tensors: normalisation is the device's
                scale=crop_scale,
                hflip=0.5 if flip else 0.0,
                color_jitter=color_jitter,
                auto_augment=auto_augment,
                interpolation="bicubic",
                mean=tuple(mean),
            )
        except (AssertionError, ValueError, KeyError) as error:
            raise BadInput(f"timm does not know the policy {auto_augment!r}: {error}") from error
        for step in steps.transforms:
            rows = getattr(step, "policy", [getattr(step, "ops", [])])
            for operation in (operation for row in rows for operation in row):
                if operation.aug_fn is auto_augmentation.posterize:
                    operation.aug_fn = posterize
        self.steps = steps

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """One augmented view: uint8 [C, h, w]."""
        return self.steps(image)


def posterize(image: Image.Image, bits: int, **unused: Any) -> Image.Image:
    """timm's operation, also at 0 bits: black. RandAugment asks for them, Pillow 13 refuses."""
    if bits < 1:
        return Image.new(image.mode, image.size)
    return auto_augmentation.posterize(image, bits)


def scale_to_cover(image: Any, cover: Pair) -> Any:
    """Scale (bicubic) to the smallest size of the same aspect that covers (h, w) pixels."""
    longest = 16 * min(v2.functional.get_size(image))
    # Covering with a strip would enlarge it to gigabytes, of which the crop keeps the middle.
    if max(v2.functional.get_size(image)) > longest:
        shape = [min(side, longest) for side in v2.functional.get_size(image)]
        image = v2.functional.center_crop(image, shape)
    H, W = v2.functional.get_size(image)
    h, w = cover
    # Whole numbers, because a float could round the free side to one pixel below the target.
    scaled = [h, h * W // H] if h * W >= w * H else [w * H // W, w]
    return v2.functional.resize(image, scaled, interpolation=BICUBIC, antialias=True)


def has_margin(data: Mapping[str, Any]) -> bool:
    """Whether evaluation cuts a margin off the images of a checkpoint's data set.

    Args:
        data: what the checkpoint says of the set. Older ones say its name alone, and files of other
            programs nothing: photographs of any size, which have a margin.
    """
    return bool(data.get("eval_margin", data.get("dataset", "imagefolder") in WITH_MARGIN))


class EvalTransform:
    """Evaluation: scale until the image covers size / .875, keep its aspect, crop the centre.

    For a square size that is Resize(int(size / .875), bicubic) on the short side and CenterCrop.
    There is no margin when the longer side of `size` is above 224.

    Args:
        size: (h, w) of the result, pixels.
        margin: False scales to `size` itself, for sets whose border matters (digits).
    """

    def __init__(self, size: Pair, margin: bool = True) -> None:
        self.size = size
        self.share = CROP_SHARE if margin and max(size) <= LARGEST_WITH_MARGIN else 1.0
        self.cover = (int(size[0] / self.share), int(size[1] / self.share))

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """The centre view: uint8 [C, h, w]."""
        image = scale_to_cover(image, self.cover)
        image = v2.functional.center_crop(image, list(self.size))
        return image if isinstance(image, Tensor) else v2.functional.pil_to_tensor(image)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Gray levels to zero mean and unit deviation: (x / 255 - mean) / std, without a host sync.

    Args:
        images: uint8 [B, C, *size], on any device.
        mean, std: C numbers each, in units of 0..1.

    Returns:
        float32 [B, C, *size] on the same device.

    Raises:
        ValueError: mean or std is not C long.
    """
    shift, scale = _per_channel(images, mean), _per_channel(images, std)
    return images.float().div(255).sub(shift).div(scale)


def denormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The inverse of `normalize`, neither rounded nor clamped: a prediction may leave 0..255.

    Args:
        images: float [B, C, *size], normalised.
        mean, std: C numbers each, in units of 0..1.

    Returns:
        float32 [B, C, *size], gray levels 0 to 255.

    Raises:
        ValueError: mean or std is not C long.
    """
    shift, scale = _per_channel(images, mean), _per_channel(images, std)
    return images.float().mul(scale).add(shift).mul(255)


def _per_channel(images: Tensor, values: Sequence[float]) -> Tensor:
    """[1, C, 1, ...] on the images' device."""
    if len(values) != images.shape[1]:
        raise ValueError(
            f"{len(values)} values of mean or std for images of {images.shape[1]} channels"
        )
    column = torch.tensor(values, dtype=torch.float32)
    column = column.view(1, -1, *[1] * (images.ndim - 2))
    # A blocking copy would make the host wait for every kernel in flight.
    return column.to(images.device, non_blocking=True)
