"""Every key of a checkpoint: a run that goes on without it is another run, or is refused.

`KEYS` holds what becomes of a run without each; a key of a checkpoint without an entry fails. The
runs and the story that they tell are those of `stopped_runs`.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from stopped_runs import FOUND, JOBS, Story, copy, differing, flat, only_last, put, same, stopping

from util.errors import EXIT_STOPPED, BadInput, Stopped
from util.train.checkpoint import LAST, load_file, write_signed
from util.train.resume import VERSION, bring_up_to_date, differences, go_on
from util.train.run import Run
from util.train.timeline import Timeline

ALL = tuple(JOBS)
SCALED = ("pretrain", "finetune", "segment")  # in fp16
TUNED = ("finetune", "probe")
# The whole course of a training is then another.
COURSE = ("model.*", "optimizer.state.*", "records.train")


@dataclass(frozen=True)
class Key:
    """What becomes of a run that goes on without a key.

    Attributes:
        pattern: of its path in the checkpoint; `*` takes any part.
        why: how the run would differ, or who reads the key.
        differs: patterns of what is then another than in the run that had it. Each must be met.
        more: of what else may be.
        place: where the run goes on, see `Story`.
        flags: of the start that goes on.
        lose: (its value, that of a run's begin) -> what a resume that ignores it would see.
        refused: in the message of a start that sees another value.
        own: each start knows the value itself, and writes its own.
        jobs: whose checkpoints have it.
        unseen: jobs in whose story it has the value of a run's begin.
        weights: each weight that learns must come out another.
    """

    pattern: str
    why: str
    differs: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    place: str = "stopped"
    flags: tuple[str, ...] = ()
    lose: Callable[[Any, Any], Any] = lambda value, begin: begin
    refused: str = ""
    own: bool = False
    jobs: tuple[str, ...] = ALL
    unseen: tuple[str, ...] = ()
    weights: bool = False


ANOTHER_BATCH = ("--batch_size=2", "--allow_changes")
CRASHES = "does not go on"  # in place of a refusal: an exception of ours, for no user can cause it


def zeros(value: torch.Tensor, begin: Any) -> torch.Tensor:
    """An optimiser's state of no steps."""
    return torch.zeros_like(value)


KEYS = (
    # ---- Whose it is, and where in the run
    Key(
        "task", "it is no checkpoint of this program", own=True,
        lose=lambda value, begin: "another", refused="no checkpoint to go on from",
    ),
    Key(
        "epoch", "finished epochs come again", ("records.epoch",), ("records.*",),
        jobs=("pretrain", "finetune", "probe"), own=True,
    ),
    Key(
        "epoch", "with another batch, the images behind the wrong step come",
        ("records.epoch",), ("*",), flags=ANOTHER_BATCH, jobs=("segment",), own=True,
    ),
    Key(
        "stage", "a trained epoch is recorded once more", ("records.epoch",),
        place="measuring",
    ),
    Key("step", "the run has no place in its epoch", refused=CRASHES, jobs=ALL[:3]),
    Key("step", "all iterations come again", COURSE, ("*",), jobs=("segment",)),
    Key("log_bytes", "records of before are cut off", ("records.train",),
        ("records.*",)),
    Key(
        "timeline.steps_per_epoch", "what is left of an epoch is counted by another length",
        ("records.resume",), ("*",), flags=ANOTHER_BATCH, own=True,
        lose=lambda value, begin: value - 1,
    ),
    Key("timeline.first", "the run has no place in its epoch", refused=CRASHES, jobs=ALL[:3]),
    Key("timeline.first", "other images come", COURSE, ("*",), jobs=("segment",)),
    Key("timeline.start", "other images come, at other rates", COURSE, ("*",)),
    # ---- Sums of the interval and of the epoch that are not over
    Key("sums.epoch.0", "the epoch's loss is that of its last steps", ("records.epoch",)),
    Key("sums.epoch.1", "the epoch's loss is divided by too few", ("records.epoch",)),
    Key("sums.epoch.2", "nobody reads the epoch's norm: kept, as its loss is"),
    Key("sums.epoch.3", "the same of its count"),
    Key("sums.epoch.4", "and of updates left out", unseen=("probe", "segment")),
    Key("sums.epoch.5", "and of faults, which end a run or are said", unseen=ALL),
    Key("sums.recent.0", "the loss of a log line lacks steps", ("records.train",)),
    Key("sums.recent.1", "it is divided by too few", ("records.train",)),
    Key("sums.recent.2", "the gradient's norm lacks steps", ("records.train",)),
    Key("sums.recent.3", "it is divided by too few", ("records.train",)),
    Key(
        "sums.recent.4", "an update that was left out is not said", ("records.train",),
        unseen=("probe", "segment"),
    ),
    Key(
        "sums.recent.5", "a fault is reported before a checkpoint is written: always none", own=True
    ),
    Key(
        "sums.latest", "steps before the end of an epoch have no log line", ("records.train",),
        place="at_edge",
    ),
    Key(
        "bad_images", "images that do not come again are not counted, and the list loses them",
        ("records.train", "bad_images", "bad_images*.txt"),
    ),
    # ---- What was learnt
    Key("model.*", "the training is another", COURSE, ("*",)),
    Key("ema.*", "averages begin anew", ("ema.*", "records.eval"), ("result.json",),
        jobs=("finetune",)),
    Key("optimizer.state.*.exp_avg", "each weight moves otherwise", COURSE, ("*",), lose=zeros,
        jobs=SCALED, weights=True),
    Key("optimizer.state.*.exp_avg_sq", "each weight moves otherwise", COURSE, ("*",), lose=zeros,
        jobs=SCALED, weights=True),
    Key("optimizer.state.*.step", "moments are corrected as if new", COURSE, ("*",), lose=zeros,
        jobs=SCALED, weights=True),
    Key("optimizer.state.*.momentum_buffer", "each weight moves otherwise", COURSE, ("*",),
        lose=zeros, jobs=("probe",), weights=True),
    Key(
        "optimizer.param_groups.*.lr", "a resume with other settings says a wrong rate",
        ("records.resume",), flags=ANOTHER_BATCH, lose=lambda value, begin: 2 * value,
    ),
    Key("optimizer.param_groups.*", "its settings are those of the flags", own=True),
    Key(
        "scaler.scale", "the scale that has just overflowed comes again", ("scaler.scale",), ("*",),
        jobs=SCALED,
    ),
    Key(
        "scaler._growth_tracker", "the scale grows at another step", ("scaler._growth_tracker",),
        jobs=SCALED,
    ),
    Key("scaler.growth_factor", "a constant, kept as in the file", unseen=SCALED, jobs=SCALED),
    Key("scaler.backoff_factor", "the same", unseen=SCALED, jobs=SCALED),
    Key("scaler.growth_interval", "the same", unseen=SCALED, jobs=SCALED),
    Key("scaler", "without fp16 there is none", own=True, jobs=("probe",)),
    # ---- The best measurement
    Key(
        "best.top1", "a worse model takes the best one's place",
        ("best.top1", "best.epoch", "checkpoint-best", "result.json"), jobs=TUNED,
    ),
    Key("best.epoch", "it says another epoch", ("best.epoch", "result.json"), jobs=TUNED),
    Key(
        "best.miou", "a worse model takes the best one's place",
        ("best.miou", "best.step", "checkpoint-best", "result.json"), jobs=("segment",),
    ),
    Key("best.step", "it says another step", ("best.step", "result.json"), jobs=("segment",)),
    # ---- What must agree: each key of `arithmetic` has a test of its own below
    Key("arithmetic.*", "a run would go on with other numbers", own=True),
    Key(
        "resume_version", "masks change in the middle of the run", own=True, jobs=("pretrain",),
        lose=lambda value, begin: 0, refused="leaned toward the bottom",
    ),
    Key("resume_version", "no change since has a fault in its runs", own=True, jobs=ALL[1:]),
    Key(
        "classes", "the head's outputs would stand for others", own=True, jobs=ALL[1:],
        lose=lambda value, begin: value[::-1], refused="they differ",
    ),
    Key(
        "model_args.drop_path", "another model would go on", own=True, jobs=ALL[1:],
        lose=lambda value, begin: value + 0.1, refused="model_args: was",
    ),
    Key("model_args.*", "who takes the weights reads it", own=True),
    # ---- For who reads the file later: evaluation, export, kNN, pictures, people
    Key("model_name", "main_knn, main_export and the zoo read it", own=True),
    Key("data.*", "main_*, --eval and export normalise and resize by it", own=True),
    Key("tune", "for people", own=True, jobs=TUNED),
)  # fmt: skip


def key_of(path: str, job: str) -> Key:
    """The one entry of a path: the most particular that fits."""
    found = [key for key in KEYS if job in key.jobs and fnmatchcase(path, key.pattern)]
    assert found, (
        f"{path} of {job}'s checkpoints has no entry in KEYS: what if a resume ignored it?"
    )
    found.sort(key=lambda key: key.pattern.count("*") * 1000 - len(key.pattern))
    return found[0]


def leaves(state: dict[str, Any], key: Key, job: str) -> dict[str, Any]:
    return {path: value for path, value in flat(state) if key_of(path, job) is key}


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Story]:
    told: dict[str, Story] = {}

    def tell(name: str) -> Story:
        if name not in told:
            told[name] = Story(JOBS[name], tmp_path_factory.mktemp(name))
        return told[name]

    return tell


def with_state(story: Story, place: str, target: Path, state: dict[str, Any]) -> Path:
    """A folder as `place`, whose only checkpoint is another."""
    folder = copy(getattr(story, place), target)
    only_last(folder)
    write_signed(folder / LAST, state)
    return folder


# ---- Going on is as if nothing had been ----------------------------------------------------------


@pytest.mark.parametrize("place", ["stopped", "at_edge", "measuring"])
@pytest.mark.parametrize("job", JOBS)
def test_a_run_that_goes_on_ends_as_the_whole_one(job: str, place: str, story: Callable) -> None:
    """Weights, records, lists, results, and every key of the last checkpoint."""
    told = story(job)
    outcome, whole = told.reference(place, ()), told.outcome(told.whole)
    assert differing(outcome, whole) == set()
    assert {"records.train", "records.epoch", "records.resume", "records.eval"} <= whole.keys()
    assert whole["bad_images"] == [2, 9, 11, 18]


@pytest.mark.parametrize("job", JOBS)
def test_each_checkpoint_of_it_is_that_of_the_whole_one(
    job: str, story: Callable, tmp_path: Path
) -> None:
    """The numbered ones as well; and a record of after the checkpoint is there once."""
    told = story(job)
    folder = copy(told.stopped, tmp_path / "run")
    [log] = folder.glob("metrics*.jsonl")
    with log.open("a") as file:
        file.write('{"kind": "train", "step": 11, "loss": 0.5}\n{"kind": "tra')
    ended = told.start(folder)
    assert ended.code == 0 and f"going on from {folder / LAST}, 10 steps done" in ended.said
    assert differing(told.outcome(folder), told.outcome(told.whole)) == set()
    names = [sorted(path.name for path in f.glob("checkpoint*")) for f in (folder, told.whole)]
    assert names[0] == names[1] and len(names[0]) >= 4
    for name in names[0]:
        mine, whole = (dict(flat(load_file(f / name))) for f in (folder, told.whole))
        assert differing(mine, whole) <= {"log_bytes"}, name  # numbers of the machine are longer


@pytest.mark.parametrize("job", JOBS)
def test_the_story_is_what_it_says(job: str, story: Callable) -> None:
    """No key has by chance the value of a run's begin, for then its loss would be none."""
    told = story(job)
    state, begin = told.state(told.stopped), dict(flat(told.fresh))
    assert (state["step"], state["epoch"], state["stage"]) == (10, 2, "training")
    assert state["timeline"] == {"steps_per_epoch": 5, "first": 1, "start": 2}
    assert tuple(state["bad_images"]) == FOUND
    # Those of steps that no log line has are in the list as well.
    [listed] = told.stopped.glob("bad_images*.txt")
    assert len(listed.read_text().splitlines()) == len(FOUND)
    if state["scaler"]:
        assert (state["scaler"]["scale"], state["scaler"]["_growth_tracker"]) == (512.0, 1)
    for key in KEYS:
        if job in key.jobs and key.place == "stopped" and not key.own:
            found = leaves(state, key, job)
            assert found, key.pattern
            changed = [p for p, v in found.items() if not same(v, key.lose(v, begin.get(p)))]
            assert bool(changed) != (job in key.unseen), key.pattern


# ---- Each key by itself --------------------------------------------------------------------------


@pytest.mark.parametrize("job", JOBS)
def test_every_key_has_an_entry(job: str, story: Callable) -> None:
    told = story(job)
    used = set()
    for place in (told.stopped, told.at_edge, told.measuring, told.whole):
        used |= {key_of(path, job).pattern for path, _ in flat(told.state(place))}
    assert {key.pattern for key in KEYS if job in key.jobs} - used <= {
        "model_args.drop_path" if job == "pretrain" else "",
    }  # fmt: skip


def another(path: str, value: Any) -> Any:
    """A value that no run has: of the same kind, so that it can be gone on with."""
    special = {
        "stage": "done", "step": 11, "timeline.first": 0, "timeline.start": -3,
        "bad_images": [1, 9, 11],
    }  # fmt: skip
    if path in special:
        return special[path]
    if path == "sums.latest":
        return (value[0], 2 * value[1])
    if isinstance(value, torch.Tensor):
        return value * 1.5 + 1 if value.is_floating_point() else value + 1
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return type(value)(3 * value + 1)
    if isinstance(value, str):
        return f"{value}x"
    return [value, "another"]


def saved_at_once(told: Story, folder: Path) -> dict[str, Any]:
    """The checkpoint that a run writes before its first step."""
    enter = Run.__enter__

    def entered(self: Run) -> Run:
        run = enter(self)
        run.save(self.step, self.stage)
        run.__exit__(None, None, None)
        raise Stopped("written at once")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "__enter__", entered)
        ended = told.start(folder)
    assert ended.code == EXIT_STOPPED and "written at once" in ended.said, ended.said
    return load_file(folder / LAST)


@pytest.mark.parametrize("job", JOBS)
def test_what_is_read_is_what_the_next_checkpoint_holds(
    job: str, story: Callable, tmp_path: Path
) -> None:
    """Each leaf, each parameter's moments among them, is the file's; or is each start's own."""
    told = story(job)
    state = told.state(told.stopped)
    read, own = {}, {}
    for path, value in flat(deepcopy(state)):
        key = key_of(path, job)
        if key.own:
            own[path] = value
        elif path != "log_bytes":
            read[path] = another(path, value)
            assert not same(value, read[path]), path
            put(state, path, read[path])
    folder = with_state(told, "stopped", tmp_path / "run", state)
    [log] = folder.glob("metrics*.jsonl")
    state["log_bytes"] = log.read_bytes().index(b"\n") + 1
    write_signed(folder / LAST, state)
    found = dict(flat(saved_at_once(told, folder)))
    assert found.pop("log_bytes") == state["log_bytes"]
    assert found.keys() == read.keys() | own.keys()
    assert [path for path, value in read.items() if not same(found[path], value)] == []
    assert [path for path, value in own.items() if not same(found[path], value)] == []


@pytest.mark.parametrize("job", JOBS)
def test_what_each_start_knows_itself_is_not_taken_from_the_file(
    job: str, story: Callable, tmp_path: Path
) -> None:
    """Settings of the optimiser and facts for later readers: flags and data say what they are."""
    told = story(job)
    state, altered = told.state(told.stopped), 0
    for path, value in flat(deepcopy(state)):
        facts = path.startswith(("data.", "optimizer.param_groups.")) or path in (
            "model_name", "tune",
        )  # fmt: skip
        if facts and key_of(path, job).own and not path.endswith((".params", ".param_names")):
            put(state, path, another(path, value))
            altered += 1
    assert altered > 10
    folder = with_state(told, "stopped", tmp_path / "run", state)
    ended = told.start(folder)
    assert ended.code == 0, ended.said
    assert differing(told.outcome(folder), told.outcome(told.whole)) == set()


# Of a constant, and of what nobody reads, there is nothing to see.
LOSSES = [
    pytest.param(key, job, id=f"{job}-{key.pattern}")
    for key in KEYS
    for job in key.jobs
    if (key.differs or key.refused) and job not in key.unseen
]


@pytest.mark.parametrize(("key", "job"), LOSSES)
def test_without_it_the_run_is_another(key: Key, job: str, story: Callable, tmp_path: Path) -> None:
    """A resume that ignores the key would see the value of a run's begin."""
    told: Story = story(job)
    state = told.state(getattr(told, key.place))
    begin = dict(flat(told.fresh))
    lost = leaves(deepcopy(state), key, job)
    assert lost
    for path, value in lost.items():
        put(state, path, key.lose(value, begin.get(path)))
    folder = with_state(told, key.place, tmp_path / "run", state)
    kept = (folder / LAST).read_bytes()
    ended = told.start(folder, *key.flags)
    if key.refused == CRASHES:
        assert ended.code is None
        return
    if key.pattern == "task":  # nothing to go on from: the file is set aside, not overwritten
        assert ended.code == 0 and "going on" not in ended.said
        assert (folder / "checkpoint-last-another.pth").read_bytes() == kept
        return
    if key.refused:
        assert ended.code == 2 and key.refused in ended.said, ended.said
        assert (folder / LAST).read_bytes() == kept
        return
    assert ended.code == 0, ended.said
    names = differing(told.outcome(folder), told.reference(key.place, key.flags))
    allowed = (*key.differs, *key.more)
    assert [n for n in names if not any(fnmatchcase(n, pattern) for pattern in allowed)] == []
    assert [p for p in key.differs if not any(fnmatchcase(n, p) for n in names)] == []
    if key.weights:
        groups = state["optimizer"]["param_groups"]
        learn = {f"model.{name}" for group in groups for name in group["param_names"]}
        assert learn <= names


# ---- What must agree -----------------------------------------------------------------------------


@pytest.mark.parametrize("job", JOBS)
def test_each_setting_must_agree(job: str, story: Callable) -> None:
    """Another value is refused with its name, and so is a setting that the file lacks."""
    told = story(job)
    state = told.state(told.stopped)
    current, timeline = state["arithmetic"], Timeline(5, epochs=3)

    def start(settings: dict[str, Any]) -> None:
        changed = {**state, "arithmetic": settings}
        go_on(timeline, changed, Path("x"), current, lambda step: 0.1, [], allow_changes=False)

    start(dict(current))
    filled = bring_up_to_date({"task": state["task"], "arithmetic": {}})[0]
    assert len(current) > 30
    for name, value in current.items():
        with pytest.raises(BadInput, match=rf"\b{name}: was "):
            start(current | {name: another(name, value)})
        without = {k: v for k, v in current.items() if k != name}
        # Older than the setting, it had this value, or none.
        known = value is None or (name in filled and same(filled[name], value))
        older = bring_up_to_date({"task": state["task"], "arithmetic": without})[0]
        assert any(text.startswith(f"{name}: ") for text in differences(older, current)) != known
        if value is not None:  # of today, it lacks nothing
            with pytest.raises(BadInput, match=rf"\b{name}: was "):
                start(without)
    for name in current["model_args"]:
        inner = current["model_args"] | {name: "another"}
        assert differences({"model_args": inner}, {"model_args": current["model_args"]})
    assert state["resume_version"] == VERSION


# ---- Averages and scales that were not there before ---------------------------------------------


def test_averages_that_begin_in_the_middle_begin_with_the_weights(
    story: Callable, tmp_path: Path
) -> None:
    """Without them in the file, those of the last step are the first average."""
    told = story("finetune")
    state = told.state(told.stopped)
    weights = state["model"]
    del state["ema"]
    folder = with_state(told, "stopped", tmp_path / "run", state)
    begun = saved_at_once(told, folder)
    assert begun["ema"].keys() == weights.keys()
    assert all(torch.equal(begun["ema"][name], weights[name]) for name in weights)


@pytest.mark.parametrize("job", SCALED)
def test_a_scale_that_begins_in_the_middle(job: str, story: Callable, tmp_path: Path) -> None:
    """A run of other precision goes on in fp16 when told: torch refuses an empty scale."""
    told = story(job)
    folder = copy(told.stopped, tmp_path / "run")
    with stopping(11):
        ended = told.start(folder, "--precision=fp32", "--allow_changes")
    assert ended.code == EXIT_STOPPED and told.state(folder)["scaler"] == {}, ended.said
    ended = told.start(folder, "--precision=fp16", "--allow_changes")
    assert ended.code == 0, ended.said
    assert told.state(folder)["scaler"]["_growth_tracker"] == 1  # one step since
