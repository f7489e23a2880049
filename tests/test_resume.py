"""Stopped anywhere, by anything, a run goes on to the same weights, bit for bit."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from launch import (
    EVERY_DRAW,
    launch,
    repetitions,
    steps_done,
    trial_seed,
    wait,
    wait_for_step,
)
from runs import different, of_training, records, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trained import Trained

import eval_pretrain
import main_pretrain
from util.errors import EXIT_INTERRUPTED, EXIT_STOPPED
from util.train.agreement import Agreement, Wish
from util.train.checkpoint import LAST, load_file

FLAGS = EVERY_DRAW
STEPS = 30


@pytest.fixture(scope="module")
def undisturbed(trained: Trained) -> dict[int, Path]:
    """Run folders of runs that were never stopped, by number of processes."""
    return {
        world: trained("main_pretrain", [*FLAGS, f"--batch_size={24 // world}"], world)
        for world in (1, 2, 3)
    }


def stop_and_go_on(
    rng: random.Random, folder: Path, world: int, kinds: tuple[signal.Signals, ...]
) -> list[str]:
    """Run to the end, being stopped once or twice on the way; says what was done."""
    story = []
    folder.mkdir()
    targets = sorted(rng.sample(range(2, STEPS - 2), rng.choice((1, 2))))
    for target in [*targets, None]:
        # Checkpoints whenever possible, so that SIGKILL too finds one in the middle of an epoch.
        flags = [
            f"--batch_size={24 // world}", f"--output_dir={folder}", "--save_minutes=1e-6",
            f"--num_workers={rng.choice((0, 0, 1, 2))}",
        ]  # fmt: skip
        before = steps_done(folder)
        children = launch([*FLAGS, *flags], folder / "out", world)
        if target is None:
            assert wait(children) == [0] * world, (folder / "out").read_text()
            return story
        # Past what an earlier start logged: only then is the signal in its hands.
        wait_for_step(folder, max(target, before + 1), children)
        kind, victim = rng.choice(kinds), rng.choice(children)
        if victim.is_alive():
            os.kill(victim.pid, kind)
        if kind == signal.SIGKILL:
            for child in children:  # as torchrun and Slurm end the others
                child.kill()
        codes = wait(children)
        story.append(f"{kind.name} at {target}: {codes}, {steps_done(folder)} steps logged")
        if kind != signal.SIGKILL and codes != [0] * world:
            expected = {EXIT_STOPPED}
            if steps_done(folder) == STEPS:  # one that is leaving no longer listens to signals
                expected |= {0, -kind}
            assert set(codes) <= expected, (story, (folder / "out").read_text())
    raise AssertionError("unreachable")


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2])
def test_stops_at_random_end_in_the_same_bits(
    world: int, undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    kinds = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGKILL)
    whole = weights(undisturbed[world])
    reference = [(r["step"], r["loss"], r["lr"]) for r in records(undisturbed[world], "train")]
    in_the_middle, wanted = 0, len(repetitions(3, 15))
    for trial in range(5 * wanted):
        folder = tmp_path / str(trial)
        story = stop_and_go_on(random.Random(trial_seed(trial)), folder, world, kinds)
        context = f"MMAE_TEST_SEED={trial_seed(0)}, trial {trial}: {story}"
        assert not different(whole, weights(folder)), context
        assert [(r["step"], r["loss"], r["lr"]) for r in records(folder, "train")] == reference
        in_the_middle += any("75" in line or "-9" in line for line in story)
        if in_the_middle == wanted:
            return
    # The others were done before the signal came, which a busy machine is slow to send.
    raise AssertionError(f"{in_the_middle} of {5 * wanted} trials were stopped before the end")


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [d for child in children for d in (*descendants(int(child)), int(child))]


@pytest.mark.dist
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_to_every_process_of_the_job(
    kind: signal.Signals, undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    """As schedulers do: the loading processes get it too, and first."""
    flags = [*FLAGS, f"--output_dir={tmp_path}", "--num_workers=2"]
    children = launch(flags, tmp_path / "out")
    wait_for_step(tmp_path, 3, children)
    os.kill(children[0].pid, signal.SIGSTOP)  # or a fast machine is done before its turn comes
    workers = descendants(children[0].pid)
    assert len(workers) >= 2
    for pid in (*workers, children[0].pid):
        os.kill(pid, kind)
        time.sleep(0.05)
    os.kill(children[0].pid, signal.SIGCONT)
    assert wait(children) == [EXIT_STOPPED], (tmp_path / "out").read_text()
    assert wait(launch(flags, tmp_path / "out")) == [0]
    assert not different(weights(undisturbed[1]), weights(tmp_path))


@pytest.mark.dist
def test_tasks_of_a_slurm_step(undisturbed: dict[int, Path], tmp_path: Path) -> None:
    """srun's variables, and a meeting in the run folder instead of an address."""
    flags = [*FLAGS, f"--output_dir={tmp_path / 'run'}", "--batch_size=12"]
    assert wait(launch(flags, tmp_path / "out", 2, launcher="srun")) == [0, 0]
    assert not different(weights(undisturbed[2]), weights(tmp_path / "run"))


@pytest.mark.dist
def test_three_processes_resume_too(undisturbed: dict[int, Path], tmp_path: Path) -> None:
    """DDP lays its buckets out anew after a start, and three addends have an order."""
    rng = random.Random(3)
    stop_and_go_on(rng, tmp_path / "run", 3, (signal.SIGTERM,))
    whole, resumed = weights(undisturbed[3]), weights(tmp_path / "run")
    worst = max((whole[k] - resumed[k]).abs().max().item() for k in whole)
    print("largest difference of a weight after resuming three processes:", worst)
    assert worst < 1e-4  # a step that is lost or done twice makes 6e-4


@pytest.mark.dist
def test_each_step_stands_once_after_a_stop_within_a_log_interval(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    flags = [*FLAGS, "--log_every=7", "--batch_size=12"]
    assert wait(launch([*flags, f"--output_dir={one}"], one / "out")) == [0]
    two.mkdir()
    for delay in (1, 5):
        children = launch([*flags, f"--output_dir={two}"], two / "out")
        wait_for_step(two, 7 * delay, children)
        time.sleep(0.05)
        os.kill(children[0].pid, signal.SIGTERM)
        wait(children)
    assert wait(launch([*flags, f"--output_dir={two}"], two / "out")) == [0]
    keys = ("step", "loss", "lr", "grad_norm")
    for kind in ("train", "epoch"):
        a, b = ([[r.get(k) for k in keys] for r in records(f, kind)] for f in (one, two))
        assert a == b
    events = [EventAccumulator(str(f)).Reload().Scalars("train/loss") for f in (one, two)]
    assert [(e.step, e.value) for e in events[0]] == [(e.step, e.value) for e in events[1]]


@pytest.mark.parametrize("stop_at", [9, 10, 11, 30])
def test_stopped_at_the_end_of_an_epoch(stop_at: int, tmp_path: Path, monkeypatch) -> None:
    """What is due after an epoch is done once, whichever side of it the stop falls on."""
    flags = [*FLAGS, "--log_every=7", "--save_every=1", "--eval_every=1", "--eval_images=4"]
    one, two = tmp_path / "one", tmp_path / "two"
    main_pretrain.main([*flags, f"--output_dir={one}"])
    original, steps = Agreement.after_step, [0]

    def after_step(self: Agreement) -> Wish:
        steps[0] += 1
        return Wish(stop=signal.SIGTERM) if steps[0] == stop_at else original(self)

    monkeypatch.setattr(Agreement, "after_step", after_step)
    with pytest.raises(SystemExit, match=str(EXIT_STOPPED)):
        main_pretrain.main([*flags, f"--output_dir={two}"])
    main_pretrain.main([*flags, f"--output_dir={two}"])
    assert not different(weights(one), weights(two))
    for kind in ("train", "epoch", "eval"):
        a, b = (of_training(folder, "pretrain", (kind,)) for folder in (one, two))
        assert a == b
    names = [{p.name for p in folder.glob("checkpoint-*")} for folder in (one, two)]
    assert names[0] == names[1]


@pytest.mark.parametrize("when", [1, 3])
def test_ended_while_measuring(when: int, tmp_path: Path, monkeypatch) -> None:
    """The training of the epoch is not done again, its measurement is: after the last epoch too."""
    flags = [*FLAGS, "--log_every=7", "--eval_every=1", "--eval_images=4"]
    one, two = tmp_path / "one", tmp_path / "two"
    main_pretrain.main([*flags, f"--output_dir={one}"])
    original, calls = eval_pretrain.evaluate, [0]

    def evaluate(*args, **kwargs) -> dict:
        calls[0] += 1  # twice an epoch: under the standard masks, and under the run's own
        if calls[0] == 2 * when:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(eval_pretrain, "evaluate", evaluate)
    with pytest.raises(SystemExit, match=str(EXIT_INTERRUPTED)):
        main_pretrain.main([*flags, f"--output_dir={two}"])
    assert load_file(two / LAST)["step"] == 10 * when
    main_pretrain.main([*flags, f"--output_dir={two}"])
    assert not different(weights(one), weights(two))
    for kind in ("train", "epoch", "eval"):
        a, b = (of_training(folder, "pretrain", (kind,)) for folder in (one, two))
        assert a == b


@pytest.mark.dist
def test_numbers_do_not_depend_on_processes_beyond_rounding(undisturbed: dict[int, Path]) -> None:
    losses = {w: [r["loss"] for r in records(f, "train")] for w, f in undisturbed.items()}
    for world in (2, 3):
        # float32, 30 steps, lr up to 1.2e-3
        assert losses[world] == pytest.approx(losses[1], rel=2e-5)


@pytest.mark.dist
def test_checkpoints_by_the_clock_and_how_many_are_kept(tmp_path: Path) -> None:
    flags = [*FLAGS, f"--output_dir={tmp_path}", "--save_every=1", "--keep=2", "--save_minutes=0"]
    assert wait(launch(flags, tmp_path / "out")) == [0]
    names = {p.name for p in tmp_path.glob("checkpoint-*")}
    assert names == {"checkpoint-1.pth", "checkpoint-2.pth", LAST}
    assert not list(tmp_path.glob(".*tmp"))
