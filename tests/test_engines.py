"""What mains hand to their engines, and how engines treat a model: modes, loss, inference."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_every_draw import FLAGS, STILL, AlikePairs, Knobs, command, pretended
from torch import Tensor, nn

import engine_finetune
import eval_pretrain
import eval_segment
import main_segment
from engine_segment import Inference, PixelLoss, SegmentLoss
from engine_train import train_steps
from util.measure.confusion import Segmentation
from util.train import checkpoint
from util.train.checkpoint import LAST, load_file
from util.train.logger import StepReport
from util.train.optim import create_adamw, parameter_groups
from util.train.step import OptimizerStep

BEST = "checkpoint-best.pth"

# ---- Modes -------------------------------------------------------------------------------------

MEASURING = {
    "main_pretrain": ["--eval_every=1", "--eval_images=2", "--mask=random"],
    "main_finetune": ["--eval_every=1", "--drop_path=0.5"],
    "main_segment": ["--eval_every=1", "--iterations=2", STILL, "--drop_path=0.5"],
}


@pytest.mark.parametrize("name", FLAGS)
def test_a_model_trains_in_training_mode_and_is_measured_in_the_other(
    name: str, tmp_path: Path
) -> None:
    """Also in the epochs after a measurement: drop path would be off for good and nobody see it."""
    main, seen = importlib.import_module(name), []
    phase = ["none"]

    def during(what: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            phase[0] = what
            if what == "train" and more["first_step"] == 0:
                layers = [args[0], *(m for m in args[0].modules() if isinstance(m, nn.LayerNorm))]
                for layer in layers:
                    layer.register_forward_pre_hook(
                        lambda layer, _: seen.append((phase[0], layer.training))
                    )
            try:
                return original(*args, **more)
            finally:
                phase[0] = "none"

        return call

    with pretended(main, "ramp", 1, 0) as patch:
        patch.setattr(main, "train_steps", during("train", main.train_steps))
        measuring = {
            "main_pretrain": eval_pretrain,
            "main_finetune": engine_finetune,
            "main_segment": eval_segment,
        }
        engine = measuring[name]
        patch.setattr(engine, "evaluate", during("measure", engine.evaluate))
        patch.setattr(checkpoint, "keep_best", lambda *rest: None)  # nothing is saved
        main.main([*command(name, Knobs(batch=6), tmp_path, ()), *MEASURING[name]])
    assert set(seen) == {("train", True), ("measure", False)}
    phases = [what for i, (what, _) in enumerate(seen) if i == 0 or seen[i - 1][0] != what]
    assert phases[:4] == ["train", "measure", "train", "measure"]


# ---- Segmentation: loss and inference as the flags say -----------------------------------------

LOSSES = {
    (): PixelLoss(0.4, "all"),
    ("--aux_weight=0.7",): PixelLoss(0.7, "all"),
    ("--loss_mean=valid", "--aux_weight=0"): PixelLoss(0.0, "valid"),
}


@pytest.mark.parametrize("flags", LOSSES, ids=str)
def test_segmentation_trains_with_the_loss_of_its_flags(
    flags: tuple[str, ...], tmp_path: Path
) -> None:
    found = []

    def train(*args: Any, **more: Any) -> None:
        found.extend(arg.loss for arg in args if isinstance(arg, SegmentLoss))
        raise KeyboardInterrupt

    with pretended(main_segment, "flat", 1, 0) as patch, pytest.raises(SystemExit):
        patch.setattr(main_segment, "train_steps", train)
        main_segment.main([*command("main_segment", Knobs(), tmp_path, ()), *flags])
    assert found == [LOSSES[flags]]


SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
LOOKS: dict[tuple[str, ...], Inference] = {
    (): Inference(True, (32, 32), (32, 32)),
    ("--inference=whole",): Inference(False, (32, 32), (32, 32)),
    ("--window=24x16", "--stride=8x16"): Inference(True, (24, 16), (8, 16)),
    ("--flip",): Inference(True, (32, 32), (32, 32), flip=True),
    ("--multi_scale", "--flip"): Inference(
        True, (32, 32), (32, 32), SCALES, flip=True, short_side=40
    ),
}


@pytest.mark.parametrize("flags", LOOKS, ids=str)
def test_segmentation_is_measured_as_its_flags_say(flags: tuple[str, ...], tmp_path: Path) -> None:
    found: list[Any] = []

    def evaluate(model: Any, loader: Any, classes: int, inference: Inference, **more: Any) -> None:
        shapes = {tuple(batch["x"].shape) for batch in loader}
        found.append((inference, classes, shapes, more["mean"], more["std"]))
        raise KeyboardInterrupt

    with pretended(main_segment, "flat", 1, 0) as patch, pytest.raises(SystemExit):
        patch.setattr(eval_segment, "evaluate", evaluate)
        patch.setattr(main_segment, "train_steps", lambda *rest, **more: 1)
        more = ["--eval_every=1", "--iterations=1", "--resize", "80", "40", *flags]
        main_segment.main([*command("main_segment", Knobs(), tmp_path, ()), *more])
    ((inference, classes, shapes, mean, std),) = found
    assert inference == LOOKS[flags]
    assert (classes, shapes) == (64, {(1, 3, 40, 40)})  # square images: the short side decides
    assert (mean, std) == ((0.5,) * 3, (0.25,) * 3)


def miou(value: float) -> Segmentation:
    return Segmentation(value, value, value, 9, 0, [{"iou": value, "accuracy": value, "pixels": 9,
                                                     "predicted": 9}] * 64)  # fmt: skip


def test_the_first_best_measurement_is_kept_over_a_stop(tmp_path: Path) -> None:
    """Higher ones replace it, equal and lower ones do not, and neither does going on."""
    values = iter([3.0, 7.0, 7.0, 5.0, 6.0, 2.0])

    def train(model: Any, loader: Any, *rest: Any, **more: Any) -> int:
        return loader.batch_sampler.last_step

    def evaluate(*rest: Any, **more: Any) -> Segmentation:
        return miou(next(values))

    for iterations in (4, 6):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(main_segment, "open_set", lambda a, split, *_: AlikePairs("flat", split))
            patch.setattr(main_segment, "train_steps", train)
            patch.setattr(eval_segment, "evaluate", evaluate)
            own = [f"--iterations={iterations}", "--eval_every=1", "--allow_changes"]
            main_segment.main([*command("main_segment", Knobs(), tmp_path, ()), *own])
        assert load_file(tmp_path / BEST)["step"] == 2
        assert load_file(tmp_path / LAST)["best"] == {"miou": 7.0, "step": 2}
        result = json.loads((tmp_path / "result.json").read_text())
        assert result["best"] == {"miou": 7.0, "step": 2} and result["step"] == iterations
    assert result["miou"] == 2.0


# ---- The step loop of segmentation ---------------------------------------------------------------


class Tiny(nn.Module):
    """Two classes from a picture, with an auxiliary output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.main, self.second = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = {"logits": self.main(x)}
        return found | {"aux": self.second(x)} if self.training else found


def batches(count: int, ignored: float) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        label = torch.randint(0, 2, (2, 8, 8), generator=generator, dtype=torch.uint8)
        label[:, : round(8 * ignored)] = 255
        image = torch.randint(0, 256, (2, 3, 8, 8), generator=generator, dtype=torch.uint8)
        bad = torch.tensor([[number, -1, -1, -1], [-1] * 4])
        index = torch.tensor([2 * number, 2 * number + 1])
        found.append({"x": image, "y": label, "index": index, "bad": bad})
    return found


def trained(
    loss: PixelLoss, data: list[dict[str, Tensor]], leave_at: int = 99
) -> tuple[Tiny, list[StepReport], dict[str, Tensor]]:
    """The model, what was reported, and the gradients of the first step."""
    model, reports = Tiny(), []
    gradients: dict[str, Tensor] = {}
    optimizer = create_adamw(parameter_groups(model, 0.0), 1e-3, (0.9, 0.95))
    step = OptimizerStep(model, optimizer, device=torch.device("cpu"), accum_iter=2)
    update = step._update

    def noted(value: Tensor) -> Any:
        for name, p in model.named_parameters():
            gradients.setdefault(name, p.grad.clone())
        return update(value)

    step._update = noted  # type: ignore[method-assign]

    def after(report: StepReport) -> bool:
        reports.append(report)
        return report.step == leave_at

    whole = SegmentLoss(loss, (0.5,) * 3, (0.25,) * 3, step.device, 0, 0, 1, torch.clone)
    train_steps(
        model, data, step, whole, lambda step: 1e-3 * (step + 1), first_step=0, after_step=after,
        before_step=whole.before_step,
    )  # fmt: skip
    return model, reports, gradients


def test_a_step_reports_what_it_took() -> None:
    _, reports, _ = trained(PixelLoss(), batches(6, 0.25), leave_at=2)
    assert [r.step for r in reports] == [1, 2]  # left where it was told to
    assert [r.lr for r in reports] == [1e-3, 2e-3]
    assert [[i.tolist() for i in r.indices] for r in reports] == [
        [[0, 1], [2, 3]], [[4, 5], [6, 7]],
    ]  # fmt: skip
    assert [r.bad for r in reports] == [[0, 1], [2, 3]]


def test_a_step_without_a_pixel_that_counts_is_finite() -> None:
    for mean in ("all", "valid"):
        _, reports, gradients = trained(PixelLoss(mean=mean), batches(2, 1.0))
        assert float(reports[0].result.loss) == 0 and not float(reports[0].result.skipped)
        assert all(not g.any() for g in gradients.values())


def test_the_auxiliary_loss_weighs_as_it_is_told() -> None:
    """And trains its own head alone; ignored pixels train neither."""
    data = batches(2, 0.5)
    by_weight = {w: trained(PixelLoss(w), data)[2] for w in (0.0, 0.4, 0.8)}
    for name in ("main.weight", "main.bias"):
        for weight in (0.4, 0.8):
            torch.testing.assert_close(by_weight[weight][name], by_weight[0.0][name])
    for name in ("second.weight", "second.bias"):
        assert not by_weight[0.0][name].any() and by_weight[0.4][name].any()
        torch.testing.assert_close(by_weight[0.8][name], 2 * by_weight[0.4][name])
    # Half of the pixels are ignored, so the mean over those that count is twice the other.
    valid = trained(PixelLoss(0.4, "valid"), data)[2]
    for name, gradient in by_weight[0.4].items():
        torch.testing.assert_close(valid[name], 2 * gradient)
    shaken = [dict(b) for b in data]
    for b in shaken:
        b["x"] = torch.where((b["y"] == 255)[:, None], 255 - b["x"], b["x"])
    for name, gradient in trained(PixelLoss(), shaken)[2].items():
        torch.testing.assert_close(gradient, by_weight[0.4][name])
