"""Randomness as a function of (seed, key): seeds, samplers, samples, and the loader around them."""

import hashlib
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from util.data.randomness import (
    STREAMS,
    EpochSampler,
    EvalSampler,
    Key,
    derive_seed,
    evenly,
    make_generator,
    seeded,
    stream_number,
)
from util.data.samples import Drawn, Samples, build_loader, default_workers
from util.data.transforms import PretrainTransform
from util.errors import BadInput
from util.mask.strategies import create_strategy

GRID = (4, 3)


# --- Seeds ---


def draw_from_all() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), torch.rand(()).item()


def global_states() -> tuple[object, list, list]:
    """States of python's, numpy's and torch's global generators, comparable by ==."""
    name, words, *rest = np.random.get_state()
    numpys = [name, words.tolist(), *rest]
    return random.getstate(), numpys, torch.random.get_rng_state().tolist()


@pytest.mark.parametrize("seed", [0, 17, 2**32, 2**64 - 1])
def test_seeded_is_the_seed_inside_and_leaves_no_trace(seed):
    before = global_states()
    with seeded(seed):
        first = draw_from_all()
    assert global_states() == before
    draw_from_all()  # unrelated use moves the global generators on
    with seeded(seed):
        assert draw_from_all() == first
    with seeded((seed + 1) % 2**64):
        assert not set(draw_from_all()) & set(first)


def test_seeded_restores_after_an_error():
    before = global_states()
    with pytest.raises(KeyError), seeded(3):
        draw_from_all()
        raise KeyError
    assert global_states() == before


def test_seeds_are_what_they_were():
    # A change of these numbers changes every run: it belongs into CHANGELOG as 'numbers change'.
    assert derive_seed(0, "order", 0) == 15793235383387715774
    assert derive_seed(0, "augment", 0, 0, 0) == 3061595112526229754
    assert derive_seed(1, "mask", 3, 141, 0) == 3509385491889240289
    assert derive_seed(2**40, "model", 7, 1, 2) == 14465978511119435104
    assert make_generator(42, "order", 799).initial_seed() == 10095622830850293880


def test_stream_numbers_stay():
    # New streams get new numbers; taking another's would give both the same draws.
    assert len(set(STREAMS.values())) == len(STREAMS)
    known = ["order", "augment", "mask", "predict", "shift", "model", "fallback"]
    assert [STREAMS[name] for name in known] == list(range(7))


def test_seeds_differ_in_every_part():
    keys = [(e, i, c) for e in range(6) for i in range(40) for c in range(2)]
    seeds = [derive_seed(s, name, *key) for s in (0, 1) for name in STREAMS for key in keys]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_a_stream_of_ones_own_has_the_number_of_its_name():
    # sha256 of the name, by hand; these too stay, for runs of plugins.
    digest = int.from_bytes(hashlib.sha256(b"draw colour").digest()[:4], "big")
    number = 7 + digest % (2**32 - 7)
    assert stream_number("draw colour") == number == 68923399
    sequence = np.random.SeedSequence([5, number, 1, 2, 3])
    assert derive_seed(5, "draw colour", 1, 2, 3) == sequence.generate_state(1, np.uint64)[0]
    names = [f"draw {i}" for i in range(2000)]
    assert min(map(stream_number, names)) > max(STREAMS.values())
    assert len({stream_number(name) for name in names}) == len(names)


def test_streams_and_neighbouring_keys_are_independent():
    # First draws of 400 keys, per stream and for two seeds and two epochs: no two series correlate.
    series = [
        [torch.rand((), generator=make_generator(s, name, e, i, 0)).item() for i in range(400)]
        for name in STREAMS
        for s, e in ((0, 0), (0, 1), (1, 0))
    ]
    correlation = np.corrcoef(series) - np.eye(len(series))
    assert np.abs(correlation).max() < 4.5 / np.sqrt(400)
    assert np.abs(np.mean(series, axis=1) - 0.5).max() < 4.5 * np.sqrt(1 / 12 / 400)


# --- Training order ---

# (processes, micro-steps, batch per process): all of them 12 images a step
SPLITS = [(1, 1, 12), (2, 1, 6), (3, 2, 2), (1, 4, 3)]
NUMBER = 101


def micro_batches(
    split: tuple[int, int, int], epoch: int, first_step: int = 0, seed: int = 5
) -> list[list[list[list[Key]]]]:
    """[step][rank][micro-step] -> keys of one epoch, from all processes."""
    world, accum, batch = split
    by_rank = []
    for rank in range(world):
        sampler = EpochSampler(
            NUMBER, batch, accum_iter=accum, world_size=world, rank=rank, seed=seed
        )
        sampler.start(epoch, first_step)
        batches = list(sampler)
        assert len(batches) == len(sampler) == (8 - first_step) * accum
        assert {len(keys) for keys in batches} == {batch}
        by_rank.append([batches[i : i + accum] for i in range(0, len(batches), accum)])
    return [list(step) for step in zip(*by_rank, strict=True)]


def global_batches(*args, **kwargs) -> list[list[Key]]:
    """[step] -> the sorted keys of a step, from all processes and micro-steps."""
    return [
        sorted(key for rank in step for keys in rank for key in keys)
        for step in micro_batches(*args, **kwargs)
    ]


@pytest.mark.parametrize("split", SPLITS)
def test_an_epoch_takes_each_image_at_most_once(split):
    for epoch in (0, 3):
        keys = [key for step in global_batches(split, epoch) for key in step]
        assert len(keys) == 96  # the tail of 101 fills no step
        assert {(key.epoch, key.crop) for key in keys} == {(epoch, 0)}
        indices = {key.index for key in keys}
        assert len(indices) == 96 and indices <= set(range(NUMBER))


@pytest.mark.parametrize("split", SPLITS[1:])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_split_of_the_global_batch_takes_the_same_images(split, epoch):
    assert global_batches(split, epoch) == global_batches(SPLITS[0], epoch)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("first_step", [1, 5, 7])
def test_a_start_in_the_middle_gives_the_tail_of_the_epoch(split, first_step):
    whole = micro_batches(split, epoch=2)
    assert micro_batches(split, 2, first_step) == whole[first_step:]


def test_every_epoch_and_seed_is_another_permutation():
    sampler = EpochSampler(NUMBER, 12, seed=5)
    orders = [sampler.order(epoch) for epoch in range(20)]
    orders += [EpochSampler(NUMBER, 12, seed=seed).order(0) for seed in (6, 7)]
    assert all(sorted(order) == list(range(NUMBER)) for order in orders)
    drawn = torch.randperm(NUMBER, generator=make_generator(5, "order", 3))
    assert orders[3].tolist() == drawn.tolist()
    assert len({tuple(order) for order in orders}) == len(orders)
    # Epochs leave out different images, so none is left out for ever.
    assert set.intersection(*(set(order[96:]) for order in orders[:3])) == set()
    # No two are alike in part, either: they agree in about one place of 101.
    assert max((a == b).sum() for i, a in enumerate(orders) for b in orders[:i]) < 9


def test_the_order_does_not_depend_on_what_else_was_drawn():
    first = global_batches(SPLITS[0], 4)
    sampler = EpochSampler(NUMBER, 12, seed=5)
    for epoch in (0, 9, 4):
        sampler.start(epoch)
        with seeded(epoch):
            batches = list(sampler)
    assert [sorted(keys) for keys in batches] == first
    before = global_states()
    list(sampler)
    assert global_states() == before


def test_a_set_smaller_than_a_global_batch_is_refused_with_its_numbers():
    with pytest.raises(BadInput) as error:
        EpochSampler(23, 2, accum_iter=4, world_size=3)
    message = str(error.value)
    assert "23 images" in message and "global batch of 24" in message
    assert "batch_size 2 x 3 processes x accum_iter 4" in message and "--batch_size" in message
    assert EpochSampler(24, 2, accum_iter=4, world_size=3).steps_per_epoch == 1


# --- Evaluation order ---


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("indices", [range(10), [7, 3, 5, 9, 1], range(2)])
def test_evaluation_takes_every_image_exactly_once(world, indices):
    seen = []
    for rank in range(world):
        sampler = EvalSampler(indices, 4, world_size=world, rank=rank)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert all(0 < len(keys) <= 4 for keys in batches)
        seen += [key for keys in batches for key in keys]
    assert sorted(seen) == sorted(Key(0, i, 0) for i in indices)
    if world == 1:
        assert [key.index for key in seen] == list(indices)


def test_evenly_spaces_at_most_so_many_indices():
    assert evenly(10, 5) == [0, 2, 4, 6, 8]
    assert evenly(10, 4) == [0, 2, 5, 7]
    assert evenly(3, 8) == [0, 1, 2]
    for number, limit in ((100, 7), (17, 16), (16, 16), (1, 1)):
        chosen = evenly(number, limit)
        assert len(chosen) == min(number, limit) and set(chosen) <= set(range(number))
        steps = {b - a for a, b in pairwise(chosen)}
        assert steps <= {number // limit, -(-number // limit)}


# --- Samples ---


class Pictures:
    """Ten noisy uint8 images [3, 24, 20], labels 0 to 2."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        pixels = np.random.default_rng(index).integers(0, 256, (3, 24, 20), np.uint8)
        return torch.from_numpy(pixels), index % 3


class AllGenerators:
    """MAE's crop and flip, then a brightness from numpy and a channel order from python."""

    def __init__(self) -> None:
        self.crop = PretrainTransform((16, 12))

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        image = self.crop(image) // np.random.randint(1, 4)
        return image[random.sample(range(3), 3)]


class Wasteful(AllGenerators):
    """Draws more than its like, as another augmentation would."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        draw_from_all()
        return super().__call__(image)


# What M-MAE draws, and what a model of a user's could.
DRAWS = {"shift": (2,), "order": (12,), "mask": (), "colour of a user": (3, 4)}


def samples(mask: str = "mixed", transform=None, seed: int = 3) -> Samples:
    return Samples(
        Pictures(), transform or AllGenerators(), seed, Drawn(create_strategy(mask), GRID, DRAWS)
    )


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(torch.as_tensor(a[name]), torch.as_tensor(b[name])) for name in a
    )


def collect(loader: DataLoader) -> list[dict]:
    """One dict per sample, in the loader's order."""
    return [
        {name: values[i] for name, values in batch.items()}
        for batch in loader
        for i in range(len(batch["index"]))
    ]


@pytest.mark.parametrize(("mask", "rows"), [("random", 1), ("mixed", 2), ("block", 1), ("grid", 1)])
def test_a_sample_holds_what_the_contract_says(mask, rows):
    sample = samples(mask)[Key(0, 7)]
    assert sample.keys() == {"x", "noise", "y", "index", "bad", *DRAWS}
    assert sample["x"].dtype == torch.uint8 and sample["x"].shape == (3, 16, 12)
    assert sample["noise"].dtype == torch.float32 and sample["noise"].shape == (rows, 12)
    for name, shape in DRAWS.items():
        assert sample[name].dtype == torch.float32 and sample[name].shape == shape, name
        assert sample[name].min() >= -0.5 and sample[name].max() < 0.5, name
    assert (sample["y"], sample["index"]) == (1, 7)
    assert sample["bad"].tolist() == [-1] * 4


def test_a_sample_is_a_function_of_seed_and_key():
    keys = [Key(e, i, c) for e in (0, 1) for i in range(10) for c in (0, 1)]
    first = {key: samples()[key] for key in keys}
    with seeded(123):
        draw_from_all()
        again = samples()
        for key in reversed(keys):
            assert same(again[key], first[key]), key
    for name in ("x", "noise", *DRAWS):
        values = {tuple(sample[name].flatten().tolist()) for sample in first.values()}
        assert len(values) == len(keys), name
    other = samples(seed=4)[keys[0]]
    for name in ("x", "noise", *DRAWS):
        assert not torch.equal(other[name], first[keys[0]][name]), name


def test_noise_and_shift_do_not_depend_on_the_augmentation_nor_it_on_the_mask():
    for key in (Key(0, 2), Key(5, 2, 1)):
        plain, wasteful = samples()[key], samples(transform=Wasteful())[key]
        assert not torch.equal(plain["x"], wasteful["x"])
        assert torch.equal(plain["noise"], wasteful["noise"])
        assert all(torch.equal(plain[name], wasteful[name]) for name in DRAWS)
        for mask in ("random", "block", "grid", "average"):
            other = samples(mask)[key]
            assert torch.equal(other["x"], plain["x"]), mask
            assert all(torch.equal(other[name], plain[name]) for name in DRAWS), mask
    # What draws a mask outside of a loader gets the same one.
    drawn = create_strategy("mixed").draw(GRID, make_generator(3, "mask", *Key(0, 2)))
    assert torch.equal(drawn, samples("mixed")[Key(0, 2)]["noise"])
    # Mixed draws as random does, first; the decoder's order is another.
    plain, mixed = samples("random")[Key(0, 2)], samples("mixed")[Key(0, 2)]
    assert torch.equal(plain["noise"][0], mixed["noise"][0])
    assert not torch.equal(plain["noise"][0] - 0.5, plain["order"])


def test_shifts_are_uniform_over_a_patch():
    data = samples()
    shifts = torch.stack([data[Key(e, i)]["shift"] for e in range(60) for i in range(10)])
    assert -0.5 <= shifts.min() < -0.48 and 0.48 < shifts.max() < 0.5
    assert shifts.mean(dim=0).abs().max() < 4 * (1 / 12 / 600) ** 0.5


# --- The loader ---


def load(num_workers: int, *, context: str | None = None) -> list[dict]:
    """Epochs 0 and 1, the second from its second step, through one loader."""
    sampler = EpochSampler(10, 3, seed=3)
    loader = build_loader(samples(), sampler, num_workers=num_workers, pin_memory=False)
    if context is not None:
        loader.multiprocessing_context = context
    loaded = []
    for epoch, first_step in ((0, 0), (1, 1)):
        sampler.start(epoch, first_step)
        assert len(loader) == 3 - first_step
        loaded += collect(loader)
    return loaded


@pytest.fixture(scope="module")
def expected() -> list[dict]:
    """What every loader must give: the samples one by one."""
    sampler, data = EpochSampler(10, 3, seed=3), samples()
    taken = [(0, index) for index in sampler.order(0)[:9]]
    taken += [(1, index) for index in sampler.order(1)[3:9]]
    return [data[Key(epoch, int(index))] for epoch, index in taken]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_samples_do_not_depend_on_workers(num_workers, expected):
    with seeded(7 + num_workers):
        loaded = load(num_workers)
    assert len(loaded) == len(expected) == 15
    assert all(same(a, b) for a, b in zip(loaded, expected, strict=True))


def test_samples_are_the_same_in_a_fresh_interpreter(expected):
    # A spawned worker inherits no generator and no hash seed.
    loaded = load(1, context="spawn")
    assert all(same(a, b) for a, b in zip(loaded, expected, strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_leaves_the_global_generators_alone(num_workers):
    before = global_states()
    load(num_workers)
    assert global_states() == before


def test_evaluation_loads_every_image_once():
    sampler = EvalSampler(range(10), 4)
    loader = build_loader(samples(), sampler, num_workers=0, pin_memory=False)
    batches = list(loader)
    assert [batch["index"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert batches[0]["x"].dtype == torch.uint8


def test_default_workers_share_the_cores():
    assert default_workers(10**6) == 1
    assert 1 <= default_workers(2) <= default_workers(1) <= 10
