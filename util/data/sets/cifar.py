"""CIFAR-10 and CIFAR-100 by torchvision, which checks their sums before it unpickles them."""

from pathlib import Path

import numpy as np
import torchvision
from torchvision.datasets.utils import check_integrity

from util.data.images import PathLike
from util.data.source import ArraySource, Source
from util.errors import BadInput

READERS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}
STATS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


def cifar10(split: str, data_path: PathLike | None) -> Source:
    """CIFAR-10, 32x32 RGB: 50,000 to train, the 10,000 of its test set as val; see `cifar`."""
    return cifar("cifar10", split, data_path)


def cifar100(split: str, data_path: PathLike | None) -> Source:
    """CIFAR-100, 32x32 RGB, its 100 fine labels; see `cifar`."""
    return cifar("cifar100", split, data_path)


def cifar(name: str, split: str, data_path: PathLike | None) -> Source:
    """Read from `data_path` or ./data, or downloaded by torchvision into it where it is missing.

    `data_path` holds cifar-10-batches-py or cifar-100-python, or is that folder.
    """
    reader = getattr(torchvision.datasets, READERS[name])
    root = Path("data" if data_path is None else data_path).expanduser()
    if root.name == reader.base_folder:
        root = root.parent
    folder = root / reader.base_folder
    found = folder.is_dir()
    try:
        data = reader(str(root), train=split == "train", download=not found)
    except (OSError, RuntimeError) as error:
        problem = f"no {folder}, and its download failed ({error})"
        if found:
            files = reader.train_list + reader.test_list
            files = [*files, [reader.meta["filename"], reader.meta["md5"]]]
            bad = [file for file, md5 in files if not check_integrity(str(folder / file), md5)]
            problem = f"in {folder} these are missing or not the published files: {', '.join(bad)}"
        raise BadInput(
            f"{problem}; give --data_path FOLDER with the {reader.base_folder} of {reader.url}"
        ) from error
    labels = np.array(data.targets, dtype=np.int64)
    return ArraySource(name, split, (data.data, labels), STATS[name], data.classes)
