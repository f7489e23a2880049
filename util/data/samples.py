"""From keys to batches: the sample of a data set, and the one loader."""

import multiprocessing.util
import os
import signal
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate, get_worker_info

from util.data.loading import Loader
from util.data.randomness import Key, seed_of, seeded, seeds_of
from util.data.replace import Source, bad_slots, decode
from util.errors import BadInput
from util.mask.strategies import MaskStrategy
from util.signals import STOP_SIGNALS
from util.spec import Shape

# Draws that have a numbered stream; any other has one by its name, which meets no other purpose's.
STREAM_OF_DRAW = {"order": "predict", "shift": "shift"}
# Names in a sample that no draw of a model can have.
TAKEN = {"image", "noise", "label", "index", "bad"}


class PretrainSamples(Dataset):
    """Augmented images with the noise of their masks, a function of (seed, key).

    Args:
        source: images by index.
        transform: image to uint8 [C, *size]; may use python's, numpy's and torch's generators, or,
            where it `takes_generator`, the one it is handed.
        strategy: draws the noise of a mask.
        grid: that the noise is drawn over: the cells of a mask.
        seed: of the run; evaluation passes a constant of its own.
        draws: further random numbers that the model asks for, by name: their shape.

    A sample is a dict:
        image: uint8 [C, *size].
        noise: float32 [S, cells], the strategy's rows.
        label: int, of the image that is shown.
        index: int, the key's.
        bad: int64 [4], images that could not be decoded on the way to this one, then -1.
        and the draws under their names: float32, uniform in [-1/2, 1/2).

    Raises:
        BadInput: a draw has a name that means something else.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[..., Tensor],
        strategy: MaskStrategy,
        grid: Shape,
        seed: int,
        draws: Mapping[str, Shape] | None = None,
    ) -> None:
        self.source, self.transform, self.strategy = source, transform, strategy
        self.grid, self.seed, self.draws = grid, seed, dict(draws or {})
        if taken := sorted(TAKEN & self.draws.keys()):
            raise BadInput(f"a model cannot draw {', '.join(taken)}: samples use that name")
        # Each draw has a stream of its own.
        own = [STREAM_OF_DRAW.get(name, f"draw {name}") for name in self.draws]
        self.streams = ["augment", "mask", *own]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[Key]) -> list[dict[str, Any]]:
        """The samples of a batch; neighbours that are crops of one image share its decoding."""
        augment, mask, *others = seeds_of(self.seed, self.streams, keys).tolist()
        noise = self._noise(mask)
        drawn = self._drawn(others)
        generator = torch.Generator()
        samples: list[dict[str, Any]] = []
        before, decoded, images = None, None, None
        for number, (key, seed) in enumerate(zip(keys, augment, strict=True)):
            image_key = key._replace(crop=0)
            if decoded is None or image_key != before:
                before, decoded = image_key, decode(self.source, image_key, self.seed)
            image, label, bad = decoded
            view = self._augment(image, seed, generator)
            if images is None:
                images = empty_batch(len(keys), view)
            # At once, while it is in the cache; a batch of fresh tensors would all be in memory.
            images[number].copy_(view)
            samples.append(
                {
                    "image": images[number],
                    "noise": noise[number],
                    "label": label,
                    "index": key.index,
                    "bad": bad_slots(bad),
                    **{name: values[number] for name, values in drawn.items()},
                }
            )
        return samples

    def _augment(self, image: Any, seed: int, generator: torch.Generator) -> Tensor:
        if getattr(self.transform, "takes_generator", False):
            return self.transform(image, generator.manual_seed(seed))
        with seeded(seed):
            return self.transform(image)

    # One generator, seeded anew for each draw, and few tensors: of images that need no decoding
    # this is a good part of the time.

    def _noise(self, seeds: list[int]) -> Tensor:
        """Of the masks: [B, S, cells]."""
        generator = torch.Generator()
        return torch.stack(
            [self.strategy.draw(self.grid, generator.manual_seed(seed)) for seed in seeds]
        )

    def _drawn(self, seeds: list[list[int]]) -> dict[str, Tensor]:
        """The model's draws by name, [B, *shape], each with its seeds."""
        generator = torch.Generator()
        drawn = {}
        for (name, shape), own in zip(self.draws.items(), seeds, strict=True):
            values = torch.empty(len(own), *shape)
            for one, seed in zip(values, own, strict=True):
                one.uniform_(generator=generator.manual_seed(seed))
            drawn[name] = values.sub_(0.5)
        return drawn


class LabelledSamples(Dataset):
    """Images with their labels, a function of (seed, key).

    Args:
        source: images by index.
        transform: image to uint8 [C, H, W]; may use python's, numpy's and torch's generators.
        seed: of the run; evaluation passes a constant of its own.

    A sample is a dict:
        image: uint8 [C, H, W].
        label: int, of the image that is shown.
        index: int, the key's.
        bad: int64 [4], images that could not be decoded on the way to this one, then -1.
    """

    def __init__(self, source: Source, transform: Callable[[Any], Tensor], seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        with seeded(seed_of(self.seed, "augment", *key)):
            image, label, bad = decode(self.source, key, self.seed)
            image = self.transform(image)
        return {"image": image, "label": label, "index": key.index, "bad": bad_slots(bad)}


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

    for number in (*STOP_SIGNALS, signal.SIGINT):
        signal.signal(number, note)


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
    images = [sample["image"] for sample in samples]
    room = images[0]._base
    if (
        room is None
        or len(room) != len(images)
        or any(image._base is not room for image in images)
        or any(image.storage_offset() != i * room.stride(0) for i, image in enumerate(images))
    ):
        return default_collate(samples)
    batch = default_collate([{k: v for k, v in s.items() if k != "image"} for s in samples])
    inner = images[0].ndim == 3 and images[0].stride() != room[0].stride()
    return batch | {"image": room.permute(0, 3, 1, 2) if inner else room}


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
