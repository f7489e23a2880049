"""Apple's GPUs, as far as one can be pretended: auto takes it, and nothing asks it for float64."""

from pathlib import Path

import pytest
import torch
from pretend_mps import MPS, OnMps, PretendMps
from torch import nn

import engine_pretrain
import models_zoo
from engine_pretrain import PretrainLoss, build_masker, evaluate, reconstruct
from engine_train import train_steps
from util.data.conversions import Tally
from util.errors import BadInput
from util.float64 import float64_home, to_float64, widest
from util.measure.accuracy import AccuracyMeter
from util.measure.knn import Bank, nearest, unit
from util.progress import Progress
from util.train.bad_images import BadImages
from util.train.dist import Place, Processes, choose_device, processes
from util.train.logger import RunLogger, StepLog, StepReport
from util.train.optim import create_adamw
from util.train.step import OptimizerStep, StepResult

MEAN, STD = [0.5] * 3, [0.25] * 3


@pytest.fixture
def apple(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_auto_takes_cuda_then_mps_then_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, mps, expected in ((1, 1, "cuda"), (1, 0, "cuda"), (0, 1, "mps"), (0, 0, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=cuda: bool(there))
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=cuda: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=mps: bool(there))
        assert choose_device("auto", 0).type == expected
        assert choose_device("cpu", 0).type == "cpu"


def test_one_gpu_of_apples_has_one_process(apple: None) -> None:
    assert choose_device("auto", 0, alone=False).type == "cpu"
    with pytest.raises(BadInput, match="one GPU, and several processes were started"):
        choose_device("mps", 0, alone=False)


def test_several_processes_on_a_mac_start_on_the_cpu(
    apple: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("util.train.dist.read_environment", lambda *_: Place(0, 2, 0, 2, "env://"))
    seen = []

    def joined(place: Place, device: torch.device) -> None:
        seen.append(device.type)
        raise BadInput("enough")

    monkeypatch.setattr("util.train.dist.join", joined)
    with pytest.raises(BadInput, match="enough"), processes("auto", tmp_path):
        pass
    assert seen == ["cpu"]


def test_elsewhere_nothing_moves() -> None:
    x = torch.rand(3)
    for device in (torch.device("cpu"), torch.device("cuda", 1), torch.device("meta")):
        assert float64_home(device) is device and widest(device) == torch.float64
    assert torch.equal(to_float64(x), x.double()) and to_float64(x.double()).dtype == torch.float64
    assert float64_home(MPS).type == "cpu" and widest(MPS) == torch.float32


def test_the_pretence_is_as_strict_as_the_device() -> None:
    with PretendMps():
        x = torch.rand(3).to(MPS)
        assert x.device == MPS and isinstance(x * 2, OnMps)
        with pytest.raises(TypeError, match="float64"):
            x.double()
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(3, dtype=torch.float64, device=MPS)
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.rand(3)
        assert type(to_float64(x)) is torch.Tensor and to_float64(x).dtype == torch.float64


SETTINGS = {
    "mask": "mixed", "mask_ratio": 0.75, "avg_share": 0.5, "avg_order": "far",
    "avg_temperature": 1.0,
}  # fmt: skip


def placed(model: nn.Module, device: torch.device) -> nn.Module:
    """Parameters and buffers there."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            moved = parameter.detach().to(device).requires_grad_(parameter.requires_grad)
            module._parameters[name] = moved  # as nn.Module.to, which swaps no foreign class
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = buffer.to(device)
    return model


def batches(model: nn.Module, strategy, count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    size = (4, 3, *model.img_size)
    return [
        {
            "x": torch.randint(0, 256, size, dtype=torch.uint8, generator=generator),
            "noise": torch.stack([strategy.draw(model.grid, generator) for _ in range(4)]),
            "shift": torch.rand(4, 2, generator=generator) - 0.5,
            "index": torch.arange(4),
            "bad": torch.full((4, 1), -1),
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("pos_offset", ["none", "learned", "jitter"])
def test_pretraining_there_is_pretraining_here(
    pos_offset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, weights and held-out PSNR; no float64 on the device."""
    monkeypatch.setattr(engine_pretrain, "reconstruct", reconstruct.__wrapped__)

    def train(device: torch.device) -> tuple[list[float], list[torch.Tensor], dict]:
        torch.manual_seed(0)
        model = models_zoo.create_model(
            "mae_vit_micro_patch4", img_size=16, decoder_depth=1, lscale_init=0.1,
            pos_offset=pos_offset, norm_pix_loss=True,
        )  # fmt: skip
        placed(model, device)
        masker = build_masker(SETTINGS, model)
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer = create_adamw([{"params": learning}], 1e-3, betas=(0.9, 0.95))
        assert optimizer.defaults["fused"] == (device.type == "cpu")
        losses = []
        data = batches(model, masker.strategy, 3)
        loss = PretrainLoss(masker, MEAN, STD, device, tuple(model.draws))
        train_steps(
            model, data, OptimizerStep(model, optimizer, device=device), loss, lambda _: 1e-3,
            first_step=0, after_step=lambda report: losses.append(float(report.result.loss)),
        )  # fmt: skip
        with torch.no_grad():  # a pretended tensor cannot be one of inference mode
            table = evaluate.__wrapped__(
                model, data, masker, mean=MEAN, std=STD, device=device, sum_over_ranks=lambda x: x
            )
        return losses, [p.detach().cpu() for p in learning], table

    here = train(torch.device("cpu"))
    with PretendMps():
        there = train(MPS)
    assert here[0] == pytest.approx(there[0], rel=1e-6) and len(set(here[0])) == 3
    for a, b in zip(here[1], there[1], strict=True):
        # AdamW's first steps follow the sign of gradients that are zero but for rounding.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    for arm, row in here[2].items():
        assert row == pytest.approx(there[2][arm], rel=1e-4)


def test_masks_do_not_depend_on_the_device() -> None:
    model = models_zoo.create_model("mae_vit_micro_patch4", img_size=16)
    for name in ("mixed", "average", "random", "block", "grid"):
        masker = build_masker(SETTINGS | {"mask": name}, model)
        batch = batches(model, masker.strategy, 1)[0]
        here = masker(batch["x"], batch["noise"])
        with PretendMps():
            there = masker(batch["x"].to(MPS), batch["noise"].to(MPS))
            assert isinstance(there, OnMps) and torch.equal(there.cpu(), here)


def test_counts_and_neighbours_do_not_depend_on_the_device() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 7, generator=generator), torch.arange(50) % 7
    features = torch.randn(40, 8, generator=generator)
    bank = Bank(unit(features), torch.arange(40), torch.arange(40) % 7)

    def measure(device: torch.device) -> tuple:
        meter = AccuracyMeter(7, device)
        meter.update(logits.to(device), labels.to(device))
        total = meter.total(lambda x: x)
        found = nearest(unit(features[:5].to(device)).to(device), bank, 3)
        return total.summary(), total.confusion.tolist(), found.number.tolist()

    here = measure(torch.device("cpu"))
    with PretendMps():
        assert measure(MPS) == here


def test_a_step_that_is_not_finite_is_left_out_there(tmp_path: Path) -> None:
    """Without torch's protocol for fused optimisers, and an update otherwise."""
    with PretendMps():
        layer = placed(nn.Linear(2, 1), MPS)
        optimizer = create_adamw([{"params": list(layer.parameters())}], 0.1, betas=(0.9, 0.95))
        step = OptimizerStep(layer, optimizer, device=MPS)
        before = layer.weight.detach().cpu().clone()
        broken = step(lambda x: layer(x).sum() * float("nan"), [torch.ones(1, 2).to(MPS)], 0.1)
        assert bool(broken.skipped.cpu()) and torch.equal(layer.weight.detach().cpu(), before)
        fine = step(lambda x: layer(x).sum(), [torch.ones(1, 2).to(MPS)], 0.1)
        assert not bool(fine.skipped.cpu())
        assert not torch.equal(layer.weight.detach().cpu(), before)
        state = optimizer.state_dict()
    # A checkpoint of that GPU goes on elsewhere with the fused optimiser, and the other way round.
    other = nn.Linear(2, 1)
    there = create_adamw([{"params": list(other.parameters())}], 0.1, betas=(0.9, 0.95))
    state["state"] = {}
    there.load_state_dict(state)
    assert [group["fused"] for group in there.param_groups] == [True]


def test_the_log_sums_in_what_the_device_has(tmp_path: Path) -> None:
    procs = Processes(0, 1, 0, 1, MPS)
    with PretendMps():
        logged = StepLog(
            RunLogger(tmp_path / "m.jsonl", None), tmp_path, procs, every=1, global_batch=4,
            nan_policy="stop", last_good=lambda: None, bar=Progress(2, show=False),
            bad_images=BadImages(
                tmp_path / "bad.txt", str, 0, lambda x: [x], tally=Tally(), write=True
            ),
        )  # fmt: skip
        loss, zero = torch.tensor(2.0).to(MPS), torch.tensor(0.0).to(MPS)
        for number in (1, 2):
            logged(StepReport(number, StepResult(loss, loss, zero, zero), 1e-3, 0.0, [], []))
        state = logged.state()
        logged.load_state(state)
        assert logged.end_epoch() == 2.0
