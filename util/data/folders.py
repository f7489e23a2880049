"""Files on disk, and the layouts of folders that are data sets."""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from util.console import counted
from util.data.images import IMAGENET_MEAN, IMAGENET_STD, PathLike, raising_bad_image, read_image
from util.data.jpeg import read_pixels
from util.data.listing import Listing, Names, list_images
from util.data.pixel_limits import open_at_once
from util.data.source import Source
from util.endings import count_unread, is_hidden, readable_endings, unread_endings
from util.errors import BadInput
from util.progress import say_once


class FolderSource(Source):
    """Files on disk, decoded when asked for; statistics are ImageNet's.

    Args:
        name, split: as given to `build_dataset`.
        root: folder of the files.
        files: N paths relative to root.
        labels: int32 [N].
        classes: names of the labels.
    """

    eval_margin = True

    def __init__(
        self,
        name: str,
        split: str,
        root: Path,
        files: Names,
        labels: np.ndarray,
        classes: list[str],
    ) -> None:
        super().__init__(name, split, IMAGENET_MEAN, IMAGENET_STD, classes)
        self.root, self.files, self.labels = root, files, labels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image | Tensor, int]:
        read = read_image if self.decoder == "pil" else read_pixels
        image = read(self.file_name(index), self.channels, max_pixels=self.max_pixels)
        return image, int(self.labels[index])

    def encoded(self, index: int) -> tuple[bytes, int]:
        path = self.file_name(index)
        with raising_bad_image(path), open_at_once(path, self.max_pixels) as file:
            return file.read(), int(self.labels[index])

    def file_name(self, index: int) -> str:
        return os.path.join(self.root, self.files[index])


# ---- Layouts -----------------------------------------------------------------------------------

SPLITS = ("train", "val")
LAYOUT = (
    "DATA/train/<class>/*.jpeg and DATA/val/<class>/*.jpeg; DATA/<class>/*.jpeg; or images without "
    "classes, DATA/*.jpeg or DATA/train/*.jpeg; and --data_path DATA"
)
# Names by which other programs call their splits: training, valid, train2017, test_images.
SPLIT_NAME = re.compile(
    r"(train|val|valid|test)(ing|idation)?([-_. ]?(set|data|images|split|[0-9]+))*", re.IGNORECASE
)


class NoSplit(BadInput):
    """The data set is there, and has no images of that split.

    Attributes:
        what: is missing; the message says what a run can do about it, too.
    """

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(what, advice)
        self.what = what

    def __str__(self) -> str:
        return ", ".join(self.args)


def imagefolder(split: str, data_path: PathLike | None) -> Source:
    """A folder of images as people have them; sub-folders are searched. One line says what it is.

    DATA/train/<class>/* and DATA/val/<class>/*, ImageNet's layout; DATA/<class>/* alone, which is
    a training set; or images without class folders in DATA or in DATA/train and DATA/val, which
    have no labels.

    Raises:
        BadInput: no folder, no images, or folders that can be meant in two ways.
        NoSplit: there is no val/.
    """
    if data_path is None:
        raise BadInput(f"the data set imagefolder needs a folder, and none was given: {LAYOUT}")
    data = Path(data_path).expanduser()
    if not data.is_dir():
        raise BadInput(f"no folder {data}; expected {LAYOUT}")
    root = data / split
    if root.is_dir():
        listing = list_images(root)
        labelled = bool(len(listing.files)) or not len(listing.loose)
        if not labelled and split == "train":
            refuse_class_named_train(data)
    else:
        root = whole_folder(data, split)
        listing = without_empty(list_images(root))
        labelled = not len(listing.loose)
        refuse_other_splits(root, listing.classes)
    say_left_out(root, listing)
    if labelled:
        return labelled_source("imagefolder", split, root, listing, LAYOUT)
    return unlabelled_source("imagefolder", split, root, listing)


def whole_folder(data: Path, split: str) -> Path:
    """DATA itself, which is a training set where it has neither train/ nor val/.

    Raises:
        BadInput: it has val/ alone. NoSplit: it is asked for val.
    """
    if split == "train" and not (data / "val").is_dir():
        return data
    similar = [name for name in folders_in(data) if is_split(name) and name not in SPLITS]
    hint = f"; if {similar[0]}/ is it, rename it to {split}/" if similar else ""
    if split == "train":
        raise BadInput(f"no folder {data / split}{hint}; expected {LAYOUT}")
    raise NoSplit(
        f"no val/ in {data}",
        f"so nothing is held out{hint}; --val_fraction .1 holds images of train out, or move some "
        f"into {data / 'val'}",
    )


def is_split(name: str) -> bool:
    """Whether a folder is a split by its name, and no class."""
    return SPLIT_NAME.fullmatch(name) is not None


def folders_in(root: Path) -> list[str]:
    """Names of the sub-folders, without hidden ones; none where they cannot be listed."""
    try:
        return sorted(p.name for p in root.iterdir() if not is_hidden(p.name) and p.is_dir())
    except OSError:
        return []


def without_empty(listing: Listing) -> Listing:
    """The listing without sub-folders that hold no image: annotations, for example."""
    holding = {listing.classes[label] for label in np.unique(listing.labels)}
    holding |= {name.partition("/")[0] for name in listing.unread}
    kept = [label for label, name in enumerate(listing.classes) if name in holding]
    labels = np.searchsorted(kept, listing.labels).astype(np.int32)
    return replace(listing, labels=labels, classes=[listing.classes[label] for label in kept])


def refuse_other_splits(root: Path, classes: Sequence[str]) -> None:
    """See that no sub-folder of a whole folder is a split by another name.

    Raises:
        BadInput: one is: test images must not be trained on as a class.
    """
    if splits := [name for name in classes if is_split(name)]:
        raise BadInput(
            f"{root} has no train/ but {', '.join(f'{name}/' for name in splits[:5])}, by the name "
            "a split and no class; rename them to train/ and val/, or give one of them as "
            f"--data_path; if they are classes, move all class folders into {root / 'train'}"
        )


def refuse_class_named_train(data: Path) -> None:
    """See that DATA/train, which holds images and no class folders, is no class beside others.

    Raises:
        BadInput: there is no val/, but other folders with images directly in them.
    """
    if (data / "val").is_dir():
        return
    beside = [n for n in folders_in(data) if not is_split(n) and holds_images(data / n)]
    if beside:
        raise BadInput(
            f"{data / 'train'} holds images and no class folders: is it the training split, or a "
            f"class beside {', '.join(beside[:3])}? For the first give --data_path "
            f"{data / 'train'}, for the second move all class folders into {data / 'train'}"
        )


def holds_images(folder: Path) -> bool:
    """Whether there are images directly in a folder."""
    endings = readable_endings()
    try:
        return any(file.name.lower().endswith(endings) for file in folder.iterdir())
    except OSError:
        return False


def folder_by_class(name: str, split: str, root: Path, layout: str) -> FolderSource:
    """The images of ROOT/<class>/; sub-folders are searched.

    Args:
        layout: what was expected and which flag gives it, for the message.

    Raises:
        BadInput: no such folder, no class folders, or some without an image.
    """
    if not root.is_dir():
        raise BadInput(f"no folder {root}; expected {layout}")
    listing = list_images(root)
    say_left_out(root, listing)
    return labelled_source(name, split, root, listing, layout)


def labelled_source(
    name: str, split: str, root: Path, listing: Listing, layout: str
) -> FolderSource:
    """The images in class folders; those beside the folders belong to no class and are left out.

    Raises:
        BadInput: no class folders, or some without an image.
    """
    present = set(np.unique(listing.labels).tolist())
    empty = [name for label, name in enumerate(listing.classes) if label not in present]
    if empty or not listing.classes:
        problem = f"no images in {root}"
        if len(listing.loose):
            problem = f"{root} has no class folders"
        elif empty:
            more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
            problem = f"no image in the class folders {', '.join(empty[:5])}{more} of {root}"
        lacking = "".join(f"; {text}" for text in count_unread(listing.unread))
        endings = ", ".join(readable_endings())
        raise BadInput(f"{problem}{lacking}; images end in {endings}; expected {layout}")
    say_once(
        f"{root}: {counted(len(listing.files), 'image')} in "
        f"{counted(len(listing.classes), 'class folder')}"
    )
    if loose := len(listing.loose):
        first = listing.loose[0]
        say_left(root, f"{loose:,} beside the class folders, so of no class, such as {first}")
    return FolderSource(name, split, root, listing.files, listing.labels, listing.classes)


def unlabelled_source(name: str, split: str, root: Path, listing: Listing) -> FolderSource:
    """All images of a folder without classes, those directly in it first."""
    count = len(listing.files) + len(listing.loose)
    words = "no class folders"
    if below := len(listing.files):
        words = f"{len(listing.loose):,} of them directly in it and so of no class"
    say_once(f"{root}: {counted(count, 'image')}, {words}: taken without labels")
    files = Names.of(chain(listing.loose, listing.files)) if below else listing.loose
    source = FolderSource(name, split, root, files, np.full(count, -1, dtype=np.int32), [])
    source.labelled = False
    return source


def say_left_out(root: Path, listing: Listing) -> None:
    """Tell of images with hidden names or without a decoder, with their count."""
    say_hidden(root, listing.hidden)
    for text in count_unread(listing.unread):
        say_left(root, text)


def say_hidden(root: Path, names: Sequence[str] | Names) -> None:
    """Tell of images with hidden names, where there are some."""
    if names:
        say_left(root, f"{len(names):,} under hidden names, such as {names[0]}")


def say_left(root: Path, what: str) -> None:
    """Tell of images that were left out."""
    say_once(f"note: images left out in {root}: {what}")


# ---- Images that a flag names ------------------------------------------------------------------


def files_below(root: Path) -> list[Path]:
    """Every file of a folder and of those below it, links followed.

    Raises:
        BadInput: a folder that cannot be listed, or that contains itself by a link.
    """

    def refuse(error: OSError) -> None:
        raise BadInput(f"cannot list {error.filename}: {error.strerror}")

    found = []
    # Where a folder and those that it lies in really are.
    above: dict[str, tuple[str, ...]] = {str(root): (os.path.realpath(root),)}
    for folder, below, names in os.walk(root, followlinks=True, onerror=refuse):
        for name in below:
            path = os.path.join(folder, name)
            real = os.path.realpath(path)
            if real in above[folder]:
                raise BadInput(f"{path} is a link to a folder that contains it; remove the link")
            above[path] = (*above[folder], real)
        found += [Path(folder, name) for name in names]
    return found


def image_files(path: Path, flag: str) -> list[Path]:
    """The file itself, or the images of a folder and its sub-folders, sorted.

    Hidden names and images without a decoder are left out, and counted in a line.

    Args:
        flag: that named the path, for the message.

    Raises:
        BadInput: nothing there, or no images.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise BadInput(f"{flag} {path} does not exist")
    readable, lacking = readable_endings(), unread_endings()
    both = readable + lacking
    files, hidden, unread = [], list[str](), list[str]()
    for file in sorted(files_below(path)):
        name, relative = file.name.lower(), file.relative_to(path)
        if not name.endswith(both):
            continue
        if any(is_hidden(part) for part in relative.parts):
            hidden.append(str(relative))
        elif name.endswith(lacking):
            unread.append(str(relative))
        else:
            files.append(file)
    say_hidden(path, hidden)
    texts = count_unread(unread)
    if not files:
        found = "".join(f"; {text}" for text in texts)
        raise BadInput(f"{flag} {path} holds no image files ({', '.join(readable)}){found}")
    for text in texts:
        say_left(path, text)
    return files
