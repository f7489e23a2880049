"""Transforms against plain torchvision v1 pipelines, on PIL images and tensors; normalisation."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as v1

from util.data.transforms import EvalTransform, PretrainTransform, denormalize, normalize

BICUBIC = v1.InterpolationMode.BICUBIC
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth waves, a different one per channel, under some noise."""
    rng = np.random.default_rng((width, height))
    y, x = np.mgrid[:height, :width]
    planes = [127 + 90 * np.sin(x / 17 + c) * np.cos(y / 11 - c) for c in range(3)]
    noisy = np.stack(planes, axis=-1) + rng.normal(0, 8, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)


def as_tensor(image: Image.Image) -> torch.Tensor:
    return v1.functional.pil_to_tensor(image)


# --- Pretraining ---


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.6, 0.7)])
def test_pretrain_transform_equals_the_official_pipeline(mode, size, scale):
    ours = PretrainTransform(size, crop_scale=scale)
    official = v1.Compose(
        [
            v1.RandomResizedCrop(size, scale=scale, interpolation=BICUBIC),
            v1.RandomHorizontalFlip(),
            v1.PILToTensor(),
        ]
    )
    image = picture(150, 117, mode)
    for seed in range(8):
        torch.manual_seed(seed)
        expected = official(image)
        torch.manual_seed(seed)
        view = ours(image)
        assert view.dtype == torch.uint8 and view.shape == (len(mode), *size)
        assert torch.equal(view, expected), seed


def test_pretrain_transform_without_flip_never_flips():
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (100, 1)))
    slopes = {True: set(), False: set()}
    for flip, signs in slopes.items():
        transform = PretrainTransform((32, 32), flip=flip)
        for seed in range(20):
            torch.manual_seed(seed)
            view = transform(ramp).float()
            signs.add(bool(view[..., -1].mean() > view[..., 0].mean()))
    assert slopes == {True: {True, False}, False: {True}}


def test_pretrain_transform_draws_from_torch_alone():
    image, transform = picture(90, 80), PretrainTransform((32, 32))
    views = []
    for other in (1, 2):
        random.seed(other)
        np.random.seed(other)
        torch.manual_seed(7)
        before = random.getstate(), np.random.get_state()[1].copy()
        views.append(transform(image))
        assert random.getstate() == before[0]
        assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(*views)
    assert not torch.equal(views[0], transform(image))


def test_pretrain_transform_gives_tensors_the_same_view():
    image, transform = picture(150, 117), PretrainTransform((64, 64))
    for seed in range(5):
        torch.manual_seed(seed)
        from_pil = transform(image)
        torch.manual_seed(seed)
        from_tensor = transform(as_tensor(image))
        assert from_tensor.dtype == torch.uint8 and from_tensor.shape == (3, 64, 64)
        # Both round twice, after columns and after rows, in fixed point of other widths.
        assert (from_pil.int() - from_tensor.int()).abs().max() <= 2, seed


def test_transforms_take_any_number_of_channels():
    image = torch.cat([as_tensor(picture(70, 60))] * 2)[:5]
    torch.manual_seed(0)
    assert PretrainTransform((32, 48))(image).shape == (5, 32, 48)
    view = EvalTransform((32, 48))(image)
    assert view.shape == (5, 32, 48) and view.dtype == torch.uint8
    assert torch.equal(view[:3], EvalTransform((32, 48))(image[:3]))


# --- Evaluation ---


@pytest.mark.parametrize("wide_high", [(300, 200), (200, 300), (256, 256), (427, 640), (31, 19)])
@pytest.mark.parametrize("size, resized", [(28, 32), (64, 73), (96, 109), (224, 256), (256, 256)])
def test_eval_transform_equals_the_official_pipeline(wide_high, size, resized):
    official = v1.Compose(
        [v1.Resize(resized, interpolation=BICUBIC), v1.CenterCrop(size), v1.PILToTensor()]
    )
    image = picture(*wide_high)
    view = EvalTransform((size, size))(image)
    assert view.dtype == torch.uint8 and view.shape == (3, size, size)
    assert torch.equal(view, official(image))


@pytest.mark.parametrize("size", [28, 64, 384])
def test_eval_transform_without_margin_keeps_the_short_side(size):
    official = v1.Compose(
        [v1.Resize(size, interpolation=BICUBIC), v1.CenterCrop(size), v1.PILToTensor()]
    )
    image = picture(130, 101)
    assert torch.equal(EvalTransform((size, size), margin=False)(image), official(image))


def test_eval_transform_of_an_image_of_that_size_is_the_image():
    image = picture(28, 28, "L")
    assert torch.equal(EvalTransform((28, 28), margin=False)(image), as_tensor(image))


@pytest.mark.parametrize(
    "size, wide_high, scaled",
    [
        ((64, 96), (200, 200), (109, 109)),  # the width binds: int(96 / .875) = 109
        ((64, 96), (300, 100), (219, 73)),  # the height binds: int(64 / .875) = 73
        ((96, 64), (100, 300), (73, 219)),
        ((64, 256), (300, 300), (256, 256)),  # above 224: no margin
    ],
)
def test_eval_transform_covers_a_size_that_is_not_square(size, wide_high, scaled):
    image = picture(*wide_high)
    expected = v1.CenterCrop(size)(image.resize(scaled, Image.Resampling.BICUBIC))
    assert torch.equal(EvalTransform(size)(image), as_tensor(expected))


@pytest.mark.parametrize("margin", [True, False])
def test_eval_transform_never_pads(margin):
    rng = np.random.default_rng(0)
    for _ in range(200):
        (w, h), size = rng.integers(1, 90, 2).tolist(), tuple(rng.integers(1, 70, 2).tolist())
        white = Image.new("L", (w, h), 255)
        view = EvalTransform(size, margin)(white)
        assert view.shape == (1, *size) and int(view.min()) == 255, (w, h, size)


def test_eval_transform_gives_tensors_the_same_view():
    image = picture(150, 117)
    for size in ((64, 64), (48, 96)):
        from_pil, from_tensor = (EvalTransform(size)(x) for x in (image, as_tensor(image)))
        assert (from_pil.int() - from_tensor.int()).abs().max() <= 2


# --- Normalisation ---


def test_normalize_equals_totensor_and_normalize():
    images = [picture(40, 30), picture(40, 30).rotate(180)]
    official = v1.Compose([v1.ToTensor(), v1.Normalize(MEAN, STD)])
    expected = torch.stack([official(image) for image in images])
    got = normalize(torch.stack([as_tensor(image) for image in images]), MEAN, STD)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_denormalize_is_the_inverse(channels):
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, channels, 1, 1)
    mean = [0.3 + 0.1 * c for c in range(channels)]
    std = [0.2 + 0.05 * c for c in range(channels)]
    back = denormalize(normalize(levels, mean, std), mean, std)
    assert back.dtype == torch.float32
    assert torch.equal(back.round(), levels.float())
    assert (back - levels).abs().max() < 1e-3
    noise = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    assert denormalize(noise, mean, std).min() < 0, "a prediction below black is kept"


@pytest.mark.parametrize("function", [normalize, denormalize])
def test_normalize_refuses_statistics_of_other_channels(function):
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"3 values .* 1 channels"):
        function(images, MEAN, STD)
    with pytest.raises(ValueError, match=r"3 values .* 1 channels"):
        function(images, MEAN[:1], STD)


@pytest.mark.gpu
def test_normalize_does_not_wait_for_the_device():
    if not torch.cuda.is_available():
        pytest.skip("gpu: no CUDA device")
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        denormalize(normalize(images, MEAN, STD), MEAN, STD)
    finally:
        torch.cuda.set_sync_debug_mode("default")
