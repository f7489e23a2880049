"""Going on with other settings: the place in the run stays right, or the start is refused."""

import json
import math
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launch import TINY, launch, wait
from runs import of_training
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_segment_data import write_pairs
from tiny import add_small_models

import main_finetune
import main_pretrain
import main_segment
from util.data.randomness import EpochSampler
from util.errors import EXIT_STOPPED, BadInput
from util.train.agreement import Wish
from util.train.checkpoint import BEST, LAST, best_or_newest, load_file, write_signed
from util.train.logger import StepReport
from util.train.resume import CHANGES, VERSION, bring_up_to_date, check_length, move
from util.train.run import Run
from util.train.schedule import CosineSchedule
from util.train.timeline import Timeline


@dataclass(frozen=True)
class Job:
    """A training main with flags that make it small."""

    module: Any
    flags: list[str]
    task: str

    def start(self, folder: Path, *flags: str) -> None:
        self.module.main([*self.flags, f"--output_dir={folder}", *flags])

    def records(self, folder: Path, kind: str) -> list[dict[str, Any]]:
        return of_training(folder, self.task, (kind,))

    def events(self, folder: Path) -> list[int]:
        where = folder if self.task == "pretrain" else folder / self.task
        return [e.step for e in EventAccumulator(str(where)).Reload().Scalars("train/loss")]


pytestmark = pytest.mark.usefixtures("small_models")


def small_models_there() -> None:
    """In another process."""
    add_small_models(pytest.MonkeyPatch())


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """240 images in batches of 24 are 10 steps an epoch, 16 pairs in batches of 4 are 4."""
    root = tmp_path_factory.mktemp("pairs")
    write_pairs(root, count=16)
    common = ["--log_every=1", "--num_workers=0", "--device=cpu", "--save_every=1"]
    return {
        "pretrain": Job(
            main_pretrain,
            [*TINY, "--model=mae_vit_pico_patch4", "--train_images=240", "--save_every=1"],
            "pretrain",
        ),
        "finetune": Job(
            main_finetune,
            ["--dataset=synthetic", "--model=vit_pico_patch4", "--input_size=16", "--epochs=3",
             "--train_images=240", "--val_images=8", "--batch_size=24", "--warmup_epochs=1",
             "--eval_every=3", "--drop_path=0.1", *common],
            "finetune",
        ),
        "segment": Job(
            main_segment,
            ["--dataset=folder", f"--data_path={root}", "--model=vit_deep_patch4",
             "--input_size=16", "--resize", "24", "16", "--window=16", "--stride=16",
             "--channels=8", "--aux_channels=8", "--batch_size=4", "--iterations=12", "--blr=1e-3",
             "--warmup_iterations=2", "--eval_every=0", *common],
            "segment",
        ),
    }  # fmt: skip


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """Step and images of all that is trained, as it comes."""
    found: list[tuple[int, list[int]]] = []
    original = Run.after_step

    def after_step(self: Run, report: StepReport) -> bool:
        found.append((report.step, torch.cat([i.flatten() for i in report.indices]).tolist()))
        return original(self, report)

    monkeypatch.setattr(Run, "after_step", after_step)
    return found


def stopped_at(job: Job, folder: Path, step: int, *flags: str) -> None:
    """Start, and be told to stop after a step."""
    original = Run.after_step

    def after_step(self: Run, report: StepReport) -> bool:
        if report.step == step:
            self.agreement.after_step = lambda: Wish(stop=signal.SIGTERM)
        return original(self, report)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "after_step", after_step)
        with pytest.raises(SystemExit, match=str(EXIT_STOPPED)):
            job.start(folder, *flags)
    assert load_file(folder / LAST)["step"] == step


def as_before(folder: Path) -> None:
    """Make the checkpoints of a folder those of a program without versions and timelines."""
    for path in folder.glob("checkpoint-*.pth"):
        state = load_file(path)
        new = {k: v for k, v in state.items() if k not in ("timeline", "resume_version")}
        if state["task"] == "segment":
            del new["arithmetic"]["stored"]
        write_signed(path, new)


# ---- Another number of steps per epoch ---------------------------------------------------------

# Images of a batch, steps of an epoch, and of epoch 1 when 4 of its 10 steps, 96 images, are done.
BATCHES = {12: (20, 8), 20: (12, 5), 40: (6, 3), 48: (5, 2), 100: (2, 1)}
# Batch, where the run was stopped, and whether a program without timelines wrote its files.
PLACES = [
    (48, 10, False), (100, 10, True), (12, 14, False), (20, 14, False), (40, 14, True),
    (48, 14, False),
]  # fmt: skip


@pytest.mark.parametrize(("batch", "stop", "old"), PLACES)
@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_another_batch_goes_on_at_its_place(
    task: str, batch: int, stop: int, old: bool, jobs: dict[str, Job], tmp_path: Path,
    taken: list, capfd: pytest.CaptureFixture,
) -> None:  # fmt: skip
    """After epoch 0, and after 4 of the 10 steps of epoch 1; from an older file as well."""
    job, (length, ahead) = jobs[task], BATCHES[batch]
    stopped_at(job, tmp_path, stop)
    if old:
        as_before(tmp_path)
    change = [f"--batch_size={batch}"]
    with pytest.raises(SystemExit, match="2"):
        job.start(tmp_path, *change)
    capfd.readouterr()
    taken.clear()
    job.start(tmp_path, *change, "--allow_changes")
    said = capfd.readouterr().out

    # Each step once, each epoch once, none of them empty.
    ahead = 0 if stop == 10 else ahead
    steps = list(range(stop + 1, stop + 2 * length - ahead + 1))
    assert [step for step, _ in taken] == steps
    train = job.records(tmp_path, "train")
    assert [r["step"] for r in train] == list(range(1, steps[-1] + 1)) == job.events(tmp_path)
    epochs = job.records(tmp_path, "epoch")
    assert [r["epoch"] for r in epochs] == [0, 1, 2]
    assert all(isinstance(r["loss"], float) and math.isfinite(r["loss"]) for r in epochs)
    last = load_file(tmp_path / LAST)
    assert (last["epoch"], last["step"], last["stage"]) == (2, steps[-1], "done")

    # The images of epoch 1 behind those that it has taken, then those of epoch 2.
    order = EpochSampler(240, 24).order
    seen = [index for _, indices in taken for index in indices]
    first = [*order(1)[ahead * batch : length * batch]]
    assert seen == [*first, *order(2)[: length * batch]]
    gap = ahead * batch - (stop - 10) * 24
    assert (f"{gap} images of epoch 2 are left out" in said) == (gap > 0)

    # The rates are those of a run of such epochs.
    lr = [r["lr"] for r in train[stop:]]
    peak = train[9]["lr"] / 0.9 * batch / 24  # that was the warm-up's last step
    rate = CosineSchedule(peak, last["arithmetic"]["min_lr"], length, 3 * length)
    expected = [rate(length + ahead + i) for i in range(len(lr))]
    assert lr == pytest.approx(expected, rel=1e-9)

    # Said, in the log file, and in the metrics; and no permission for ever.
    log = (tmp_path / "log-rank0.txt").read_text()
    [record] = job.records(tmp_path, "resume")
    for text in (
        f"global_batch: was 24, is {batch}",
        f"an epoch has {length} steps from here on, before 10",
        f"{2 - ahead / length:g} of 3 epochs are left, {2 * length - ahead} steps",
        f"goes from {train[stop - 1]['lr']:.4g} in the last step to {lr[0]:.4g} in the next",
    ):
        assert text in said and text in log and text in json.dumps(record), text
    assert record["step"] == stop and record["steps_left"] == len(steps)
    assert (record["steps_per_epoch_before"], record["steps_per_epoch"]) == (10, length)
    assert (record["lr_before"], record["lr"]) == pytest.approx((train[stop - 1]["lr"], lr[0]))
    kept = yaml.safe_load(next(tmp_path.glob("config*.yaml")).read_text())
    assert kept["batch_size"] == batch and "allow_changes" not in kept

    # From here on it is a run like any other.
    job.start(tmp_path, *change)
    assert "nothing is left to train" in capfd.readouterr().out
    assert job.records(tmp_path, "train") == train


@pytest.mark.parametrize("task", ["pretrain", "finetune", "segment"])
def test_stopped_again_it_ends_in_the_same_bits(
    task: str, jobs: dict[str, Job], tmp_path: Path
) -> None:
    """The checkpoint holds where epochs of the new length begin."""
    job, one, two = jobs[task], tmp_path / "one", tmp_path / "two"
    first, second, batch = (6, 8, 2) if task == "segment" else (14, 16, 48)
    change = [f"--batch_size={batch}"]
    for folder in (one, two):
        stopped_at(job, folder, first)
    job.start(one, *change, "--allow_changes")
    stopped_at(job, two, second, *change, "--allow_changes")
    job.start(two, *change)
    a, b = load_file(one / LAST), load_file(two / LAST)
    assert a["timeline"] == b["timeline"] != {"steps_per_epoch": 10, "first": 0, "start": 0}
    assert not [k for k in a["model"] if not torch.equal(a["model"][k], b["model"][k])]
    for kind in ("train", "epoch"):
        assert job.records(one, kind) == job.records(two, kind)


@pytest.mark.parametrize(("first", "second"), [(120, 240), (240, 120)])
@pytest.mark.parametrize("stage", ["done", "training"])
@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_more_or_fewer_images(
    task: str, stage: str, first: int, second: int, jobs: dict[str, Job], tmp_path: Path,
    taken: list, capfd: pytest.CaptureFixture,
) -> None:  # fmt: skip
    """Another order of images: behind the same share of an epoch, and it is said."""
    job, was, length = jobs[task], first // 24, second // 24
    stop = was + (2 if stage == "training" else 0)
    stopped_at(job, tmp_path, stop, f"--train_images={first}")
    taken.clear()
    job.start(tmp_path, f"--train_images={second}", "--allow_changes")
    ahead = math.ceil((stop - was) * length / was)
    assert len(taken) == 2 * length - ahead
    assert [r["epoch"] for r in job.records(tmp_path, "epoch")] == [0, 1, 2]
    again = "the order of the images is another in the middle of epoch 2"
    assert (again in capfd.readouterr().out) == (stage == "training")
    later = Counter(index for _, indices in taken[-length:] for index in indices)
    assert set(later.values()) == {1}


@pytest.mark.parametrize(("batch", "length"), [(2, 8), (6, 2), (16, 1)])
@pytest.mark.parametrize("stop", [4, 6])
def test_segmentation_takes_the_images_behind_those_taken(
    batch: int, length: int, stop: int, jobs: dict[str, Job], tmp_path: Path, taken: list
) -> None:
    """Iterations stay; what an epoch took is not taken again in it, and epochs do not go back."""
    job = jobs["segment"]
    stopped_at(job, tmp_path, stop)
    job.start(tmp_path, f"--batch_size={batch}", "--allow_changes")
    assert [step for step, _ in taken] == list(range(1, 13))
    epochs = [r["epoch"] for r in job.records(tmp_path, "epoch")]
    assert epochs == sorted(epochs)
    order, done = EpochSampler(16, 4).order, (stop - 4) * 4
    ahead = min(math.ceil(done / batch), length)
    coming = [*order(1)[ahead * batch : length * batch]]
    epoch = 2
    while len(coming) < 12 * batch:
        coming += [*order(epoch)[: length * batch]]
        epoch += 1
    seen = [index for _, indices in taken[stop:] for index in indices]
    assert seen == coming[: len(seen)]
    [record] = job.records(tmp_path, "resume")
    assert record["steps_left"] == 12 - stop


@pytest.mark.parametrize("task", ["pretrain", "segment"])
def test_a_longer_run_is_said_to_be_stretched(
    task: str, jobs: dict[str, Job], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    job = jobs[task]
    unit, was, now = ("iterations", 12, 20) if task == "segment" else ("epochs", 3, 5)
    job.start(tmp_path)
    capfd.readouterr()
    job.start(tmp_path, f"--{unit}={now}", "--allow_changes")
    [record] = job.records(tmp_path, "resume")
    train = job.records(tmp_path, "train")
    done = 12 if task == "segment" else 30
    text = f"the learning rate's schedule is stretched from {was} to {now} {unit}"
    assert text in capfd.readouterr().out and text in record["notes"]
    assert record["lr_before"] == pytest.approx(train[done - 1]["lr"])
    assert record["lr"] == pytest.approx(train[done]["lr"]) and record["lr"] > record["lr_before"]


@pytest.mark.parametrize("crops", [1, 2, 3])
@pytest.mark.parametrize("batch_before", [12, 24, 36])
@pytest.mark.parametrize("batch", [6, 18, 24, 30, 72])
def test_what_is_said_of_images_is_what_happens(crops: int, batch_before: int, batch: int) -> None:
    """At every step of six epochs; R crops of an image share R epochs' permutation."""
    before = EpochSampler(200, batch_before, crops_per_image=crops)
    after = EpochSampler(200, batch, crops_per_image=crops)
    common = {"images": 200, "crops_per_decode": crops}
    saved, current = (common | {"global_batch": size} for size in (batch_before, batch))
    timeline = Timeline(after.steps_per_epoch, epochs=9)

    def images(sampler: EpochSampler, epoch: int, first: int, last: int) -> Counter:
        keys = [key for keys in sampler.micro_batches(epoch, first, last) for key in keys]
        return Counter(key.index for key in keys if key.crop == 0)

    for step in range(1, 6 * before.steps_per_epoch + 1):
        epoch = (step - 1) // before.steps_per_epoch
        done = step - epoch * before.steps_per_epoch
        state = {"epoch": epoch, "step": step}
        moved, notes = move(timeline, state, saved, current)
        # The epoch that goes on, of those that share a permutation with it.
        goes_on = epoch + (done == before.steps_per_epoch)
        shared = range(goes_on - goes_on % crops, goes_on)
        seen = Counter()
        for number in shared:
            seen += images(before, number, 0, before.steps_per_epoch)
        if done < before.steps_per_epoch:
            seen += images(before, epoch, 0, done)
        assert set(seen.values()) <= {1}
        ahead = step - moved.begin(goes_on)
        assert 0 <= ahead <= after.steps_per_epoch
        rest = images(after, goes_on, ahead, after.steps_per_epoch)
        twice = sum((seen & rest).values())
        said = [note for note in notes if "second time" in note]
        if ahead < after.steps_per_epoch and twice:
            assert len(said) == 1 and f"{twice} images of epoch {goes_on + 1} " in said[0]
        elif not said:
            assert not twice
        if goes_on > epoch:  # what is still due after it, and saved, is that epoch's
            assert moved.find_epoch(step) == epoch
        if done < before.steps_per_epoch and crops == 1:
            assert not twice


@pytest.mark.dist
def test_on_more_processes_with_the_batch_of_each(jobs: dict[str, Job], tmp_path: Path) -> None:
    """The usual reason of another global batch; all processes agree on the place."""
    job = jobs["pretrain"]
    stopped_at(job, tmp_path, 14)
    flags = [*job.flags, f"--output_dir={tmp_path}", "--allow_changes"]
    out = tmp_path / "out"
    assert wait(launch(flags, out, 2, prepare=small_models_there)) == [0, 0], out.read_text()
    assert [r["step"] for r in job.records(tmp_path, "train")] == list(range(1, 23))
    assert [r["epoch"] for r in job.records(tmp_path, "epoch")] == [0, 1, 2]
    assert len(job.records(tmp_path, "resume")) == 1
    assert load_file(tmp_path / LAST)["timeline"] == {
        "steps_per_epoch": 5, "first": 1, "start": 12,
    }  # fmt: skip


# ---- More done than the run has ----------------------------------------------------------------


@pytest.mark.parametrize("stop", ["end", "middle"])
@pytest.mark.parametrize("task", ["pretrain", "finetune", "segment"])
def test_more_steps_done_than_the_run_has_is_refused(
    task: str, stop: str, jobs: dict[str, Job], tmp_path: Path, run_main
) -> None:
    job = jobs[task]
    if stop == "end":
        job.start(tmp_path)
    else:
        stopped_at(job, tmp_path, 6 if task == "segment" else 14)
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    flag, enough = "--epochs", "3 or more" if stop == "end" else "2 or more"
    if task == "segment":
        flag, enough = "--iterations", "12 or more" if stop == "end" else "6 or more"
    argv = [*job.flags, f"--output_dir={tmp_path}", f"{flag}={5 if task == 'segment' else 1}"]
    code, _, err = run_main(job.module.__name__, [*argv, "--allow_changes"])
    assert code == 2 and f"{flag} {enough}" in err and len(err.splitlines()) == 1, err
    elsewhere = [f"--output_dir={tmp_path / 'new'}", f"--resume={tmp_path / LAST}"]
    code, _, err = run_main(job.module.__name__, [*argv, *elsewhere, "--allow_changes"])
    assert code == 2 and f"{flag} {enough}" in err
    assert not (tmp_path / "new").exists()
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_the_length_that_is_refused_is_not_counted_back_from_a_later_epoch() -> None:
    # 200 epochs of 6 steps are done; with batches twice as large an epoch has 3.
    later = Timeline(steps_per_epoch=3, epochs=30, first=200, start=1200)
    with pytest.raises(BadInput, match=r"whole run of 30 epochs: .*--epochs 200 or more"):
        check_length(later, {"step": 1200}, Path("x.pth"))


def paths_named(text: str, root: Path) -> list[Path]:
    """Every path under a folder that a text names."""
    words = [word.strip("(),;:") for word in text.split()]
    return [Path(word) for word in words if word.startswith(str(root))]


@pytest.mark.parametrize("task", ["pretrain", "finetune", "segment"])
def test_a_complete_run_says_so_and_names_what_is_there(
    task: str, jobs: dict[str, Job], tmp_path: Path, run_main
) -> None:
    """The same command again, and a finished checkpoint taken to another folder."""
    job, one, two = jobs[task], tmp_path / "one", tmp_path / "two"
    flags = [*job.flags, "--eval_every=1"]
    if task == "pretrain":
        flags = [*flags, "--picture_every=1", "--eval_images=4"]
    name = job.module.__name__
    for more in (
        [f"--output_dir={one}"], [f"--output_dir={one}"],
        [f"--output_dir={two}", f"--resume={one / LAST}"],
    ):  # fmt: skip
        code, out, err = run_main(name, [*flags, *more])
        assert code == 0, err
        named = paths_named(out, tmp_path)
        assert len(named) >= 2 and not [path for path in named if not path.exists()], out
    assert "nothing is left to train" in out


@pytest.mark.parametrize("shared", [False, True])
def test_a_loss_that_is_not_finite_names_a_checkpoint_only_if_there_is_one(
    shared: bool, jobs: dict[str, Job], tmp_path: Path, run_main
) -> None:
    """Another task's, in a folder that they share, is none."""
    job = jobs["finetune"]
    if shared:
        stopped_at(jobs["pretrain"], tmp_path, 1)
    broken = [*job.flags, "--lr=1e6", "--warmup_epochs=0", f"--output_dir={tmp_path}"]
    code, _, err = run_main("main_finetune", broken)
    assert code == 1 and (tmp_path / LAST).exists() == shared
    assert "the last checkpoint" not in err and "no checkpoint yet" in err
    dumped = json.loads(next(tmp_path.glob("nonfinite-*.json")).read_text())
    assert dumped["last_good_checkpoint"] is None


def test_tasks_that_share_a_folder_keep_their_results(jobs: dict[str, Job], tmp_path: Path) -> None:
    jobs["finetune"].start(tmp_path)
    best = (tmp_path / BEST).read_bytes()
    tuned = json.loads((tmp_path / "result.json").read_text())
    jobs["segment"].start(tmp_path, "--eval_every=12")
    assert load_file(tmp_path / BEST)["task"] == "segment"
    assert "miou" in json.loads((tmp_path / "result.json").read_text())
    assert json.loads((tmp_path / "result-1.json").read_text()) == tuned
    aside = best_or_newest(tmp_path, "finetune")
    assert aside is not None and aside.read_bytes() == best
    assert best_or_newest(tmp_path, "segment") == tmp_path / BEST


# ---- What must agree ---------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["block", "mixed"])
def test_leaning_masks_of_before_are_not_gone_on_with(
    mask: str, jobs: dict[str, Job], tmp_path: Path, run_main
) -> None:
    job = jobs["pretrain"]
    flags = [f"--mask={mask}", "--avg_temperature=0"]
    argv = [*job.flags, *flags, f"--output_dir={tmp_path}"]
    stopped_at(job, tmp_path, 14, *flags)
    assert load_file(tmp_path / LAST)["resume_version"] == VERSION
    new = (tmp_path / LAST).read_bytes()
    as_before(tmp_path)
    code, _, err = run_main("main_pretrain", argv)
    assert code == 2 and "toward the bottom" in err and "another --output_dir" in err
    code, out, _ = run_main("main_pretrain", [*argv, "--allow_changes"])
    assert code == 0 and "toward the bottom" in out
    assert "toward the bottom" in json.dumps(job.records(tmp_path, "resume"))
    (tmp_path / LAST).write_bytes(new)
    for path in tmp_path.glob("checkpoint-[0-9]*.pth"):
        path.unlink()
    assert run_main("main_pretrain", argv)[0] == 0


@pytest.mark.parametrize("task", ["pretrain", "finetune", "segment"])
def test_older_checkpoints_go_on_to_the_same_bits(
    task: str, jobs: dict[str, Job], tmp_path: Path
) -> None:
    job, one, two = jobs[task], tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        stopped_at(job, folder, 6 if task == "segment" else 14)
    as_before(two)
    for folder in (one, two):
        job.start(folder)
    a, b = load_file(one / LAST), load_file(two / LAST)
    assert not [k for k in a["model"] if not torch.equal(a["model"][k], b["model"][k])]
    assert a["timeline"] == b["timeline"] and a["arithmetic"] == b["arithmetic"]


def test_settings_that_an_older_file_lacks_take_the_value_of_its_run() -> None:
    old = {"task": "segment", "arithmetic": {"seed": 3}}
    settings, faults = bring_up_to_date(old)
    assert not faults and (settings["seed"], settings["stored"]) == (3, "as published")
    known = {"task": "segment", "arithmetic": {"stored": "packed"}, "resume_version": VERSION}
    assert bring_up_to_date(known)[0]["stored"] == "packed"
    assert len(CHANGES) == VERSION
    # The first version's pretraining, which decoded by Pillow.
    old = {
        "task": "pretrain",
        "arithmetic": {"norm_pix_loss": True, "mask": "mixed", "model_args": {"depth": 4}},
    }
    settings, faults = bring_up_to_date(old)
    assert not faults and settings["target"] == "norm_pixels" and settings["decode"] == "pil"
    assert settings["model_args"] == {
        "depth": 4, "decoder": "full", "predict_ratio": 1.0, "encoder_mask_tokens": False,
        "pca_components": None, "branch_init": 1.0,
    }  # fmt: skip


# What the first version of each task let agree.
FIRST = {
    "pretrain": "avg_order avg_share avg_temperature blr clip_grad crop_scale dataset "
    "decoder_depth decoder_embed_dim decoder_num_heads epochs global_batch images in_chans "
    "input_size lr lscale_init mask mask_ratio mean method min_lr model model_args no_flip "
    "norm_pix_loss patch_size pos_offset precision seed std tf32 warmup_epochs weight_decay",
    "finetune": "aa betas blr clip_grad color_jitter crop_scale cutmix cutmix_minmax dataset "
    "drop_path ema_decay epochs finetune global_batch global_pool images in_chans input_size "
    "layer_decay lr lscale_init mean micro_steps min_lr mixup mixup_mode mixup_prob "
    "mixup_switch_prob model model_args nb_classes no_flip patch_size pos_resize precision "
    "processes recount remode reprob seed smoothing std tf32 train_images tune warmup_epochs "
    "weight_decay",
    "segment": "aux_channels aux_weight betas blr cat_max_ratio channels clip_grad dataset "
    "drop_path dropout finetune flip global_batch images inference input_size iterations "
    "layer_decay loss_mean lr lscale_init mean micro_steps min_lr model model_args multi_scale "
    "nb_classes no_distortion no_flip patch_size pos_resize precision processes ratio_range "
    "relative_bias resize scene_size seed std stride tf32 train_images val_images "
    "warmup_iterations weight_decay window",
}


@pytest.mark.parametrize("task", FIRST)
def test_what_every_task_lets_agree(task: str, jobs: dict[str, Job], tmp_path: Path) -> None:
    """And `CHANGES` knows what runs of the first version had of it: a flag of tomorrow's too."""
    stopped_at(jobs[task], tmp_path, 3)
    settings = load_file(tmp_path / LAST)["arithmetic"]
    names = {"model_args", "global_batch", "images", "stored", "seed", "precision", "dataset"}
    if task != "pretrain":  # whose random draws depend on neither
        names |= {"processes", "micro_steps"}
    assert names <= settings.keys()
    first = {"task": task, "arithmetic": dict.fromkeys(FIRST[task].split())}
    assert bring_up_to_date(first)[0].keys() == settings.keys()
