"""From keys to batches: the sample of a data set, and the one loader."""

import multiprocessing.process
import multiprocessing.util
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate, get_worker_info

from util.data.loading import Loader
from util.data.randomness import Key, derive_seeds, seeded
from util.data.replace import bad_slots, decode
from util.data.source import Source
from util.errors import BadInput
from util.mask.strategies import MaskStrategy
from util.signals import STOP_SIGNALS, TERMINAL_SIGNALS
from util.spec import Shape

# Draws that have a numbered stream; any other has one by its name, which meets no other purpose's.
STREAM_OF_DRAW = {"order": "predict", "shift": "shift"}
# Names in a sample that no draw of a model can have.
TAKEN = {"x", "y", "noise", "index", "bad", "extent"}


class Drawn:
    """What a pretraining sample owes its model beside the image: random numbers, by name.

    Args:
        strategy: draws the noise of a mask.
        grid: that the noise is drawn over: the cells of a mask.
        draws: further random numbers that the model asks for: their shape.

    Raises:
        BadInput: a draw has a name that means something else.
    """

    def __init__(
        self, strategy: MaskStrategy, grid: Shape, draws: Mapping[str, Shape] | None = None
    ) -> None:
        self.strategy, self.grid, self.draws = strategy, grid, dict(draws or {})
        if taken := sorted(TAKEN & self.draws.keys()):
            raise BadInput(f"a model cannot draw {', '.join(taken)}: samples use that name")
        # Each has a stream of its own.
        self.streams = ["mask", *(STREAM_OF_DRAW.get(n, f"draw {n}") for n in self.draws)]

    def __call__(self, seeds: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Of a batch: noise float32 [B, S, cells], the draws [B, *shape] in [-1/2, 1/2).

        Args:
            seeds: of each stream, B of them.
        """
        # One generator, seeded anew for each draw, and few tensors: of images that need no
        # decoding this is a good part of the time.
        generator = torch.Generator()
        rows = [self.strategy.draw(self.grid, generator.manual_seed(seed)) for seed in seeds[0]]
        drawn = {"noise": torch.stack(rows)}
        for (name, shape), own in zip(self.draws.items(), seeds[1:], strict=True):
            values = torch.empty(len(own), *shape)
            for one, seed in zip(values, own, strict=True):
                one.uniform_(generator=generator.manual_seed(seed))
            drawn[name] = values.sub_(0.5)
        return drawn


class Samples(Dataset):
    """Transformed inputs with their targets, a function of (seed, key).

    Args:
        source: inputs and targets by index.
        transform: x to uint8 [C, *size], or, where it `takes_target`, x and y to a dict of tensors
            with both. It may use python's, numpy's and torch's generators, or, where it
            `takes_generator`, the one it is handed.
        seed: of the run; evaluation passes a constant of its own.
        drawn: what a pretraining model asks for beside them.

    A sample is a dict:
        x: uint8 [C, *size].
        y: the target of what is shown: int, or the label map of the transform.
        index: int, the key's.
        bad: int64 [4], images that could not be decoded on the way to this one, then -1.
        and what is `drawn`: noise float32 [S, cells], and the draws under their names.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[..., Any],
        seed: int,
        drawn: Drawn | None = None,
    ) -> None:
        self.source, self.transform, self.seed, self.drawn = source, transform, seed, drawn
        self.streams = ["augment", *(drawn.streams if drawn else ())]
        self.takes_target = getattr(transform, "takes_target", False)
        self.takes_generator = getattr(transform, "takes_generator", False)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[Key]) -> list[dict[str, Any]]:
        """The samples of a batch; neighbours that are crops of one image share its decoding."""
        augment, *others = derive_seeds(self.seed, self.streams, keys).tolist()
        drawn = self.drawn(others) if self.drawn else {}
        generator = torch.Generator()
        samples: list[dict[str, Any]] = []
        before, decoded, room = None, None, None
        for number, (key, seed) in enumerate(zip(keys, augment, strict=True)):
            image_key = key._replace(crop=0)
            if decoded is None or image_key != before:
                before, decoded = image_key, decode(self.source, image_key, self.seed)
            x, y, bad = decoded
            sample = self._transformed(x, y, seed, generator)
            if not self.takes_target:
                if room is None:
                    room = empty_batch(len(keys), sample["x"])
                if sample["x"].shape != room.shape[1:]:
                    raise BadInput(
                        f"{self.source.name} gives images of {tuple(sample['x'].shape)} and of "
                        f"{tuple(room.shape[1:])} (channels, sides) in one batch: image {key.index}"
                    )
                # At once, while it is in the cache; fresh tensors would all be in memory.
                sample["x"] = room[number].copy_(sample["x"])
            samples.append(
                {
                    **sample,
                    "index": key.index,
                    "bad": bad_slots(bad),
                    **{name: values[number] for name, values in drawn.items()},
                }
            )
        return samples

    def _transformed(self, x: Any, y: Any, seed: int, generator: torch.Generator) -> dict[str, Any]:
        if self.takes_generator:
            return {"x": self.transform(x, generator.manual_seed(seed)), "y": y}
        with seeded(seed):
            return self.transform(x, y) if self.takes_target else {"x": self.transform(x), "y": y}


def default_workers(processes_here: int) -> int:
    """Loading processes of each training process: its share of the usable cores, at most 10."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(10, max(1, (cores or 1) // processes_here))


def _init_worker(leaving: Tensor, worker: int) -> None:
    # Workers are the parallelism; threads inside them would fight each other for the cores.
    torch.set_num_threads(1)

    # A scheduler signals every process of a job, a terminal's Ctrl-C every process of the group.
    # The training process answers for its workers: one that died of the signal would take the run
    # down before it reached its checkpoint. Only when that process leaves, a signal of its own
    # ends them.
    def note(number: int, frame: Any) -> None:
        if leaving.item():
            os._exit(0)

    for number in (*STOP_SIGNALS, *TERMINAL_SIGNALS):
        signal.signal(number, note)

    # Nothing ends the workers of a training process that was killed. torch's own watch sees a fork
    # server live on, Python's usual parent of workers since 3.14, and would wait with it for ever.
    training = multiprocessing.process.parent_process()
    assert training is not None
    threading.Thread(target=_end_with, args=(training,), daemon=True).start()


def _end_with(process: multiprocessing.process.BaseProcess) -> None:
    process.join()
    os._exit(1)


def empty_batch(count: int, view: Tensor) -> Tensor:
    """Room for so many images [C, h, w], or clips, of one size and memory order.

    In a worker it is shared memory.

    Returns:
        uint8 [count, C, h, w], for `collate` to find again.
    """
    inner = view.ndim == 3 and view.stride(0) == 1 and view.shape[0] > 1  # channels innermost
    shape = (count, *(view.permute(1, 2, 0) if inner else view).shape)
    batch = torch.empty(0, dtype=view.dtype)
    if get_worker_info() is not None:  # as torch's own collate: the training process maps it
        storage = batch._typed_storage()._new_shared(count * view.numel(), device=batch.device)
        batch = batch.new(storage)
    batch = batch.resize_(shape)
    return batch.permute(0, 3, 1, 2) if inner else batch


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of samples; their images are not copied where `empty_batch` had room for them."""
    images = [sample["x"] for sample in samples]
    room = images[0]._base
    if (
        room is None
        or len(room) != len(images)
        or any(image._base is not room for image in images)
        or any(image.storage_offset() != i * room.stride(0) for i, image in enumerate(images))
    ):
        return default_collate(samples)
    batch = default_collate([{k: v for k, v in s.items() if k != "x"} for s in samples])
    inner = images[0].ndim == 3 and images[0].stride() != room[0].stride()
    return batch | {"x": room.permute(0, 3, 1, 2) if inner else room}


def build_loader(
    samples: Dataset,
    sampler: Sampler[list[Key]],
    *,
    num_workers: int,
    pin_memory: bool,
    prefetch_factor: int = 2,
) -> Loader:
    """The loader of every job: batches of the keys that the sampler yields.

    Args:
        num_workers: processes that load, per training process; 0 loads in this one.
        pin_memory: page-locked batches, for copies to a GPU that do not block.
        prefetch_factor: batches that each worker has ready or in the making.
    """
    leaving = torch.zeros(1, dtype=torch.uint8).share_memory_()
    # Before multiprocessing ends its children by SIGTERM and waits for them.
    multiprocessing.util.Finalize(None, leaving.fill_, args=(1,), exitpriority=100)
    return Loader(
        samples,
        collate,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        prefetch_factor=prefetch_factor if num_workers else None,
        worker_init_fn=partial(_init_worker, leaving),
        # Its own generator: the loader's base seed must not advance torch's global one.
        generator=torch.Generator().manual_seed(0),
    )
