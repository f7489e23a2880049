"""The run-up of every training: its order, where a run starts, and what goes on."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine_train import train_steps
from util.data.randomness import Key
from util.errors import BadInput
from util.train import session as sessions
from util.train.advice import Published
from util.train.checkpoint import LAST, load_file, save_checkpoint
from util.train.dist import Processes
from util.train.session import Session, Settings, Start

ALONE = Processes(0, 1, 0, 1, torch.device("cpu"))
IMAGES, BATCH = 12, 2


class Model(nn.Module):
    """A weight, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.register_buffer("seen", torch.zeros(()))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Has no effect, and is asked for."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Source:
    """Images by number."""

    stored = "as published"

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> Any:
        return None, 0

    def file_name(self, index: int) -> str:
        return f"{index}.png"


class Samples(torch.utils.data.Dataset):
    """A picture of two pixels for each key."""

    def __getitem__(self, key: Key) -> dict[str, Any]:
        image = torch.tensor([float(key.index), 1.0]).reshape(1, 1, 2)
        return {"x": image, "index": key.index, "bad": torch.full((4,), -1)}


def settings_for(folder: Path, **changes: Any) -> Settings:
    run = {"log_dir": None, "log_every": 1, "nan_policy": "stop", "max_bad_images": 0,
           "save_minutes": 0.0, "keep": 0}  # fmt: skip
    plain = Settings(
        folder=folder, resume="auto", allow_changes=False, seed=3, tf32=False, epochs=2,
        iterations=None, warmup=1.0, min_lr=0.0, batch_size=BATCH, accum_iter=1,
        crops_per_image=1, num_workers=0, prefetch_factor=2, pin_memory=False, precision="fp32",
        clip_grad=None, grad_checkpointing=False, shard=False, compiled=False,
        flags={"seed": 3, "epochs": 2}, arithmetic={"seed": 3}, run=run,
    )  # fmt: skip
    return replace(plain, **changes)


def open_session(
    folder: Path, calls: list[str] | None = None, averages: bool = False, **changes: Any
) -> Session:
    """A session on the tiny model, as a main opens it."""
    calls = [] if calls is None else calls
    start = Start("tiny", settings_for(folder, **changes), ALONE, None)
    model = Model()

    def optimizer() -> torch.optim.Optimizer:
        calls.append("optimizer")
        return torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    return Session(
        start,
        source=Source(),
        samples=Samples(),
        model=model,
        model_name="tiny",
        model_args={"width": 2},
        optimizer=optimizer,
        lr=0.1,
        published=Published(1e-3, 256),
        warnings=["something else"],
        snapshot=lambda: {"best": 5},
        averages=Model() if averages else None,
        fit=lambda: calls.append("fit"),
    )


def train_epoch(session: Session, epoch: int = 0) -> int:
    """An epoch, and its checkpoint."""
    with session.running() as run:
        session.start_epoch(epoch, run.step)
        step = train_steps(
            session.trained,
            session.loader,
            session.optimizer_step,
            lambda model, batch, step, number: model(batch["x"]).square().mean(),
            session.rate,
            first_step=run.step,
            after_step=run.after_step,
        )
        run.end_epoch(epoch, step)
        run.save(step, "done")
    return step


def write(folder: Path, task: str, step: int) -> Path:
    """A checkpoint in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {"task": task, "epoch": 0, "step": step, "stage": "done", "model": {}}
    save_checkpoint(folder, state)
    return folder / LAST


def test_own_checkpoint_then_that_of_resume_then_none(tmp_path: Path) -> None:
    own, other = tmp_path / "own", write(tmp_path / "other", "tiny", 4)

    def step_of(resume: str) -> int | None:
        start = Start("tiny", settings_for(own, resume=resume), ALONE, None)
        assert (start.saved is None) == (start.path is None)
        return start.saved["step"] if start.saved else None

    assert [step_of(r) for r in ("auto", "none", str(other))] == [None, None, 4]
    write(own, "another", 9)  # tasks share folders
    assert [step_of(r) for r in ("auto", str(other))] == [None, 4]
    write(own, "tiny", 2)
    assert [step_of(r) for r in ("auto", str(other))] == [2, 2]
    with pytest.raises(BadInput, match="--resume"):
        step_of("none")


def test_a_start_seeds_and_counts(tmp_path: Path) -> None:
    draws = []
    for _ in range(2):
        torch.rand(1)
        start = Start("tiny", settings_for(tmp_path, accum_iter=3, num_workers=4), ALONE, None)
        draws.append(torch.rand(1).item())
    assert draws[0] == draws[1] and (start.global_batch, start.workers) == (BATCH * 3, 4)
    assert Start("tiny", settings_for(tmp_path, num_workers=None), ALONE, None).workers >= 1


def test_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loader, placement (the copy first), optimiser of what was placed, state, run."""
    calls: list[str] = []
    for name in ("build_loader", "Placed", "distribute", "OptimizerStep", "go_on", "Run"):
        whole = getattr(sessions, name)

        def called(*rest: Any, name: str = name, whole: Any = whole, **more: Any) -> Any:
            calls.append(name)
            return whole(*rest, **more)

        monkeypatch.setattr(sessions, name, called)
    placed = ["build_loader", "Placed", "Placed", "distribute", "optimizer", "OptimizerStep"]
    train_epoch(open_session(tmp_path, calls, averages=True))
    assert calls == [*placed, "fit", "Run"]
    calls.clear()
    open_session(tmp_path, calls, averages=True)
    assert calls == [*placed, "go_on", "Run"]  # what was fitted is in the checkpoint


def test_a_run_goes_on_with_all_it_had(tmp_path: Path) -> None:
    session = open_session(tmp_path, averages=True)
    with torch.no_grad():
        session.model.seen.fill_(7)
        session.averaged.model.linear.weight.fill_(0.25)
    assert train_epoch(session) == IMAGES // BATCH
    again = open_session(tmp_path, averages=True)
    assert (again.run.step, again.run.first_epoch) == (6, 1)
    assert again.model.seen == 7 and (again.averaged.model.linear.weight == 0.25).all()
    assert torch.equal(again.model.linear.weight, session.model.linear.weight)
    moments = [s.optimizer.state_dict()["state"][0]["exp_avg"] for s in (session, again)]
    assert moments[0].any() and torch.equal(*moments)
    # One without averages takes up the weights as they are.
    state = load_file(tmp_path / LAST)
    assert state["best"] == 5 and state["model_name"] == "tiny"
    del state["ema"]
    (tmp_path / "b").mkdir()
    save_checkpoint(tmp_path / "b", state)
    late = open_session(tmp_path / "b", averages=True)
    assert torch.equal(late.averaged.model.linear.weight, session.model.linear.weight)


def test_other_numbers_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    train_epoch(open_session(tmp_path))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(BadInput, match="seed: was 3, is 4"):
        open_session(tmp_path, arithmetic={"seed": 4})
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_epochs_have_a_cosine_and_iterations_a_line(tmp_path: Path) -> None:
    epochs = open_session(tmp_path / "a", warmup=0.5)  # 3 of 12 steps
    assert [epochs.rate(s) for s in (0, 3, 12)] == pytest.approx([0, 0.1, 0])
    half = 0.05 * (1 + math.cos(math.pi / 3))
    assert epochs.rate(6) == pytest.approx(half)
    by_steps = open_session(tmp_path / "b", epochs=None, iterations=10, warmup=2)
    assert [by_steps.rate(s) for s in (2, 6)] == pytest.approx([0.1, 0.05])
    by_steps.start_steps(4, 9)  # over the end of the first epoch, of 6 steps
    assert [key.epoch for keys in by_steps.sampler for key in keys[:1]] == [0, 0, 1, 1, 1]


def test_an_epoch_is_entered_behind_what_it_took(tmp_path: Path) -> None:
    session = open_session(tmp_path)
    session.start_epoch(1, 6)
    whole = list(session.sampler)
    session.start_epoch(1, 8)
    assert len(whole) == 6 and list(session.sampler) == whole[2:]


def test_warnings_come_in_order(tmp_path: Path) -> None:
    found = open_session(tmp_path, shard=True, min_lr=0.5).warnings
    assert ["--min_lr" in found[0], found[1], "--shard" in found[2]] == [
        True, "something else", True,
    ]  # fmt: skip
