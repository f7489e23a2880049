"""Randomness as a function, not a state.

Whatever is random about a sample is a function of (seed, key), the key being (epoch, index, crop).
The sampler yields keys; workers hold no epoch and no generator. So a run draws the same numbers
with any number of workers, from any restart, and, at the same global batch, on any number of
processes.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

from util.errors import BadInput


class Key(NamedTuple):
    """Names one view of one image: which epoch, which image, which of its crops."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which no key needs
    crop: int = 0


# One stream per purpose, so that drawing more for one purpose changes nothing of another. These are
# numbered, and stay so; a purpose that is not among them has the hash of its name.
STREAMS = {"order": 0, "augment": 1, "mask": 2, "predict": 3, "shift": 4, "model": 5, "fallback": 6}


def stream_number(stream: str) -> int:
    """The number of a purpose's stream, below 2^32."""
    if stream in STREAMS:
        return STREAMS[stream]
    digest = hashlib.sha256(stream.encode()).digest()
    return len(STREAMS) + int.from_bytes(digest[:4], "big") % (2**32 - len(STREAMS))


def derive_seed(seed: int, stream: str, *key: int) -> int:
    """A 64-bit seed from (seed, stream, key), by numpy's SeedSequence."""
    sequence = np.random.SeedSequence([seed, stream_number(stream), *key])
    return int(sequence.generate_state(1, np.uint64)[0])


def derive_seeds(seed: int, streams: Sequence[str], keys: Sequence[Sequence[int]]) -> np.ndarray:
    """`derive_seed` of each stream and key at once: uint64 [streams, keys].

    SeedSequence takes 10 us for each, and a sample needs four. For many at once its arithmetic is
    cheaper on arrays: the same, for parts below 2**32, each one word.

    Source: numpy's SeedSequence, after M. O'Neill, "Developing a seed_seq alternative".
    """
    parts = np.array([(seed, 0, *key) for key in keys], dtype=np.uint64)  # [keys, parts]
    if len(keys) * len(streams) < FEW or parts.max() >= 2**32:
        rows = [[derive_seed(seed, stream, *key) for key in keys] for stream in streams]
        return np.array(rows, dtype=np.uint64)
    words = np.repeat(parts.astype(np.uint32)[None], len(streams), axis=0)
    words[:, :, 1] = np.array([stream_number(stream) for stream in streams])[:, None]
    words = words.reshape(-1, parts.shape[1])  # [streams * keys, parts]
    low, high = _seed_sequence(words)
    return (high.astype(np.uint64) << np.uint64(32) | low).reshape(len(streams), -1)


FEW = 16
POOL, SHIFT, WORD = 4, 16, 2**32 - 1
MIX = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)


def _hash(values: np.ndarray, constant: int, factor: int) -> tuple[np.ndarray, int]:
    """SeedSequence's hash of uint32, and the constant for the next one."""
    following = constant * factor & WORD
    hashed: np.ndarray = (values ^ np.uint32(constant)) * np.uint32(following)
    return np.bitwise_xor(hashed, np.right_shift(hashed, SHIFT)), following


def _seed_sequence(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Low and high word of each row's first uint64: uint32 [N, parts] to two uint32 [N]."""
    constant, factor = 0x43B0D7E5, 0x931E8875
    columns = [*words.T, *[np.zeros_like(words[:, 0])] * (POOL - words.shape[1])]
    pool = []
    for column in columns[:POOL]:
        hashed, constant = _hash(column, constant, factor)
        pool.append(hashed)
    # Stir the pool with itself, then with what is more than fits into it.
    for source in range(max(POOL, len(columns))):
        for target in range(POOL):
            if source != target:
                stirrer = pool[source] if source < POOL else columns[source]
                hashed, constant = _hash(stirrer, constant, factor)
                mixed: np.ndarray = pool[target] * MIX[0] - hashed * MIX[1]
                pool[target] = mixed ^ (mixed >> SHIFT)
    low, constant = _hash(pool[0], 0x8B51F9DD, 0x58F38DED)
    high, _ = _hash(pool[1], constant, 0x58F38DED)
    return low, high


def make_generator(seed: int, stream: str, *key: int) -> torch.Generator:
    """A torch CPU generator seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, stream, *key))


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed python's, numpy's and torch's CPU generators inside the block; restore them after.

    Args:
        device: a GPU whose generator is seeded too; that one is not restored.
    """
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.random.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device is not None and device.type == "mps":
        torch.mps.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])


class EpochSampler(Sampler[list[Key]]):
    """Micro-batches of keys for one process; each epoch a fresh permutation.

    Step s of an epoch takes the s-th `global_batch` entries of the permutation, whatever the number
    of processes and accumulation steps among which they are divided. The tail that fills no
    step is left out; another permutation leaves out others.

    With R crops per image, R epochs share a permutation: each takes the next R-th of it, R crops of
    each image, which stand side by side in one micro-batch, so that they share its decoding. An
    epoch is as many steps as without, and after R epochs each image has been taken R times.

    Args:
        num_samples: images in the set.
        batch_size: images per process and micro-step.
        accum_iter: micro-steps per optimiser step.
        world_size, rank: processes, and which this one is.
        seed: of the run.
        crops_per_image: R crops of each image that an epoch takes.

    Raises:
        BadInput: the set is smaller than one global batch, or R does not divide the batch size.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        accum_iter: int = 1,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        crops_per_image: int = 1,
    ) -> None:
        self.num_samples, self.seed, self.rank = num_samples, seed, rank
        self.crops = crops_per_image
        self.layout = (accum_iter, world_size, batch_size)
        self.global_batch = accum_iter * world_size * batch_size
        self.steps_per_epoch = num_samples // self.global_batch
        if self.steps_per_epoch == 0:
            raise BadInput(
                f"the training set has {num_samples} images, fewer than one global batch of "
                f"{self.global_batch} (batch_size {batch_size} x {world_size} processes x "
                f"accum_iter {accum_iter}); lower --batch_size or --accum_iter"
            )
        if batch_size % crops_per_image:
            raise BadInput(
                f"crops_per_decode {crops_per_image} does not divide batch_size {batch_size}, and "
                "the crops of an image stay in one batch; give a batch size that is a multiple "
                f"of {crops_per_image}, per process"
            )
        self.epoch, self.first_step = 0, 0

    def start(self, epoch: int, first_step: int = 0) -> None:
        """The next iteration is this epoch (from 0), from this step of it (from 0)."""
        self.epoch, self.first_step = epoch, first_step

    def order(self, epoch: int) -> np.ndarray:
        """The permutation that an epoch takes its images from: int64 [num_samples]."""
        generator = make_generator(self.seed, "order", epoch // self.crops)
        return torch.randperm(self.num_samples, generator=generator).numpy()

    def __iter__(self) -> Iterator[list[Key]]:
        return self.micro_batches(self.epoch, self.first_step, self.steps_per_epoch)

    def micro_batches(self, epoch: int, first_step: int, last_step: int) -> Iterator[list[Key]]:
        """This process's keys of an epoch, from one step of it to before another."""
        crops = self.crops
        images = self.global_batch // crops  # of a step
        first = epoch % crops * self.steps_per_epoch * images
        order = self.order(epoch)[first:]
        accum_iter, world_size, batch_size = self.layout
        for step in range(first_step, last_step):
            batch = order[step * images : (step + 1) * images]
            for micro_batches in batch.reshape(accum_iter, world_size, batch_size // crops):
                chosen = micro_batches[self.rank].tolist()
                yield [Key(epoch, index, crop) for index in chosen for crop in range(crops)]

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.first_step) * self.layout[0]


class IterationSampler(EpochSampler):
    """The same micro-batches for runs that count steps: from any step to any other, over epochs.

    Step s of the run is step s % steps_per_epoch of epoch s // steps_per_epoch, unless a resume
    placed the epochs elsewhere. Arguments and errors are `EpochSampler`'s.
    """

    last_step = first_epoch = origin = 0

    def place(self, epoch: int, step: int) -> None:
        """An epoch begins after `step` steps of the run, and the next ones follow it."""
        self.first_epoch, self.origin = epoch, step

    def between(self, first_step: int, last_step: int) -> None:
        """The next iteration is steps `first_step` to `last_step` - 1 of the run, from 0."""
        self.first_step, self.last_step = first_step, last_step

    def __iter__(self) -> Iterator[list[Key]]:
        length = self.steps_per_epoch
        begin, end = self.first_step - self.origin, self.last_step - self.origin
        for number in range(begin // length, -(-end // length)):
            start = number * length
            first, last = max(begin - start, 0), min(end - start, length)
            yield from self.micro_batches(self.first_epoch + number, first, last)

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.layout[0]


class EvalSampler(Sampler[list[Key]]):
    """The given images once each, in order, dealt out to the processes.

    No image is padded in or left out, so counts are exact for any number of processes.

    Args:
        indices: which images of the set.

    Attributes:
        total: images over all processes.
    """

    def __init__(
        self, indices: Sequence[int], batch_size: int, *, world_size: int = 1, rank: int = 0
    ) -> None:
        self.total = len(indices)
        self.indices, self.batch_size = indices[rank::world_size], batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [Key(0, i) for i in self.indices[start : start + self.batch_size]]

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)


def evenly(num_samples: int, limit: int) -> list[int]:
    """At most `limit` indices, evenly spaced: a listing by class gives a bit of each."""
    count = min(num_samples, limit)
    return [i * num_samples // count for i in range(count)]
