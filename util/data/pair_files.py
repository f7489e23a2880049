"""Images and their label maps in folders: which file belongs to which."""

import os
from collections.abc import Iterable
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from util.data.folders import say_hidden, say_left
from util.data.label_maps import (
    MASK_ENDINGS,
)
from util.data.listing import Names
from util.endings import count_unread, is_hidden, readable_endings, unread_endings
from util.errors import BadInput


def list_pairs(images: Path, masks: Path, layout: str) -> tuple[Names, Names]:
    """Pictures and their label maps, by name without its ending, sorted.

    Masks without an image are left alone: a split is often a part of a folder of masks.

    Raises:
        BadInput: no such folder, no images, an image without a mask, or two files of one name.
    """
    for folder in (images, masks):
        if not folder.is_dir():
            raise BadInput(f"no folder {folder}; expected {layout}")
    names = names_in(images)
    # Of an image and its preview of a rarer kind (x.jpg and x.gif) the usual one is meant.
    usual = by_stem(images, names, IMG_EXTENSIONS)
    rarer = by_stem(images, names, set(readable_endings()) - set(IMG_EXTENSIONS))
    pictures = dict(sorted((rarer | usual).items(), key=lambda item: item[1]))
    maps = by_stem(masks, names_in(masks), MASK_ENDINGS)
    taken = (*IMG_EXTENSIONS, *readable_endings())
    shown = [name for name in names if not is_hidden(name)]
    lacking = count_unread(name for name in shown if name.lower().endswith(unread_endings()))
    if not pictures:
        found = "".join(f"; {text}" for text in lacking)
        endings = ", ".join(dict.fromkeys(taken))
        raise BadInput(
            f"no image in {images} (files ending in {endings}){found}; expected {layout}"
        )
    say_hidden(images, [n for n in names if is_hidden(n) and n.lower().endswith(taken)])
    for text in lacking:
        say_left(images, text)
    lonely = [name for name in pictures if name not in maps]
    if lonely:
        more = f", and {len(lonely) - 1} more images have none" if len(lonely) > 1 else ""
        raise BadInput(
            f"the image {images / pictures[lonely[0]]} has no mask {masks / lonely[0]}.png{more} "
            f"(masks end in {', '.join(MASK_ENDINGS)}; a JPEG blurs the values); expected {layout}"
        )
    return Names.of(pictures.values()), Names.of(maps[name] for name in pictures)


def names_in(folder: Path) -> list[str]:
    """All names in a folder, sorted.

    Raises:
        BadInput: it cannot be read.
    """
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise BadInput(f"cannot list {folder}: {error.strerror}") from error


def by_stem(folder: Path, names: Iterable[str], endings: Iterable[str]) -> dict[str, str]:
    """The files with one of the endings, by name without it, in their order.

    Raises:
        BadInput: two files differ in nothing but the ending.
    """
    files: dict[str, str] = {}
    for name in names:
        stem, ending = os.path.splitext(name)
        if ending.lower() not in endings or is_hidden(name):
            continue
        if stem in files:
            raise BadInput(f"{folder} holds both {files[stem]} and {name}: which of them is meant?")
        files[stem] = name
    return files
