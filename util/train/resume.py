"""What must agree for a run to go on from a checkpoint, and where in the run it goes on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from util.errors import BadInput
from util.train.timeline import Timeline

Arithmetic = dict[str, Any]

# ---- What must agree ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A change of this program that older checkpoints are to be read with.

    Attributes:
        tasks: whose checkpoints it concerns.
        added: settings of an older run to those that its file does not name, with the values that
            the run had.
        fault: settings of an older run to the reason why it would go on with other numbers, though
            each of its settings is the same; None where it would not.
    """

    tasks: tuple[str, ...]
    added: Callable[[Arithmetic], Arithmetic] = lambda settings: {}
    fault: Callable[[Arithmetic], str | None] = lambda settings: None


def published(settings: Arithmetic) -> Arithmetic:
    """Before images could be packed they were used as their makers published them."""
    return {"stored": "as published"}


def first_pretraining(settings: Arithmetic) -> Arithmetic:
    """Before there was a choice of decoders, targets, augmentations and readers of images."""
    parts = {"decoder": "full", "predict_ratio": 1.0, "encoder_mask_tokens": False}
    return {
        **parts,
        "model_args": parts | {"pca_components": None},
        "target": "norm_pixels" if settings.get("norm_pix_loss") else "pixels",
        "pca_components": 96,
        "pca_patches": 65536,
        "train_images": None,
        "augment": "random_crop",
        "decode": "pil",
        "crops_per_decode": 1,
    }


def full_branches(settings: Arithmetic) -> Arithmetic:
    """Before `--branch_init` came."""
    return {"branch_init": 1.0, "model_args": {"branch_init": 1.0}}


def nothing_held_out(settings: Arithmetic) -> Arithmetic:
    """Before `--val_fraction` came."""
    return {"val_fraction": None, "val_seed": 0}


def leaning_masks(settings: Arithmetic) -> str | None:
    """Which runs had masks that leaned: equal priorities went by the number of the patch."""
    mask, strict = settings.get("mask"), settings.get("avg_temperature") == 0
    if mask == "block":
        what = "block masks leaned toward the bottom"
    elif mask in ("average", "mixed") and strict:
        what = f"{mask} masks with --avg_temperature 0 leaned toward the bottom of flat images"
    else:
        return None
    return (
        f"{what} before 2026-11-26, and do no longer: the masks would change in the middle of the "
        "run"
    )


def one_cosine(settings: Arithmetic) -> Arithmetic:
    """Before there was a choice of schedules."""
    return {
        "schedule": "cosine",
        "warmup_lr": 0.0,
        "decay_epochs": None,
        "decay_rate": 0.1,
        "lr_batch": None,
    }


def bicubic_crops(settings: Arithmetic) -> Arithmetic:
    """Before crops could be bilinear, and `--betas` came to pretraining."""
    return {"interpolation": "bicubic", "betas": [0.9, 0.95]}


def one_class_token(settings: Arithmetic) -> Arithmetic:
    """Before class tokens, positions and drop path of a masked autoencoder were flags."""
    return {"cls_tokens": None, "positions": None, "drop_path": None}


# In the order in which they came. A checkpoint holds how many of them its run had: append, and
# never take one out. A new flag that changes numbers needs an entry, or older runs are refused.
CHANGES: tuple[Change, ...] = (
    Change(("pretrain", "finetune", "segment"), added=published),
    Change(("pretrain",), added=first_pretraining),
    Change(("finetune",), added=lambda settings: {"val_images": None}),
    Change(("pretrain",), fault=leaning_masks),
    Change(("finetune", "segment"), added=lambda settings: {"num_heads": None}),
    Change(("segment",), added=lambda settings: {"label_map": None}),
    Change(("pretrain",), added=full_branches),
    Change(("pretrain", "finetune", "segment"), added=nothing_held_out),
    Change(("finetune", "segment"), added=lambda settings: {"weights_key": None}),
    Change(("pretrain", "finetune", "segment"), added=lambda settings: {"max_pixels": None}),
    Change(("pretrain",), added=lambda settings: {"mask_cell": [1]}),
    Change(("pretrain", "finetune"), added=one_cosine),
    Change(("pretrain",), added=bicubic_crops),
    Change(("finetune",), added=lambda settings: {"probe_block": None}),
    Change(("pretrain",), added=one_class_token),
)
VERSION = len(CHANGES)


def bring_up_to_date(state: Mapping[str, Any]) -> tuple[Arithmetic, list[str]]:
    """The settings of a checkpoint's run as today's would name them; and what is not the same.

    Args:
        state: contents of a checkpoint. One without a version is older than all `CHANGES`.
    """
    settings, faults = dict(state["arithmetic"]), []
    # A newer file names all that its own method has: what another has is not to be added.
    for change in CHANGES[state.get("resume_version", 0) :]:
        if state["task"] in change.tasks:
            settings = fill(settings, change.added(settings))
            if fault := change.fault(settings):
                faults.append(fault)
    return settings, faults


def fill(settings: Arithmetic, added: Mapping[str, Any]) -> Arithmetic:
    """Settings with those added that they lack, also inside of `model_args`."""
    inner = {
        name: fill(settings[name], value)
        for name, value in added.items()
        if isinstance(value, dict) and isinstance(settings.get(name), dict)
    }
    return {**added, **settings, **inner}


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What changed between two sets of settings, a text each."""
    return [
        f"{name}: was {saved.get(name, 'not set')}, is {current.get(name, 'not set')}"
        for name in sorted({*saved, *current})
        if saved.get(name) != current.get(name)
    ]


# ---- Where in the run --------------------------------------------------------------------------

# What the order of the images depends on.
ORDER = (
    "seed", "images", "dataset", "train_images", "val_fraction", "val_seed", "crops_per_decode",
)  # fmt: skip


def read_timeline(state: Mapping[str, Any], settings: Arithmetic) -> Timeline:
    """That of a checkpoint's run, as far as it went.

    Args:
        settings: of that run. Older files hold no timeline: their epochs were of one length.
    """
    if "timeline" in state:
        return Timeline(**state["timeline"])
    return Timeline(settings["images"] // settings["global_batch"])


def move(
    timeline: Timeline, state: Mapping[str, Any], saved: Arithmetic, current: Arithmetic
) -> tuple[Timeline, list[str]]:
    """The timeline of a run that goes on from a checkpoint; and what a reader must know of it.

    At the same batch and the same steps per epoch it is the checkpoint's own. Otherwise a finished
    epoch stays finished, and one in the middle goes on behind the images that it has taken. Where
    the images come in another order, it goes on behind the same share of the epoch.

    Args:
        timeline: of a run of these settings from its start.
        state, saved: the checkpoint, and the settings of its run.
        current: settings of this start.
    """
    before = read_timeline(state, saved)
    length, was = timeline.steps_per_epoch, before.steps_per_epoch
    epoch, step = state["epoch"], state["step"]
    done = step - before.begin(epoch)
    if done == was:
        epoch, done = epoch + 1, 0
    notes = []
    # R epochs share a permutation, see `EpochSampler`: images that a start of this epoch has
    # behind it, and which are taken once each.
    crops = current.get("crops_per_decode", 1)
    inside = done > 0 or epoch % crops > 0
    same_order = all(saved.get(name) == current.get(name) for name in ORDER)
    if inside and not same_order:
        notes.append(
            f"the order of the images is another in the middle of epoch {epoch + 1}: some that "
            "it took before come again, others do not come"
        )
    batch, batch_before = current["global_batch"], saved["global_batch"]
    if (length, batch) == (was, batch_before):
        return replace(timeline, first=before.first, start=before.start), notes
    if length != was:
        notes.append(f"an epoch has {length} steps from here on, before {was}")
    ahead = 0
    if done and not same_order:
        ahead = -(-done * length // was)
    elif inside:
        taken = (epoch % crops * was + done) * batch_before
        if done:  # the first step that takes none of them again
            ahead = min(max(-(-taken // batch) - epoch % crops * length, 0), length)
        gap = (epoch % crops * length + ahead) * batch - taken
        if gap:
            what = "left out, to go on with a whole batch" if gap > 0 else "taken a second time"
            notes.append(f"{abs(gap) // crops} images of epoch {epoch + 1} are {what}")
    return replace(timeline, first=epoch, start=step - ahead), notes


def last_rate(state: Mapping[str, Any]) -> float:
    """The learning rate of a checkpoint's last step."""
    group = max(state["optimizer"]["param_groups"], key=lambda g: g.get("lr_scale", 1.0))
    return float(group["lr"]) / group.get("lr_scale", 1.0)


def check_length(timeline: Timeline, state: Mapping[str, Any], path: Path) -> None:
    """Refuse a checkpoint that is further than the run is long.

    Raises:
        BadInput: with how long the run has to be.
    """
    step = state["step"]
    if step <= timeline.total:
        return
    if timeline.iterations is not None:
        length, flag = f"{timeline.iterations} iterations", f"--iterations {step}"
    else:
        needed = timeline.find_epoch(step) + 1
        length, flag = f"{timeline.epochs} epochs", f"--epochs {needed}"
        if timeline.epochs is not None and timeline.first <= timeline.epochs:
            length += f", {timeline.total} steps"  # else it would count back from epochs beyond
    raise BadInput(
        f"{path} has {step} steps done, more than the whole run of {length}: nothing is left to "
        f"train; give {flag} or more, or another --output_dir"
    )


def what_is_left(timeline: Timeline, step: int) -> str:
    """Epochs and steps, or iterations, after `step` steps."""
    left = timeline.total - step
    if timeline.iterations is not None:
        return f"{left} of {timeline.iterations} iterations are left"
    assert timeline.epochs is not None
    epochs = f"{left / timeline.steps_per_epoch:g}" if left else "0"
    return f"{epochs} of {timeline.epochs} epochs are left, {left} steps"


def follow_changes(
    timeline: Timeline,
    state: Mapping[str, Any],
    saved: Arithmetic,
    rate: Callable[[int], float],
) -> tuple[dict[str, Any], list[str]]:
    """What follows of changed settings: values for the metrics, and texts.

    Args:
        saved: settings of the checkpoint's run.
        rate: what the schedule gives, see `Timeline.scheduled`.
    """
    step, total = state["step"], timeline.total
    values: dict[str, Any] = {
        "steps_per_epoch": timeline.steps_per_epoch,
        "steps_per_epoch_before": read_timeline(state, saved).steps_per_epoch,
        "steps_left": total - step,
    }
    texts = [what_is_left(timeline, step)]
    unit = "epochs" if timeline.iterations is None else "iterations"
    now, was = getattr(timeline, unit), saved.get(unit)
    if was is not None and now != was:
        how = "stretched" if now > was else "shortened"
        texts.append(f"the learning rate's schedule is {how} from {was} to {now} {unit}")
    if step < total:
        values |= {"lr_before": last_rate(state), "lr": rate(timeline.scheduled(step))}
        texts.append(
            f"the learning rate goes from {values['lr_before']:.4g} in the last step to "
            f"{values['lr']:.4g} in the next"
        )
    return values, texts


def go_on(
    timeline: Timeline,
    state: Mapping[str, Any],
    path: Path,
    arithmetic: Arithmetic,
    rate: Callable[[int], float],
    notes: list[str],
    *,
    allow_changes: bool,
) -> Timeline:
    """Check that a run may go on from a checkpoint; its timeline from there.

    Args:
        timeline: of this run, had it begun with these settings.
        state: contents of the checkpoint at `path`.
        arithmetic: the settings that change the numbers, of this run.
        rate: its learning rate schedule.
        notes: what the reader should know is added.
        allow_changes: note differences, and what follows of them, instead of refusing them.

    Raises:
        BadInput: other settings, with the differences; or more steps done than the run has.
    """
    saved, faults = bring_up_to_date(state)
    changed = differences(saved, arithmetic)
    if changed and not allow_changes:
        raise BadInput(
            f"{path} was trained with different settings that change the result: "
            f"{'; '.join(changed + faults)}; give the same ones, or another --output_dir, or "
            "--allow_changes"
        )
    if faults and not allow_changes:
        raise BadInput(
            f"{path} would be resumed with different results: {'; '.join(faults)}; start a new "
            f"run in another "
            "--output_dir, or give --allow_changes"
        )
    timeline, moves = move(timeline, state, saved, arithmetic)
    check_length(timeline, state, path)
    notes.append(f"going on from {path}, {state['step']} steps done")
    if changed or faults:
        values, texts = follow_changes(timeline, state, saved, rate)
        notes.append(f"changed since {path.name}: {'; '.join(changed + faults)}")
        notes += [*moves, *texts]
        said = {"changed": changed + faults, "notes": [*moves, *texts]}
        timeline = replace(timeline, changes={"checkpoint": str(path), **values, **said})
    if state["step"] == timeline.total and state["stage"] == "done":
        notes.append(f"nothing is left to train: all {timeline.total} steps are done")
    return timeline
