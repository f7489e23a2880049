"""Inference on whole images, against numpy and sums written out. Tolerance 1e-6 where summed."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from util.errors import BadInput
from util.measure.windows import multi_scale, scaled_sizes, slide, spans, whole

K = 3


def image_of(height: int, width: int) -> Tensor:
    """A picture whose every pixel is another."""
    return torch.randn(1, 2, height, width, generator=torch.Generator().manual_seed(height * width))


def local(x: Tensor) -> Tensor:
    """A model of single pixels, at full resolution."""
    weight = torch.tensor([[1.0, -1.0], [0.5, 2.0], [0.0, 1.0]])
    return torch.einsum("kc,bchw->bkhw", weight, x)


def aware(x: Tensor) -> Tensor:
    """A model that sees its whole input: each window has other logits for the same pixel, which
    also depend on the place in the window."""
    place = torch.linspace(0, 1, x.shape[3]) + torch.linspace(0, 2, x.shape[2])[:, None]
    return local(x) * place + x.mean()


def coarse(x: Tensor) -> Tensor:
    """Logits at a stride of 4, as UPerNet's."""
    return F.avg_pool2d(aware(x), 4, ceil_mode=True)


def slide_by_numpy(image: Tensor, window: tuple[int, int], stride: tuple[int, int]) -> np.ndarray:
    """mmsegmentation's rule, in float64: windows from every multiple of the stride until one
    reaches the end, that one moved inside; logits summed, divided by how many."""
    H, W = image.shape[2:]
    places = []
    for side, size, step in zip((H, W), window, stride, strict=True):
        starts = [0]
        while starts[-1] + size < side:
            starts.append(starts[-1] + step)
        places.append([max(min(start, side - size), 0) for start in starts])
    total, count = np.zeros((K, H, W)), np.zeros((H, W))
    for top in places[0]:
        for left in places[1]:
            part = image[:, :, top : top + window[0], left : left + window[1]]
            found = aware(part)[0].double().numpy()
            total[:, top : top + window[0], left : left + window[1]] += found
            count[top : top + window[0], left : left + window[1]] += 1
    assert count.min() >= 1 and (count.max() > 1 or len(places[0]) * len(places[1]) == 1)
    return total / count


@pytest.mark.parametrize("size", [(20, 20), (20, 33), (21, 11), (7, 40), (5, 6), (1, 1), (13, 27)])
@pytest.mark.parametrize(("window", "stride"), [((12, 12), (8, 8)), ((8, 14), (5, 9))])
def test_overlapping_windows(
    size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int]
) -> None:
    image = image_of(*size)
    found = slide(aware, image, window, stride)
    assert found.shape == (1, K, *size) and found.dtype == torch.float32
    np.testing.assert_allclose(found[0].numpy(), slide_by_numpy(image, window, stride), atol=1e-5)


def test_the_published_windows() -> None:
    assert list(spans(683, 512, 341)) == [(0, 512), (171, 683)]
    assert list(spans(2048, 512, 341))[-2:] == [(1364, 1876), (1536, 2048)]
    assert list(spans(853, 512, 341)) == [(0, 512), (341, 853)]
    assert list(spans(512, 512, 341)) == [(0, 512)] == list(spans(513, 512, 341))[:1]
    assert list(spans(300, 512, 341)) == [(0, 300)]


@pytest.mark.parametrize("size", [(16, 16), (9, 16), (5, 3), (1, 2)])
@pytest.mark.parametrize("model", [aware, coarse])
def test_one_window_is_the_whole(size: tuple[int, int], model: object) -> None:
    image = image_of(*size)
    assert torch.equal(slide(model, image, 16, 10), whole(model, image))


def test_whole_resizes_to_the_image() -> None:
    image = image_of(10, 13)
    assert torch.equal(whole(local, image), local(image))
    expected = F.interpolate(coarse(image), (10, 13), mode="bilinear", align_corners=False)
    assert torch.equal(whole(coarse, image), expected)
    half = whole(lambda x: local(x).bfloat16(), image)
    assert half.dtype == torch.float32
    with_gradient = image.clone().requires_grad_()
    assert not whole(local, with_gradient).requires_grad


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(12, 20), (20, 12), (3, 5)])
def test_several_scales_by_hand(size: tuple[int, int], flip: bool) -> None:
    image, scales, least = image_of(*size), [0.5, 0.75, 1.0, 1.75], 12
    H, W = size
    parts = []
    for scale in scales:
        short = max(scale * min(size), least)
        h, w = (round(side * short / min(size)) for side in size)
        scaled = F.interpolate(image, (h, w), mode="bilinear", align_corners=False)
        for mirrored in [False, True][: 1 + flip]:
            given = torch.flip(scaled, [3]) if mirrored else scaled
            logits = F.interpolate(aware(given), (H, W), mode="bilinear", align_corners=False)
            probability = torch.softmax(logits, 1)
            parts.append(torch.flip(probability, [3]) if mirrored else probability)
    found = multi_scale(partial(whole, aware), image, scales, flip, least)
    assert torch.allclose(found, torch.stack(parts).mean(0), atol=1e-6)
    assert torch.allclose(found.sum(1), torch.ones(1, H, W), atol=1e-5)


def test_equal_sizes_are_computed_once_and_count_each_time() -> None:
    calls = []

    def predict(x: Tensor) -> Tensor:
        calls.append(tuple(x.shape[2:]))
        return aware(x)

    image = image_of(8, 10)
    found = multi_scale(predict, image, [2.0, 0.5, 0.75, 1.0], False, 8)
    assert calls == [(16, 20), (8, 10)]
    big = F.interpolate(image, (16, 20), mode="bilinear", align_corners=False)
    last = F.interpolate(aware(big), (8, 10), mode="bilinear", align_corners=False)
    expected = (3 * aware(image).softmax(1) + last.softmax(1)) / 4
    assert torch.allclose(found, expected, atol=1e-6)


def test_published_scales_on_a_picture() -> None:
    scales = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    assert scaled_sizes((512, 683), scales, 512) == {
        (512, 683): 3, (640, 854): 1, (768, 1025): 1, (896, 1195): 1,
    }  # fmt: skip
    assert scaled_sizes((512, 683), [0.5]) == {(256, 342): 1}


def test_one_scale_is_a_softmax_and_another_size_can_be_asked_for() -> None:
    image = image_of(9, 6)
    found = multi_scale(local, image, [1.0], flip=True)
    assert torch.allclose(found, local(image).softmax(1), atol=1e-6)
    found = multi_scale(local, image, [1.0], flip=False, size=(18, 13))
    expected = F.interpolate(local(image), (18, 13), mode="bilinear", align_corners=False)
    assert torch.allclose(found, expected.softmax(1), atol=1e-6)


@pytest.mark.parametrize(("window", "stride"), [(8, 9), (8, 0), ((8, 4), (4, 5))])
def test_windows_that_leave_pixels_out(window: object, stride: object) -> None:
    with pytest.raises(BadInput, match="left out"):
        slide(local, image_of(20, 20), window, stride)


@pytest.mark.parametrize("scales", [[], [1.0, 0.0], [-1.0], [float("nan")]])
def test_scales_that_are_none(scales: list[float]) -> None:
    with pytest.raises(BadInput, match="above 0"):
        multi_scale(local, image_of(4, 4), scales, False)


def test_an_image_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"\[1, C, H, W\]"):
        whole(local, torch.ones(2, 4, 4))
