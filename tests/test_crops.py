"""Several crops of one decoded image: who is taken when, and that nothing else decides it."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import TINY, launch, wait
from runs import different, records, weights

from util.data.images import BadImage
from util.data.randomness import (
    STREAMS,
    EpochSampler,
    Key,
    derive_seed,
    derive_seeds,
    make_generator,
)
from util.data.samples import Drawn, Samples, build_loader
from util.data.transforms import PretrainTensorTransform, PretrainTransform
from util.errors import EXIT_STOPPED, BadInput
from util.mask.strategies import create_strategy
from util.train.agreement import Agreement, Wish

NUMBER = 50
# (processes, micro-steps, batch per process), all 12 images a step, every batch holds pairs
SPLITS = [(1, 1, 12), (3, 1, 4), (2, 3, 2), (1, 2, 6)]


def sampler(split=(1, 1, 12), crops=2, rank=0, number=NUMBER) -> EpochSampler:
    world, accum, batch = split
    return EpochSampler(
        number, batch, accum_iter=accum, world_size=world, rank=rank, seed=5, crops_per_image=crops
    )


def epoch_keys(epoch: int, **kwargs) -> list[Key]:
    taken = sampler(**kwargs)
    taken.start(epoch)
    return [key for batch in taken for key in batch]


# --- Seeds of many keys at once ---


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**40])
@pytest.mark.parametrize("count", [1, 3, 40])
def test_seeds_of_many_are_numpys(seed, count):
    rng = np.random.default_rng(count)
    keys = [Key(*(int(v) for v in rng.integers(0, 2**32, 3))) for _ in range(count)]
    keys[0] = Key(0, 0, 0)
    expected = [[derive_seed(seed, stream, *key) for key in keys] for stream in STREAMS]
    assert derive_seeds(seed, list(STREAMS), keys).tolist() == expected


@pytest.mark.parametrize("mask", ["random", "grid", "mixed"])
@pytest.mark.parametrize("count", [1, 5])
def test_noise_and_shift_are_those_of_generators_of_their_own(mask, count):
    """Drawn for a batch at once, bit for bit what each sample's own three generators give."""
    images = [(torch.zeros(3, 4, 4, dtype=torch.uint8), 0)] * 9
    strategy, grid = create_strategy(mask), (5, 7)
    draws = {"order": (35,), "shift": (2,), "another": (3, 2)}
    streams = {"order": "predict", "shift": "shift", "another": "draw another"}
    samples = Samples(images, lambda image: image, 3, Drawn(strategy, grid, draws))
    keys = [Key(2, index, index % 2) for index in range(count)]
    for key, sample in zip(keys, samples.__getitems__(keys), strict=True):
        rows = strategy.draw(grid, make_generator(3, "mask", *key))
        assert torch.equal(sample["noise"], rows)
        for name, stream in streams.items():
            expected = torch.rand(*draws[name], generator=make_generator(3, stream, *key)) - 0.5
            assert torch.equal(sample[name], expected)


# --- Keys ---


@pytest.mark.parametrize("crops", [2, 3, 4])
@pytest.mark.parametrize("start", [0, 7])
def test_every_image_is_taken_as_often_as_there_are_epochs(crops, start):
    """Over R epochs R times, and in each of them R times or not at all."""
    whole = 48  # of 50; the rest fills no step
    total: Counter = Counter()
    for epoch in range(start * crops, (start + 1) * crops):
        keys = epoch_keys(epoch, crops=crops)
        assert len(keys) == len(set(keys)) == whole
        images = Counter(key.index for key in keys)
        assert set(images.values()) == {crops} and len(images) == whole // crops
        assert {key.crop for key in keys} == set(range(crops))
        total += images
    assert len(total) == whole and set(total.values()) == {crops}
    following = {key.index for key in epoch_keys((start + 1) * crops, crops=crops)}
    assert following != {key.index for key in epoch_keys(start * crops, crops=crops)}


def test_one_crop_is_what_it_was():
    taken = sampler(crops=1)
    for epoch in (0, 3):
        expected = [Key(epoch, int(index)) for index in taken.order(epoch)[:48]]
        assert epoch_keys(epoch, crops=1) == expected


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_of_the_global_batch_takes_the_same(split):
    for epoch in (0, 1):
        by_rank = []
        for rank in range(split[0]):
            taken = sampler(split, rank=rank)
            taken.start(epoch)
            batches = list(taken)
            # Crops of an image stand side by side in one batch, so that one worker has them all.
            for batch in batches:
                assert [key.crop for key in batch] == [0, 1] * (len(batch) // 2)
                assert all(a.index == b.index for a, b in zip(batch[::2], batch[1::2], strict=True))
            by_rank.append([batches[i : i + split[1]] for i in range(0, len(batches), split[1])])
        steps = [
            sorted(key for micro in step for batch in micro for key in batch)
            for step in zip(*by_rank, strict=True)
        ]
        whole = epoch_keys(epoch)
        assert steps == [sorted(whole[i : i + 12]) for i in range(0, len(whole), 12)]


def test_a_start_in_the_middle_gives_the_tail():
    taken = sampler()
    taken.start(3)
    whole = list(taken)
    taken.start(3, 2)
    assert list(taken) == whole[2:] and len(taken) == len(whole) - 2


def test_a_batch_that_cannot_hold_whole_images_is_refused():
    with pytest.raises(BadInput, match=r"crops_per_decode 5 .* batch_size 12.*multiple of 5"):
        sampler(crops=5)


# --- Samples ---


class Counting:
    """Ten pictures; notes what is decoded; the third cannot be."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.asked.append(index)
        if index == 3:
            raise BadImage("3.jpg", "broken")
        pixels = np.random.default_rng(index).integers(0, 256, (3, 24, 20), np.uint8)
        return torch.from_numpy(pixels), index


def samples(transform=PretrainTensorTransform) -> Samples:
    return Samples(Counting(), transform((16, 12)), 3, Drawn(create_strategy("mixed"), (4, 3)))


@pytest.mark.parametrize("transform", [PretrainTensorTransform, PretrainTransform])
def test_a_batch_decodes_each_image_once_and_gives_the_samples_one_by_one(transform):
    keys = [Key(4, index, crop) for index in (5, 3, 8, 0, 9, 1) for crop in range(4)]
    data = samples(transform)
    batch = data.__getitems__(keys)
    asked = data.source.asked
    assert [asked.count(index) for index in (5, 8, 0, 9, 1)] == [1, 1, 1, 1, 1] or 3 in asked
    assert len(asked) == 7  # six and what takes the place of the broken one
    for key, sample in zip(keys, batch, strict=True):
        alone = samples(transform)[key]
        assert sample.keys() == alone.keys()
        for name, value in sample.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(alone[name])), (key, name)
    views = {tuple(sample["x"].flatten().tolist()) for sample in batch}
    assert len(views) == len(keys)  # another crop, another view
    assert [s["bad"][0].item() for s in batch if s["index"] == 3] == [3] * 4


@pytest.mark.parametrize("num_workers", [1, 2])
def test_samples_do_not_depend_on_workers(num_workers):
    def load(workers: int) -> list[dict]:
        taken = EpochSampler(10, 4, seed=3, crops_per_image=2)
        loader = build_loader(samples(), taken, num_workers=workers, pin_memory=False)
        batches = []
        for epoch, first in ((0, 0), (1, 1)):
            taken.start(epoch, first)
            batches += list(loader)
        return batches

    for a, b in zip(load(0), load(num_workers), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


# --- Runs ---

CROPS = [
    *TINY,
    "--mask=mixed",
    "--avg_temperature=1",
    "--pos_offset=jitter",
    "--crops_per_decode=2",
]


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in records(folder, "train")]


def test_a_run_of_several_crops_stops_and_goes_on_to_the_same_bits(run_main, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_main("main_pretrain", [*CROPS, f"--output_dir={whole}"])[0] == 0
    asked = []

    def stop(self, *args):
        asked.append(1)
        return Wish(save=False, stop=15 if len(asked) == 13 else 0)

    with monkeypatch.context() as patch:
        patch.setattr(Agreement, "after_step", stop)
        code = run_main("main_pretrain", [*CROPS, f"--output_dir={cut}"])[0]
    assert code == EXIT_STOPPED  # in the second epoch of three
    assert run_main("main_pretrain", [*CROPS, f"--output_dir={cut}", "--num_workers=1"])[0] == 0
    assert not different(weights(whole), weights(cut))
    assert losses(whole) == losses(cut)
    code, _, err = run_main("main_pretrain", [*CROPS[:-1], f"--output_dir={cut}"])
    assert code == 2 and "crops_per_decode: was 2, is 1" in err


@pytest.mark.dist
def test_two_processes_train_as_one(tmp_path):
    """30 steps in float32 at lr up to 2e-3 x 24 / 256: rounding alone, 1e-4 relative."""
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        flags = [f"--batch_size={24 // world}", f"--output_dir={folder}"]
        assert wait(launch([*CROPS, *flags], folder / "out", world)) == [0] * world
    one, two = (np.array(losses(tmp_path / str(world))) for world in (1, 2))
    assert len(one) == 30 and np.allclose(one, two, rtol=1e-4)
