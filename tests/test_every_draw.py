"""Every random draw of the program: what it follows and what it does not depend on, by a table.

The mains themselves run, on images that are all alike, so that views differ by what was drawn and
by nothing else. Their training is replaced by one that looks at what the loader gives, or, for what
is drawn in the model and on the batch, is the real one of the engines, watched. Several processes
are pretended: each rank runs alone and is told that there are others; `test_every_sum.py` starts
real ones.
"""

import ast
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import program_files
from launch import ROOT
from PIL import Image
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.layers import DropPath
from torch import Tensor, nn

import eval_pretrain
import eval_segment
from engine_pretrain import build_masker, draw_masks
from models_mmae import MaskedAutoencoderViT
from models_zoo import create_model
from util.data.images import BadImage
from util.data.randomness import STREAMS, Key, derive_seed, make_generator, seeded
from util.data.samples import Samples
from util.data.segmentation_sets import SegmentationSource
from util.data.source import Source
from util.mask.patches import patch_averages
from util.mask.strategies import STANDARD, create_strategy
from util.measure.metrics import FILLS
from util.train import session
from util.train.agreement import Agreement, Wish
from util.train.dist import Processes
from util.train.run import Run

CPU = torch.device("cpu")
IMAGES, HELD_OUT, SIDE = 24, 6, 96
EPOCHS, GLOBAL_BATCH = 2, 12

# ---- Images that are all alike -----------------------------------------------------------------


def ramp() -> np.ndarray:
    """Red says the column and green the row, so that a view says which crop of it this is."""
    y, x = np.mgrid[:SIDE, :SIDE]
    return np.stack([2 * x, 2 * y, np.full_like(x, 128)], axis=-1).astype(np.uint8)


def flat() -> np.ndarray:
    """One colour, so that a view says what was done to colours."""
    return np.full((SIDE, SIDE, 3), (100, 120, 140), np.uint8)


PICTURES = {"ramp": ramp, "flat": flat, "broken": flat}


class Alike(Source):
    """One picture for every index, which is its label; odd ones of "broken" cannot be decoded."""

    def __init__(self, kind: str, split: str) -> None:
        count = IMAGES if split == "train" else HELD_OUT
        names = [str(i) for i in range(IMAGES)]
        super().__init__("synthetic", split, (0.5,) * 3, (0.25,) * 3, names)
        self.count, self.kind, self.picture = count, kind, PICTURES[kind]()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if self.kind == "broken" and index % 2:
            raise BadImage(str(index), "broken")
        return Image.fromarray(self.picture), index


class AlikePairs(SegmentationSource):
    """The same with a label map whose classes say the place; of "broken" blue says the index."""

    def __init__(self, kind: str, split: str) -> None:
        super().__init__("garments", split, (0.5,) * 3, (0.25,) * 3, [str(i) for i in range(64)])
        self.images = Alike(kind, split)
        y, x = np.mgrid[:SIDE, :SIDE] * 8 // SIDE
        self.label = (8 * y + x).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        picture = np.array(self.images[index][0])
        if self.images.kind == "broken":
            picture[..., 2] = 2 * index
        return Image.fromarray(picture), self.label


# ---- A main, watched ---------------------------------------------------------------------------


class Pretended(Processes):
    """One process that believes there are others, which all say what it says."""

    def gather(self, thing: Any) -> list[Any]:
        return [thing] * self.world_size

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor * self.world_size


@dataclass(frozen=True)
class Knobs:
    """What of a run is changed, to see what follows."""

    seed: int = 0
    batch: int = GLOBAL_BATCH
    accum: int = 1
    world: int = 1
    workers: int = 0
    crops: int = 1
    disturbed: int = 0  # seed of python's, numpy's and torch's global generators at the start


@dataclass
class Found:
    """What was seen of a run, or of all its ranks together.

    Attributes:
        samples: what the loader gave, by key.
        order: indices of each epoch, in micro-batches.
        start: the weights at the first step.
        draws: what was drawn on a batch and in the model, by step, micro-step and rank.
        loaders: of the training, one for each rank.
        states: of the global generators, before and after each call of the training.
    """

    samples: dict[Key, dict[str, Any]] = field(default_factory=dict)
    order: list[list[list[int]]] = field(default_factory=list)
    start: dict[str, Tensor] = field(default_factory=dict)
    draws: dict[str, dict[tuple[int, int, int], Any]] = field(default_factory=dict)
    loaders: list[Any] = field(default_factory=list)
    states: list[tuple[Any, Any]] = field(default_factory=list)


# Where a main's model is made, if not in its own file.
BUILDERS = {
    "main_pretrain": "build_pretrain",
    "main_finetune": "build_finetune",
    "main_segment": "build_segment",
}
SIZES = ["--num_workers=0", "--device=cpu", "--log_every=100", "--save_every=0"]
FLAGS = {
    "main_pretrain": [
        *SIZES, "--model=mae_vit_micro_patch8", "--input_size=16", f"--epochs={EPOCHS}",
        "--warmup_epochs=0", "--decoder_depth=1", "--picture_every=0", "--max_bad_images=99",
    ],
    "main_finetune": [
        *SIZES, "--model=vit_micro_patch8", "--input_size=16", f"--epochs={EPOCHS}",
        "--warmup_epochs=0", "--eval_every=0", "--max_bad_images=99", "--aa=none", "--mixup=0",
        "--cutmix=0", "--reprob=0",
    ],
    "main_segment": [
        *SIZES, "--model=vit_micro_patch8", "--input_size=32", "--resize", "48", "48",
        "--window=32", "--stride=32", "--channels=8", "--aux_channels=8", "--eval_every=0",
        "--warmup_iterations=0", "--pictures=0", "--max_bad_images=99",
    ],
}  # fmt: skip


def global_states() -> list[Any]:
    """States of python's, numpy's and torch's global generators, comparable by ==."""
    import random

    name, words, *rest = np.random.get_state()
    return [random.getstate(), name, words.tolist(), rest, torch.random.get_rng_state().tolist()]


@contextmanager
def pretended(main: Any, kind: str, world: int, rank: int) -> Iterator[pytest.MonkeyPatch]:
    """A main on images that are alike, as one of several processes."""
    source = AlikePairs if main.__name__ == "main_segment" else Alike
    procs = Pretended(rank, world, rank, world, CPU)
    with pytest.MonkeyPatch.context() as patch:
        for module in (main, eval_pretrain) if main.__name__ == "main_pretrain" else (main,):
            patch.setattr(module, "open_set", lambda args, split, *rest: source(kind, split))
        patch.setattr(main, "processes", lambda *rest: nullcontext(procs))
        patch.setattr(main, "hold_folder", lambda *rest: nullcontext(None))
        patch.setattr(session, "distribute", lambda model, *rest, **more: model)
        patch.setattr(Agreement, "after_step", lambda self: Wish())
        # Nothing is saved, and no room is looked for, to be quick.
        builder = importlib.import_module(BUILDERS.get(main.__name__, main.__name__))
        patch.setattr(builder, "create_in_memory", lambda make: make())
        patch.setattr(Run, "save", lambda *rest: None)
        patch.setattr(Run, "say_results", lambda self: None)
        yield patch


def command(name: str, knobs: Knobs, folder: Path, flags: tuple[str, ...]) -> list[str]:
    """The arguments of a main."""
    own = [f"--batch_size={knobs.batch}", f"--seed={knobs.seed}", f"--num_workers={knobs.workers}"]
    own += [f"--accum_iter={knobs.accum}", f"--output_dir={folder}"]
    if name == "main_segment":
        steps = EPOCHS * IMAGES // (knobs.batch * knobs.accum * knobs.world)
        own.append(f"--iterations={steps}")
    if knobs.crops > 1:
        own.append(f"--crops_per_decode={knobs.crops}")
    return [*FLAGS[name], *own, *flags]


def look(name: str, kind: str, flags: tuple[str, ...], knobs: Knobs, folder: Path) -> Found:
    """Run a main on all ranks, one after the other, with a training that looks at the loader."""
    main, found = importlib.import_module(name), Found()
    per_epoch = IMAGES // (knobs.batch * knobs.world)  # micro-batches of a rank

    for rank in range(knobs.world):
        seen: list[dict[str, Any]] = []

        def train(
            model: nn.Module,
            loader: Any,
            *rest: Any,
            seen: list = seen,
            first_step: int,
            **more: Any,
        ) -> int:
            if not seen:
                found.loaders.append(loader)
                found.start = {k: v.clone() for k, v in model.state_dict().items()}
            batches = list(loader)
            seen.extend(batches)
            return first_step + len(batches) // knobs.accum

        with pretended(main, kind, knobs.world, rank) as patch:
            patch.setattr(main, "train_steps", train)
            with seeded(knobs.disturbed):
                main.main(command(name, knobs, folder / f"rank{rank}", flags))
        assert len(seen) == EPOCHS * per_epoch
        for number, batch in enumerate(seen):
            epoch, indices = number // per_epoch, batch["index"].tolist()
            while len(found.order) <= epoch:
                found.order.append([])
            found.order[epoch].append(indices)
            for i, index in enumerate(indices):
                crop = i % knobs.crops
                sample = {k: v[i] for k, v in batch.items()}
                assert found.samples.setdefault(Key(epoch, index, crop), sample) is sample
    return found


class Runs:
    """Runs by what makes them, each done once."""

    def __init__(self, root: Path) -> None:
        self.root, self.done = root, {}

    def __call__(
        self, do: Callable, name: str, kind: str, flags: tuple[str, ...], **changes: int
    ) -> Found:
        key = (do, name, kind, flags, Knobs(**changes))
        if key not in self.done:
            folder = self.root / str(len(self.done))
            self.done[key] = do(name, kind, flags, key[-1], folder)
        return self.done[key]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


# ---- What is drawn for a sample ----------------------------------------------------------------


def crop_of(sample: Mapping[str, Tensor]) -> Any:
    """Which part of the ramp a view shows, flipped or not."""
    red, green = sample["x"][:2].int()
    return sorted([red[:, 0].tolist(), red[:, -1].tolist()]), green[:, 0].tolist()


def flip_of(sample: Mapping[str, Tensor]) -> Any:
    red = sample["x"][0].float()
    return bool(red[:, 0].mean() > red[:, -1].mean())


def bytes_of(name: str, rows: slice = slice(None)) -> Callable[[Mapping[str, Tensor]], Any]:
    return lambda sample: sample[name][rows].contiguous().numpy().tobytes()


def label_crop_of(sample: Mapping[str, Tensor]) -> Any:
    label = sample["y"]
    return sorted([label[:, 0].tolist(), label[:, -1].tolist()]), label[0].unique().tolist()


def label_flip_of(sample: Mapping[str, Tensor]) -> Any:
    return bool(sample["y"][0, 0] % 8 > sample["y"][0, -1] % 8)


def shown(sample: Mapping[str, Tensor]) -> Any:
    """Which image stands in for one that is broken, None for one that is not."""
    return int(sample["y"]) if sample["bad"][0] >= 0 else None


def shown_pair(sample: Mapping[str, Tensor]) -> Any:
    return int(sample["x"][2].max()) // 2 if sample["bad"][0] >= 0 else None


@dataclass(frozen=True)
class Draw:
    """One purpose of a stream in one main.

    Attributes:
        stream: of `util.data.randomness.STREAMS`.
        kind: of the images that show it.
        read: the drawn thing, as far as a sample shows it.
        flags: with which it is drawn.
        few: values that it can take are so few that two draws are often equal.
    """

    main: str
    stream: str
    kind: str
    read: Callable[[Mapping[str, Tensor]], Any]
    flags: tuple[str, ...] = ()
    few: bool = False


def draws_of(main: str, prefix: str, kind: str, flags: tuple[str, ...], **reads: Any) -> dict:
    """Entries of the table that one run shows."""
    found = {}
    for name, (stream, read, few) in reads.items():
        found[f"{prefix} {name}"] = Draw(main, stream, kind, read, flags, few)
    return found


STILL = "--no_distortion"
PLAIN = ("--mask=mixed", "--pos_offset=jitter", "--decoder=cross", "--predict_ratio=0.5")
CROP = {"crop": ("augment", crop_of, False), "flip": ("augment", flip_of, True)}
BY_SAMPLE: dict[str, Draw] = {
    **draws_of(
        "main_pretrain", "pretrain", "ramp", PLAIN, **CROP,
        mask=("mask", bytes_of("noise", slice(0, 1)), False),
        averages=("mask", bytes_of("noise", slice(1, 2)), False),
        order=("predict", bytes_of("order"), False),
        shift=("shift", bytes_of("shift"), False),
    ),
    **draws_of("main_pretrain", "pretrain by pil", "ramp", ("--decode=pil",), **CROP),
    **draws_of(
        "main_pretrain", "pretrain fixed", "ramp", ("--augment=fixed_crop",),
        crop=("augment", crop_of, True), flip=("augment", flip_of, True),
    ),
    **draws_of(
        "main_pretrain", "pretrain shaken", "flat", ("--augment=crop_jitter", "--mask=block"),
        colour=("augment", bytes_of("x"), False),
        mask=("mask", bytes_of("noise", slice(0, 1)), False),
    ),
    **draws_of(
        "main_pretrain", "pretrain broken", "broken", ("--mask=grid",),
        instead=("fallback", shown, True), mask=("mask", bytes_of("noise", slice(0, 1)), False),
    ),
    **draws_of("main_finetune", "finetune", "ramp", (), **CROP),
    **draws_of(
        "main_finetune", "finetune by policy", "ramp", ("--aa=rand-m9-mstd0.5-inc1",),
        view=("augment", bytes_of("x"), False),
    ),
    **draws_of(
        "main_finetune", "finetune shaken", "flat", ("--color_jitter=0.4",),
        colour=("augment", bytes_of("x"), False),
    ),
    **draws_of(
        "main_finetune", "finetune broken", "broken", (), instead=("fallback", shown, True)
    ),
    **draws_of(
        "main_segment", "segment", "ramp", ("--ratio_range", "1", "1", STILL),
        crop=("augment", label_crop_of, True), flip=("augment", label_flip_of, True),
    ),
    # Scaled to at most the crop, an image is whole in it, and its extent says how it was scaled.
    **draws_of(
        "main_segment", "segment scaled", "ramp", ("--ratio_range", "0.2", "0.66", STILL),
        scale=("augment", bytes_of("extent"), True),
    ),
    **draws_of(
        "main_segment", "segment shaken", "flat", (),
        colour=("augment", lambda sample: sample["x"][:, 0, 0].tolist(), True),
    ),
    **draws_of(
        "main_segment", "segment broken", "broken", (STILL,), instead=("fallback", shown_pair, True)
    ),
}  # fmt: skip


def values_of(draw: Draw, found: Found) -> dict[Key, Any]:
    return {key: draw.read(sample) for key, sample in found.samples.items()}


def by_epoch(values: Mapping[Key, Any]) -> list[list[Any]]:
    """Values of an epoch's images in the images' order."""
    epochs = sorted({key.epoch for key in values})
    return [[values[key] for key in sorted(values) if key.epoch == epoch] for epoch in epochs]


@pytest.mark.parametrize("name", BY_SAMPLE)
def test_a_draw_differs_between_images_epochs_crops_and_seeds(name: str, runs: Runs) -> None:
    draw = BY_SAMPLE[name]
    variants = [{}, {"seed": 1}]
    if draw.main == "main_pretrain":  # others take one crop of a decoded image
        variants.append({"crops": 2})
    tables = []
    for changes in variants:
        found = runs(look, draw.main, draw.kind, draw.flags, **changes)
        tables.append(values_of(draw, found))
        assert len(tables[-1]) == EPOCHS * IMAGES
    series = [epoch for table in tables[:2] for epoch in by_epoch(table)]
    assert all(len({str(value) for value in epoch}) > 1 for epoch in series)
    assert all(a != b for i, a in enumerate(series) for b in series[:i])
    if not draw.few:
        # Two views may be one by chance; a key without one of its parts would make half of them so.
        drawn = [str(value) for epoch in series for value in epoch]
        assert len(set(drawn)) > 0.9 * len(drawn)
    for table in tables[2:]:
        crops = [[table[key] for key in sorted(table) if key.crop == crop] for crop in (0, 1)]
        if draw.stream == "fallback":  # an image is decoded once, for all of its crops
            assert crops[0] == crops[1]
        else:
            assert crops[0] != crops[1]


# What a draw does not depend on; the images of an epoch are the same in all of these.
ALIKE: dict[str, dict[str, int]] = {
    "the batch": {"batch": 4},
    "micro-steps": {"batch": 6, "accum": 2},
    "processes": {"batch": 6, "world": 2},
    "both": {"batch": 2, "world": 3, "accum": 2},
    "workers": {"workers": 2},
    "global generators": {"disturbed": 5},
}
# The same, of the draws of other transforms by the same loader.
FEWER: dict[str, dict[str, int]] = {
    "the batch or global generators": {"batch": 8, "disturbed": 5},
    "processes or micro-steps": {"batch": 3, "world": 2, "accum": 2},
}


@pytest.mark.parametrize("name", BY_SAMPLE)
def test_a_draw_depends_on_nothing_but_seed_and_key(name: str, runs: Runs) -> None:
    draw = BY_SAMPLE[name]
    found = runs(look, draw.main, draw.kind, draw.flags)
    expected = values_of(draw, found)
    first = FIRST[draw.main] == (draw.main, draw.kind, draw.flags)
    for what, changes in (ALIKE if first else FEWER).items():
        other = runs(look, draw.main, draw.kind, draw.flags, **changes)
        assert values_of(draw, other) == expected, what
    # Nor on the images that were loaded before, or beside it.
    samples = found.loaders[0].dataset.samples
    with seeded(7):
        alone = {key: draw.read(samples[key]) for key in sorted(expected, reverse=True)[::3]}
    assert alone == {key: expected[key] for key in alone}


def test_no_two_streams_or_rows_are_alike(runs: Runs) -> None:
    """A purpose that took another's stream, or a row that was another's, would be one with it."""
    found = runs(look, "main_pretrain", "ramp", PLAIN)
    for key, sample in found.samples.items():
        rows = [row for row in sample["noise"]]
        assert len(rows) == 2
        assert all((a != b).any() for i, a in enumerate(rows) for b in rows[:i])
        starts = [row[:2] for row in rows]
        starts += [sample["shift"] + 0.5, sample["order"][:2] + 0.5]
        assert all(not torch.allclose(a, b) for i, a in enumerate(starts) for b in starts[:i]), key


# ---- The order of images, and the weights at the start -----------------------------------------

FIRST = {
    "main_pretrain": ("main_pretrain", "ramp", PLAIN),
    "main_finetune": ("main_finetune", "ramp", ()),
    "main_segment": ("main_segment", "ramp", ("--ratio_range", "1", "1", STILL)),
}


def batches_of(found: Found, knobs: Knobs) -> list[list[set[int]]]:
    """The images of each step of each epoch, of all ranks together."""
    steps = IMAGES // (knobs.batch * knobs.accum * knobs.world)
    epochs = []
    for epoch in found.order:
        by_rank = np.array(epoch).reshape(knobs.world, steps, -1)
        epochs.append(
            [set(step.tolist()) for step in by_rank.transpose(1, 0, 2).reshape(steps, -1)]
        )
    return epochs


def flattened(epoch: list[list[int]]) -> list[int]:
    return [index for batch in epoch for index in batch]


@pytest.mark.parametrize("main", FIRST)
def test_the_order_follows_seed_and_epoch_alone(main: str, runs: Runs) -> None:
    base, other = runs(look, *FIRST[main]), runs(look, *FIRST[main], seed=1)
    orders = [flattened(epoch) for found in (base, other) for epoch in found.order]
    assert all(sorted(order) == list(range(IMAGES)) for order in orders)
    assert all(a != b for i, a in enumerate(orders) for b in [*orders[:i], list(range(IMAGES))])
    steps = batches_of(base, Knobs())
    for what, changes in ALIKE.items():
        if what != "the batch":  # other steps, of the same order
            found = runs(look, *FIRST[main], **changes)
            assert batches_of(found, replace(Knobs(), **changes)) == steps, what
    small = runs(look, *FIRST[main], batch=4)
    assert [flattened(epoch) for epoch in small.order] == orders[:2]


@pytest.mark.parametrize("main", FIRST)
def test_the_first_weights_follow_the_seed_alone(main: str, runs: Runs) -> None:
    base = runs(look, *FIRST[main]).start
    other = runs(look, *FIRST[main], seed=1).start
    drawn = {k for k, v in base.items() if v.is_floating_point() and v.unique().numel() > 1}
    fixed = {k for k in drawn if torch.equal(base[k], other[k])}
    assert all("pos_embed" in k for k in fixed) and len(drawn - fixed) > 10
    for what, changes in ALIKE.items():
        start = runs(look, *FIRST[main], **changes).start
        assert start.keys() == base.keys(), what
        assert all(torch.equal(start[k], base[k]) for k in base), what


# ---- What is drawn on a batch and in the model -------------------------------------------------


def watched(name: str, kind: str, flags: tuple[str, ...], knobs: Knobs, folder: Path) -> Found:
    """Run a main on all ranks with its real training, and note what is drawn in it."""
    main, found = importlib.import_module(name), Found()
    for rank in range(knobs.world):
        with pretended(main, kind, knobs.world, rank) as patch:
            watch(patch, main, found, knobs, rank)
            with seeded(knobs.disturbed):
                main.main(command(name, knobs, folder / f"rank{rank}", flags))
    return found


def watch(patch: pytest.MonkeyPatch, main: Any, found: Found, knobs: Knobs, rank: int) -> None:
    """Note what a run draws; a micro-step ends with the model's forward pass."""
    counts = {"model": 0}

    def note(what: str, value: Any) -> None:
        place = (*divmod(counts["model"], knobs.accum), rank)
        found.draws.setdefault(what, {}).setdefault(place, []).append(value)

    def around(owner: type, method: str, see: Callable[..., Any]) -> None:
        original = getattr(owner, method)

        def call(self: Any, *args: Any, **more: Any) -> Any:
            before = args[0].clone() if args and isinstance(args[0], Tensor) else None
            result = original(self, *args, **more)
            if not isinstance(self, nn.Module) or self.training:
                see(self, before, result)
            return result

        patch.setattr(owner, method, call)

    def dropped(what: str, axes: tuple[int, ...]) -> Callable[..., None]:
        """Which entries of the axes were set to 0."""

        def see(self: Any, before: Tensor, after: Tensor) -> None:
            if getattr(self, "drop_prob", getattr(self, "p", 0.0)):
                others = [a for a in range(after.ndim) if a not in axes]
                note(what, (after != 0).float().amax(others).bool().tolist())

        return see

    around(DropPath, "forward", dropped("drop path", (0,)))
    around(nn.Dropout2d, "forward", dropped("dropout", (0, 1)))
    around(Mixup, "_params_per_batch", lambda self, before, result: note("mixup", result))
    around(Mixup, "__call__", lambda self, before, result: note("mixed", result[0][:, 0].tolist()))
    around(RandomErasing, "__call__", lambda self, before, after: note(
        "erasing", (before != after).any(1).tolist()))  # fmt: skip
    train = main.train_steps

    def trained(model: nn.Module, *args: Any, **more: Any) -> int:
        if more["first_step"] == 0:
            model.register_forward_hook(lambda *_: counts.update(model=counts["model"] + 1))
        before = global_states()
        step = train(model, *args, **more)
        found.states.append((before, global_states()))
        return step

    patch.setattr(main, "train_steps", trained)


MIXED = ("--mixup=0.8", "--cutmix=1", "--smoothing=0", "--drop_path=0.5", "--reprob=0.9")
SEGMENT = ("--drop_path=0.5", "--dropout=0.5", "--iterations=2")
BY_STEP: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "finetune drop path": ("drop path", "main_finetune", MIXED),
    "finetune mixup": ("mixup", "main_finetune", MIXED),
    "finetune mixed": ("mixed", "main_finetune", MIXED),
    "finetune erasing": ("erasing", "main_finetune", MIXED),
    "segment drop path": ("drop path", "main_segment", SEGMENT),
    "segment dropout": ("dropout", "main_segment", SEGMENT),
}
STEPS, SPLIT = EPOCHS * (IMAGES // 16), {"batch": 4, "accum": 2, "world": 2}


@pytest.mark.parametrize("name", BY_STEP)
def test_a_draw_of_a_step_differs_wherever_it_is_drawn(name: str, runs: Runs) -> None:
    what, main, flags = BY_STEP[name]
    tables = [runs(watched, main, "flat", flags, **SPLIT, seed=s).draws[what] for s in (0, 1)]
    expected = {(step, m, r) for step in range(STEPS) for m in range(2) for r in range(2)}
    drawn = []
    for table in tables:
        assert table.keys() == expected
        drawn += [str(value) for value in table.values()]
    assert len(set(drawn)) == len(drawn)
    # Nothing of it follows who loads, nor what was drawn before.
    other = runs(watched, main, "flat", flags, **SPLIT, disturbed=5, workers=1)
    assert other.draws[what] == tables[0]


@pytest.mark.parametrize("main", FIRST)
def test_training_leaves_the_global_generators_alone(main: str, runs: Runs) -> None:
    flags = {"main_pretrain": PLAIN, "main_finetune": MIXED, "main_segment": SEGMENT}[main]
    found = runs(watched, main, "flat", flags, **SPLIT)
    assert found.states and all(before == after for before, after in found.states)


# ---- Pretraining: which row of noise is for what ------------------------------------------------


@pytest.mark.parametrize("partial", [True, False])
def test_masks_order_and_shift_are_those_of_their_streams(partial: bool, tmp_path: Path) -> None:
    """What reaches the model is drawn from (seed, stream, key)."""
    import main_pretrain

    seen: list[tuple[Tensor, ...]] = []
    forward = MaskedAutoencoderViT.forward

    def noted(self: Any, images: Tensor, mask: Tensor, visible: int, **drawn: Tensor) -> Any:
        result = forward(self, images, mask, visible, **drawn)
        seen.append((mask, drawn.get("shift"), drawn.get("order"), result["pred"]))
        return result

    # 4 x 4 patches of 4 pixels: of one colour, so that the averages decide nothing but by noise.
    flags = ["--model=mae_vit_micro_patch4", "--mask=mixed", "--seed=3", "--decoder=cross"]
    flags += ["--predict_ratio=0.5"] if partial else []
    flags += ["--pos_offset=jitter"] if partial else ["--pos_offset=learned"]
    keys: list[Key] = []
    with pretended(main_pretrain, "ramp", 1, 0) as patch:
        patch.setattr(MaskedAutoencoderViT, "forward", noted)
        original = Samples.__getitems__

        def getitems(self: Any, asked: list[Key]) -> Any:
            keys.extend(asked)
            return original(self, asked)

        patch.setattr(Samples, "__getitems__", getitems)
        main_pretrain.main([*command("main_pretrain", Knobs(seed=3), tmp_path, ()), *flags])
    masks, shifts, orders, preds = zip(*seen, strict=True)
    assert len(keys) == EPOCHS * IMAGES == sum(map(len, masks))
    assert {p.shape[1] for p in preds} == {6 if partial else 12}  # of 12 masked
    if not partial:
        assert set(shifts) == set(orders) == {None}
        return
    for key, mask, shift, order in zip(
        keys, torch.cat(masks), torch.cat(shifts), torch.cat(orders), strict=True
    ):
        drawn = torch.empty(16).uniform_(generator=make_generator(3, "predict", *key)) - 0.5
        assert torch.equal(order, drawn), key
        place = torch.empty(2).uniform_(generator=make_generator(3, "shift", *key)) - 0.5
        assert torch.equal(shift, place), key
        assert mask.sum() == 12


def test_a_mask_is_made_of_its_own_rows_and_its_own_image(runs: Runs) -> None:
    found = runs(look, "main_pretrain", "ramp", PLAIN)
    strategy = create_strategy("mixed")
    images = torch.stack([s["x"] for s in found.samples.values()])
    noise = torch.stack([s["noise"] for s in found.samples.values()])
    averages = patch_averages(images, (8, 8))
    masks = strategy.mask(noise, averages, 1)
    assert noise.shape[1] == 2
    alone = torch.cat(
        [strategy.mask(noise[i, None], averages[i, None], 1) for i in range(len(noise))]
    )
    assert torch.equal(masks, alone)
    assert len(masks.unique(dim=0)) == 4  # one of four patches stays


def test_the_patches_of_a_pca_are_those_of_lowest_order() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 8, 8), generator=generator, dtype=torch.uint8)
    order = torch.rand(6, 16, generator=generator)
    model = create_model(
        "mae_vit_micro_patch4", img_size=8, patch_size=2, pca_components=5, depth=1, decoder_depth=1
    )
    text = model.fit(
        [(images.float(), {"order": order})], 6, {"pca_patches": 24}, sum_over_ranks=torch.clone
    )
    patches = images.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).reshape(6, 16, 12)
    ids = order.argsort(1)[:, :4]
    picked = torch.cat([patches[i, ids[i]] for i in range(6)]).double()
    mean = model.pca.mean.double()
    torch.testing.assert_close(mean, picked.mean(0), rtol=1e-5, atol=1e-3)
    assert "24 training patches" in text
    wrong = torch.cat([patches[i, order[i].argsort()[4:8]] for i in range(6)]).double()
    assert (wrong.mean(0) - mean).abs().max() > 1


# ---- Evaluation --------------------------------------------------------------------------------


def measured(main: Any, folder: Path, *flags: str, **changes: int) -> dict[Any, Any]:
    """What each held-out image is measured or shown on, over all ranks: masks, or pixels."""
    knobs, found = Knobs(**changes), {}

    def see(part: str, loader: Any, masker: Any = None) -> None:
        for batch in loader:
            kept = batch["x"] if masker is None else masker(batch["x"], batch["noise"])
            for index, value in zip(batch["index"].tolist(), kept, strict=True):
                value = value.numpy().tobytes()
                # The same whenever it is measured.
                assert found.setdefault((part, index), value) == value

    def evaluate(model: Any, loader: Any, masker: Any, **more: Any) -> dict[str, dict[str, float]]:
        see(masker.words, loader, masker)
        return {arm: {"psnr": 1.0, "ssim": 1.0} for arm in ("model", *FILLS)}

    def measurement(loader: Any, *rest: Any) -> Any:
        see("val", loader)
        raise KeyboardInterrupt  # it was all there is to see

    def segmented(model: Any, loader: Any, *rest: Any, **more: Any) -> Any:
        see("val", loader)
        raise KeyboardInterrupt

    def reconstruct(model: Any, images: Tensor, mask: Tensor, *rest: Any) -> Tensor:
        found["shown", len(images)] = mask.numpy().tobytes()
        return images.float()

    name = main.__name__
    for rank in range(knobs.world):
        with pretended(main, "ramp", knobs.world, rank) as patch:
            if name == "main_pretrain":
                patch.setattr(eval_pretrain, "evaluate", evaluate)
                patch.setattr(eval_pretrain, "reconstruct", reconstruct)
            elif name == "main_finetune":
                patch.setattr(main, "measurement", measurement)
            else:
                patch.setattr(eval_segment, "evaluate", segmented)
            train = lambda *rest, first_step, **more: first_step + 1  # noqa: E731
            patch.setattr(main, "train_steps", train)
            own = [*command(name, knobs, folder / f"{len(list(folder.iterdir()))}", ()), *flags]
            with nullcontext() if name == "main_pretrain" else pytest.raises(SystemExit):
                main.main(own)
    return found


EVALUATED = {
    "main_pretrain": ("--eval_every=1", "--picture_every=1", "--eval_images=5", "--mask=mixed",
                      "--model=mae_vit_micro_patch4"),
    "main_finetune": ("--eval_every=1",),
    "main_segment": ("--eval_every=1", "--iterations=1", STILL),
}  # fmt: skip


@pytest.mark.parametrize("name", EVALUATED)
def test_what_an_evaluation_sees_follows_no_seed(name: str, tmp_path: Path) -> None:
    main, flags = importlib.import_module(name), EVALUATED[name]
    first = measured(main, tmp_path, *flags)
    parts = {part for part, _ in first}
    if name == "main_pretrain":
        pytest.importorskip("skimage")
        assert parts == {"75% random", "75% mixed", "shown"}
        masks = {v for (part, _), v in first.items() if part == "75% random"}
        assert len(masks) == 5  # the images have their own
    else:
        assert parts == {"val"} and len(first) == HELD_OUT
    variants = [{"seed": 1}, {"batch": 4}, {"disturbed": 3}, {"batch": 6, "world": 2}]
    for changes in variants:
        assert measured(main, tmp_path, *flags, **changes) == first, changes


def test_pictures_of_a_checkpoint_follow_their_own_seed_alone() -> None:
    """And the place of the image; not what is in it, nor what was drawn before."""
    model = create_model("mae_vit_micro_patch4", img_size=16)
    masker = build_masker(STANDARD, model)
    images = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    first = draw_masks(images, masker, 0)
    torch.rand(5)
    assert torch.equal(draw_masks(images + 9, masker, 0), first)
    assert torch.equal(draw_masks(images[:2], masker, 0), first[:2])
    assert not torch.equal(draw_masks(images, masker, 1), first)
    assert len({tuple(row) for row in first.tolist()}) == 3


# ---- Every draw has an entry -------------------------------------------------------------------

# Streams of the tables above, and those that have tests of their own here.
HELD = {
    "order": "test_the_order_follows_seed_and_epoch_alone",
    "model": "test_a_draw_of_a_step_differs_wherever_it_is_drawn",
}
# Who draws from which stream; an entry added here needs one in a table above.
DRAWN_IN = {
    ("util/data/randomness.py", "order"),
    ("util/data/replace.py", "fallback"),
    ("engine_finetune.py", "model"),
    ("engine_segment.py", "model"),
    ("engine_pretrain.py", "mask"),  # a picture from Python: `test_a_picture_from_python_is...`
    ("lab/bench/step_speed.py", "mask"),  # a measurement of speed: any masks will do
}
# Where the stream is an argument of one's own, or another function is called `seeds_of`.
HANDED_ON = (
    "util/data/randomness.py", "util/data/samples.py", "lab/study/analysis.py",
    "util/runs/plan.py", "util/runs/arms.py", "util/yaml_values.py",
)  # fmt: skip
# Who draws from global generators: a main's first weights and, seeded for each sample, transforms.
FROM_GLOBAL = {
    "models_decoders.py": "the mix of a cross decoder at the start",
    "models_layers.py": "first weights", "models_encoder.py": "a head's first weights",
    "models_mmae.py": "first weights", "models_upernet.py": "first weights",
    "util/data/segmentation_transforms.py": "seeded by Samples",
    "plan_pretrain.py": "a rate beforehand", "plan_knn.py": "images of a plan",
    "plan_finetune.py": "a rate beforehand",
    "plan_segment.py": "a rate beforehand", "lab/bench/step_speed.py": "a measurement of speed",
    "lab/bench/limits.py": "a measurement of the machine",
    "models_vit.py": "class tokens at the start", "models_swin.py": "weights at the start",
    "models_simmim.py": "weights at the start",
    "models_vit_relative.py": "weights at the start",
    "lab/gpu/checks.py": "images to compare models on",
    "lab/gpu/attention.py": "numbers to attend to",
    "lab/bench/peers.py": "masks as the authors' code draws them",
}  # fmt: skip
GLOBAL_DRAWS = {
    "torch": {"rand", "randn", "randint", "randperm", "bernoulli", "multinomial", "normal",
              "rand_like", "randn_like", "randint_like"},
    "np": {"rand", "randn", "randint", "uniform", "normal", "beta", "permutation", "shuffle",
           "choice", "random"},
    "random": {"random", "randint", "uniform", "choice", "choices", "sample", "shuffle", "gauss"},
}  # fmt: skip
IN_PLACE = {"uniform_", "normal_", "exponential_", "bernoulli_", "random_", "trunc_normal_",
            "xavier_uniform_", "kaiming_normal_"}  # fmt: skip


Calls = list[tuple[str, list[str], ast.Call]]


@pytest.fixture(scope="module")
def calls() -> Calls:
    """Every call of the program: file, dotted name of what is called, and the call."""
    found = []
    for path in program_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                names, part = [], node.func
                while isinstance(part, ast.Attribute):
                    names.append(part.attr)
                    part = part.value
                names.append(part.id if isinstance(part, ast.Name) else "")
                found.append((path.relative_to(ROOT).as_posix(), names[::-1], node))
    return found


def test_every_stream_and_every_call_has_an_entry(calls: Calls) -> None:
    tabled = {draw.stream for draw in BY_SAMPLE.values()} | HELD.keys()
    assert tabled == STREAMS.keys(), "a stream without an entry in BY_SAMPLE or HELD"
    assert all(name in globals() for name in HELD.values())
    found = set()
    for at, names, call in calls:
        if names[-1] in ("derive_seed", "make_generator", "seeds_of") and len(call.args) > 1:
            stream = call.args[1]
            if isinstance(stream, ast.Constant):
                found.add((at, stream.value))
            else:  # a name that is handed through, or another function that is called so
                assert at in HANDED_ON, (at, call.lineno)
    assert found == DRAWN_IN


def test_nothing_else_draws_from_global_generators(calls: Calls) -> None:
    found: dict[str, list[int]] = {}
    for at, names, call in calls:
        given = any(keyword.arg == "generator" for keyword in call.keywords)
        drawn = names[-1] in GLOBAL_DRAWS.get(names[0], ()) and len(names) in (2, 3)
        if (drawn or names[-1] in IN_PLACE) and not given:
            found.setdefault(at, []).append(call.lineno)
    assert found.keys() == FROM_GLOBAL.keys(), found


def test_streams_of_one_key_are_apart() -> None:
    """A purpose with the number of another would draw the same."""
    keys = [(0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1)]
    seeds = [derive_seed(s, stream, *key) for s in (0, 1) for stream in STREAMS for key in keys]
    assert len(set(seeds)) == len(seeds)
