"""mIoU and its kin, against scikit-learn's confusion matrix on one process with all pixels."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import start_group, wait
from torch import Tensor

from util.measure.confusion import ConfusionMeter, Segmentation

K = 7
SIZES = [(3, 5), (1, 1), (8, 2), (6, 6), (4, 9), (2, 7), (5, 5)]


def maps(number: int) -> tuple[Tensor, Tensor]:
    """A prediction and a label of some size; class 5 is in neither, class 6 in predictions alone,
    and a fifth of the pixels are ignored."""
    random = np.random.default_rng(number)
    size = SIZES[number]
    pred = random.choice([0, 1, 2, 3, 4, 6], size)
    label = random.choice([0, 1, 2, 3, 4, 255], size)
    label = np.where(random.random(size) < 0.5, np.minimum(pred, 4), label)
    label = np.where(random.random(size) < 0.2, 255, label)
    return torch.from_numpy(pred), torch.from_numpy(label.astype(np.uint8))


def flat() -> tuple[np.ndarray, np.ndarray]:
    """All pixels that count, predictions and labels."""
    pairs = [maps(i) for i in range(len(SIZES))]
    pred = np.concatenate([p.numpy().ravel() for p, _ in pairs])
    label = np.concatenate([t.numpy().ravel() for _, t in pairs]).astype(np.int64)
    return pred[label != 255], label[label != 255]


def check(result: Segmentation, matrix: Tensor) -> None:
    """Against scikit-learn, to rounding in float64."""
    from sklearn import metrics

    pred, label = flat()
    assert np.array_equal(matrix.numpy(), metrics.confusion_matrix(label, pred, labels=range(K)))
    there = [0, 1, 2, 3, 4, 6]
    iou = metrics.jaccard_score(label, pred, labels=there, average=None)
    assert result.miou == pytest.approx(100 * iou.mean(), rel=1e-12)
    assert result.pixel_accuracy == pytest.approx(
        100 * metrics.accuracy_score(label, pred), rel=1e-12
    )
    known = np.isin(label, range(5))  # class 6 has no label, so no accuracy
    assert known.all()
    with pytest.warns(UserWarning, match="not in y_true"):
        expected = metrics.balanced_accuracy_score(label, pred)
    assert result.class_accuracy == pytest.approx(100 * expected, rel=1e-12)
    assert [result.classes[k]["iou"] for k in there] == pytest.approx(list(100 * iou), rel=1e-12)
    assert result.classes[5] == {"iou": None, "accuracy": None, "pixels": 0, "predicted": 0}
    assert result.classes[6]["iou"] == 0 and result.classes[6]["accuracy"] is None
    assert [row["pixels"] for row in result.classes] == [(label == k).sum() for k in range(K)]
    ignored = sum(math.prod(size) for size in SIZES) - len(label)
    assert (result.pixels, result.ignored) == (len(label), ignored) and ignored > 20


def test_one_process_and_images_of_different_sizes() -> None:
    meter = ConfusionMeter(K)
    for i in range(len(SIZES)):
        meter.update(*maps(i))
    check(meter.result(), meter.matrix)
    assert meter.result().summary()["miou"] == meter.result().miou


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_add_up_by_hand(world: int) -> None:
    meters = [ConfusionMeter(K) for _ in range(world)]
    for i in range(len(SIZES)):
        meters[i % world].update(*maps(i))
    total = torch.stack([meter._counts for meter in meters]).sum(0)
    meters[0].reduce(lambda own: total.clone())
    check(meters[0].result(), meters[0].matrix)


def count(rank: int, world: int, folder: Path) -> None:
    """One process of several, on the images that are its turn; the third of 3 has none of its own
    in the second half."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    meter = ConfusionMeter(K)
    for i in range(rank, len(SIZES), world):
        meter.update(*maps(i))

    def total(counts: Tensor) -> Tensor:
        counts = counts.clone()
        dist.all_reduce(counts)
        return counts

    meter.reduce(total)
    torch.save((meter.result(), meter.matrix), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 3])
def test_processes(world: int, tmp_path: Path) -> None:
    assert wait(start_group(count, world, tmp_path)) == [0] * world
    for rank in range(world):
        check(*torch.load(tmp_path / f"{rank}.pt", weights_only=False))


def test_nothing_counted() -> None:
    meter = ConfusionMeter(2)
    meter.update(torch.zeros(3, dtype=torch.int64), torch.full((3,), 255))
    result = meter.result()
    assert math.isnan(result.miou) and math.isnan(result.pixel_accuracy)
    assert math.isnan(result.class_accuracy) and (result.pixels, result.ignored) == (0, 3)


def test_counts_beyond_float32() -> None:
    # 2 ** 24 + 1 is the first integer that float32 does not have.
    meter = ConfusionMeter(2)
    meter._counts[0] = 2**24
    meter.update(torch.tensor([0]), torch.tensor([0]))
    assert meter.matrix[0, 0] == 2**24 + 1


@pytest.mark.parametrize(
    ("pred", "label"), [([0, 2], [0, 1]), ([0, 0], [0, 2]), ([-1, 0], [0, 0]), ([0, 0], [-1, 0])]
)
def test_what_is_no_class(pred: list[int], label: list[int]) -> None:
    meter = ConfusionMeter(2)
    meter.update(torch.tensor(pred), torch.tensor(label))
    with pytest.raises(ValueError, match="1 pixels"):
        meter.result()


def test_what_cannot_be_compared() -> None:
    meter = ConfusionMeter(2)
    with pytest.raises(ValueError, match="differ in shape"):
        meter.update(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="integers"):
        meter.update(torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="ignored"):
        ConfusionMeter(10, ignore=3)


def test_the_table() -> None:
    meter = ConfusionMeter(3)
    meter.update(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]))
    lines = meter.result().table(["sky", "a long name", "never"]).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["sky", "50.00", "100.00", "1"],
        ["a", "long", "name", "50.00", "50.00", "2"],
        ["never", "-", "-", "0"],
    ]
    assert len({len(line) for line in lines}) == 1
