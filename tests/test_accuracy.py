"""Accuracy against scikit-learn; evaluation that does not depend on batches or processes."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import launch, wait
from torch import Tensor

from engine_finetune import evaluate
from models_zoo import CLASSIFIERS, create_model
from util.data.datasets import build_dataset
from util.data.images import BadImage
from util.data.randomness import EvalSampler
from util.data.samples import Samples, build_loader
from util.data.source import Source, Subset
from util.data.transforms import EvalTransform, normalize
from util.errors import BadInput
from util.measure.accuracy import Accuracy, AccuracyMeter, save_accuracy
from util.train.checkpoint import save_checkpoint

CPU = torch.device("cpu")
# Small enough that an evaluation takes milliseconds.
SMALL = {"img_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}


def answers(kind: str, classes: int, images: int = 300) -> tuple[Tensor, Tensor]:
    """Logits [N, C] that lean towards the label, and labels; `tied`: whole numbers, -2 to 3."""
    generator = torch.Generator().manual_seed(classes)
    labels = torch.randint(classes, (images,), generator=generator)
    logits = torch.randn(images, classes, generator=generator)
    logits += torch.nn.functional.one_hot(labels, classes)
    return (logits.round().clamp(-2, 3) if kind == "tied" else logits), labels


def measured(logits: Tensor, labels: Tensor, batch: int = 64) -> Accuracy:
    meter = AccuracyMeter(logits.shape[1], CPU)
    for some, theirs in zip(logits.split(batch), labels.split(batch), strict=True):
        meter.update(some, theirs)
    return meter.total(lambda x: x)


# ---- The meter ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["distinct", "tied"])
@pytest.mark.parametrize("classes", [3, 5, 6, 40])
def test_equal_to_scikit_learn(kind: str, classes: int) -> None:
    # Imported here: the processes below import this file, and need no scikit-learn.
    from sklearn import metrics

    logits, labels = answers(kind, classes)
    if kind == "tied":
        top = logits.topk(2).values
        assert (top[:, 0] == top[:, 1]).double().mean() > 0.1, "there were to be ties"
    result = measured(logits, labels)
    every = list(range(classes))
    taken = logits.numpy().argmax(1)  # numpy's is the first of equals
    assert result.images == 300 and result.broken == 0
    assert result.top1 == metrics.accuracy_score(labels, taken, normalize=False)
    assert np.array_equal(result.confusion, metrics.confusion_matrix(labels, taken, labels=every))
    if classes > 5:
        # Among equals scikit-learn takes the last: with the classes turned round, our first.
        top5 = metrics.top_k_accuracy_score(
            classes - 1 - labels, logits.flip(1), k=5, labels=every, normalize=False
        )
    else:
        top5 = 300
    assert result.top5 == top5
    probabilities = logits.double().softmax(1)
    loss = metrics.log_loss(labels, probabilities, labels=every)
    assert result.loss == pytest.approx(loss, rel=1e-12)  # float64, summed in another order
    for name, score in (("recall", metrics.recall_score), ("precision", metrics.precision_score)):
        expected = 100 * score(labels, taken, labels=every, average=None, zero_division=0)
        assert [row[name] for row in result.per_class()] == pytest.approx(expected, rel=1e-12)
    assert [row["images"] for row in result.per_class()] == np.bincount(labels).tolist()
    assert result.summary() == {
        "top1": result.top1 / 3, "top5": result.top5 / 3, "loss": result.loss, "images": 300,
    }  # fmt: skip


@pytest.mark.parametrize("batch", [1, 7, 300])
def test_batches_change_no_count(batch: int) -> None:
    logits, labels = answers("tied", 10)
    whole, parts = measured(logits, labels), measured(logits, labels, batch)
    assert torch.equal(parts.confusion, whole.confusion)
    assert (parts.top5, parts.images, parts.broken) == (whole.top5, whole.images, whole.broken)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-13)


def test_equal_logits_go_to_the_lower_class() -> None:
    result = measured(torch.zeros(8, 8), torch.arange(8))
    assert result.confusion[:, 0].tolist() == [1] * 8 and result.top1 == 1
    assert result.top5 == 5
    assert result.loss == pytest.approx(math.log(8), rel=1e-14)


def test_logits_that_are_not_finite_are_wrong_and_counted() -> None:
    logits, labels = answers("distinct", 7, images=40)
    fine = measured(logits[8:], labels[8:])
    labels[:8] = torch.tensor([0, 1, 2, 3, 4, 5, 6, 6])
    logits[:8] = 0
    logits[torch.arange(8), labels[:8]] = 9.0  # right, but for the values that follow
    logits[0, 3] = torch.nan
    logits[1] = torch.nan
    logits[2, 2] = torch.inf
    logits[3, 0] = torch.inf
    logits[4, 1] = -torch.inf
    logits[5, 5] = torch.nan
    logits[6] = torch.inf
    logits[7, 6] = -torch.inf
    result = measured(logits, labels, batch=5)
    assert (result.images, result.broken) == (40, 8)
    assert (result.top1, result.top5) == (fine.top1, fine.top5)
    assert int(result.confusion.sum()) == 40  # each stands in the table, in its own row
    assert result.confusion.sum(1).tolist() == labels.bincount(minlength=7).tolist()
    assert not math.isfinite(result.loss)


def test_half_precision_is_measured_as_it_is() -> None:
    logits, labels = answers("distinct", 12)
    for dtype in (torch.bfloat16, torch.float16):
        half, same = (measured(x, labels) for x in (logits.to(dtype), logits.to(dtype).double()))
        assert torch.equal(half.confusion, same.confusion)
        assert (half.top5, half.loss) == (same.top5, same.loss)


def test_a_process_without_images() -> None:
    result = AccuracyMeter(4, CPU).total(lambda x: x)
    assert (result.images, result.top1, result.top5, result.broken, result.loss) == (0, 0, 0, 0, 0)
    assert result.per_class() == [{"images": 0, "recall": 0.0, "precision": 0.0}] * 4


def test_counts_of_several_processes_are_added() -> None:
    logits, labels = answers("tied", 9)
    whole = measured(logits, labels)
    meters = [AccuracyMeter(9, CPU) for _ in range(3)]
    for rank, meter in enumerate(meters):
        meter.update(logits[rank::3], labels[rank::3])

    def sum_over_ranks(mine: Tensor) -> Tensor:
        name = next(n for n, x in vars(meters[0]).items() if x is mine)
        return sum(getattr(meter, name) for meter in meters)

    result = meters[0].total(sum_over_ranks)
    assert torch.equal(result.confusion, whole.confusion)
    assert (result.images, result.top5, result.broken) == (300, whole.top5, 0)
    assert result.loss == pytest.approx(whole.loss, rel=1e-13)


def test_files_say_what_was_measured(tmp_path: Path) -> None:
    logits, labels = answers("distinct", 5)
    result = measured(logits, labels)
    classes = ["tench, Tinca", 'a "quoted" name', "Ärmel"]  # the head has two spare outputs
    save_accuracy(tmp_path, result, classes, {"epoch": 3, "best": {"top1": 1.5}})
    written = json.loads((tmp_path / "result.json").read_text())
    assert written == {**result.summary(), "epoch": 3, "best": {"top1": 1.5}}
    names = [*classes, "class 3", "class 4"]
    with (tmp_path / "confusion.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header[1:] == names and [row[0] for row in rows] == names
    assert [[int(n) for n in row[1:]] for row in rows] == result.confusion.tolist()
    with (tmp_path / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == names
    for row, expected in zip(rows, result.per_class(), strict=True):
        assert int(row["images"]) == expected["images"]
        for key in ("recall", "precision"):
            assert float(row[key]) == pytest.approx(expected[key], abs=5e-5)  # four decimals


def test_a_class_without_images_has_no_recall_in_the_table(tmp_path: Path) -> None:
    meter = AccuracyMeter(3, torch.device("cpu"))
    meter.update(torch.eye(3)[[0, 2]], torch.tensor([0, 0]))
    save_accuracy(tmp_path, meter.total(lambda counts: counts), ["a", "b", "c"], {})
    rows = [line.split(",") for line in (tmp_path / "per_class.csv").read_text().splitlines()[1:]]
    assert [row[1:3] for row in rows] == [["2", "50.0000"], ["0", ""], ["0", ""]]


# ---- evaluate ----------------------------------------------------------------------------------


def classifier(classes: int = 7) -> torch.nn.Module:
    """A small one, whose head is large enough that it answers with many classes."""
    torch.manual_seed(1)
    model = create_model("vit_micro_patch4", num_classes=classes, drop_path=0.5, **SMALL)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model


def held_out(images: int) -> Source:
    return Subset(build_dataset("synthetic", "val"), range(images))


def evaluated(
    model: torch.nn.Module, source: Source, batch_size: int, **others: object
) -> Accuracy:
    samples = Samples(source, EvalTransform((16, 16), margin=source.eval_margin), 0)
    sampler = EvalSampler(range(len(source)), batch_size)
    loader = build_loader(samples, sampler, num_workers=0, pin_memory=False)
    settings = {"device": CPU, "sum_over_ranks": lambda x: x, "gather": lambda x: [x], **others}
    return evaluate(model, loader, 7, mean=source.mean, std=source.std, **settings)


def test_batches_of_any_size_measure_the_same() -> None:
    from sklearn import metrics

    model, source = classifier().train(), held_out(61)
    transform = EvalTransform((16, 16), margin=source.eval_margin)
    images = torch.stack([transform(source[i][0]) for i in range(61)])
    labels = [source[i][1] for i in range(61)]
    with torch.no_grad():  # evaluate is to turn drop path off by itself
        logits = model.eval()(normalize(images, source.mean, source.std))
    model.train()
    taken = logits.argmax(1)
    assert len(set(taken.tolist())) > 3
    expected = metrics.confusion_matrix(labels, taken, labels=range(7))
    loss = metrics.log_loss(labels, logits.double().softmax(1), labels=range(7))
    for batch_size in (1, 7, 64):
        result = evaluated(model, source, batch_size)
        assert (result.images, result.broken) == (61, 0)
        assert np.array_equal(result.confusion, expected)
        assert result.top5 == metrics.top_k_accuracy_score(
            labels, logits, k=5, labels=range(7), normalize=False
        )
        # float32 logits of size 5; another batch is another order of sums.
        assert result.loss == pytest.approx(loss, abs=1e-6)


class Broken(Source):
    """Some of its images cannot be decoded."""

    def __init__(self, bad: Sequence[int]) -> None:
        whole = held_out(20)
        super().__init__(whole.name, "val", whole.mean, whole.std, whole.classes)
        self.whole, self.bad = whole, bad

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int):
        if index in self.bad:
            raise BadImage(self.file_name(index), "a broken file")
        return self.whole[index]


def test_an_image_that_cannot_be_decoded_is_not_left_out() -> None:
    with pytest.raises(BadInput, match=r"2 images .*numbers 4, 11\)"):
        evaluated(classifier(), Broken([11, 4]), 8)
    # Also where another process met it: all end together.
    with pytest.raises(BadInput, match=r"1 image .*numbers 17\)"):
        evaluated(classifier(), held_out(20), 8, gather=lambda mine: [mine, [17]])


@pytest.mark.dist
def test_processes_change_no_number(tmp_path: Path, run_main) -> None:
    """64 images among three processes are 22, 21 and 21, in batches of 5 and a rest."""
    model = classifier(3)
    arguments = {**CLASSIFIERS["vit_micro_patch4"][1], **SMALL, "num_classes": 3}
    state = {
        "task": "finetune", "step": 1, "model": model.state_dict(), "model_args": arguments,
        "classes": held_out(1).classes,
    }  # fmt: skip
    path = save_checkpoint(tmp_path, state)
    flags = [
        "--eval", f"--resume={path}", "--dataset=synthetic", "--batch_size=5", "--num_workers=0",
        "--device=cpu",
    ]  # fmt: skip
    folders = {world: tmp_path / str(world) for world in (1, 2, 3)}
    runs = {
        world: launch(
            [*flags, f"--output_dir={folders[world]}"],
            tmp_path / f"out{world}",
            world,
            module="main_finetune",
        )
        for world in (2, 3)
    }
    code, out, _ = run_main("main_finetune", [*flags, f"--output_dir={folders[1]}"])
    assert code == 0 and "(64 images)" in out
    for world, children in runs.items():
        assert wait(children) == [0] * world, (tmp_path / f"out{world}").read_text()
    results = {w: json.loads((f / "result-eval.json").read_text()) for w, f in folders.items()}
    assert results[1]["images"] == 64 and 0 < results[1]["top1"] < 100
    for world in (2, 3):
        for name in ("confusion-eval.csv", "per_class-eval.csv"):
            assert (folders[world] / name).read_bytes() == (folders[1] / name).read_bytes()
        loss, expected = results[world].pop("loss"), results[1]["loss"]
        assert loss == pytest.approx(expected, abs=1e-6)
        assert results[world] == {k: v for k, v in results[1].items() if k != "loss"}
