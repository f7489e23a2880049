"""The names of classes: those of a head against those of a data set, and train's against val's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from util.console import counted, listed
from util.data.images import PathLike
from util.data.source import Source, Subset, View
from util.errors import BadInput

SHOWN = 5  # names of a long list


def check_classes(found: Sequence[str], expected: Sequence[str] | None, outputs: int) -> None:
    """Refuse a head that was trained for other classes than the data's.

    Args:
        found: classes of the data set.
        expected: those that the head was trained for; None: nobody knows their names.
        outputs: of the head.

    Raises:
        BadInput: with what differs.
    """
    if expected is not None and list(found) != list(expected):
        differing = [f"{a!r} and {b!r}" for a, b in zip(expected, found, strict=False) if a != b]
        raise BadInput(
            f"the head was trained for {len(expected)} classes, the data set has {len(found)}; "
            f"they differ{': ' + ', '.join(differing[:3]) if differing else ' in number'}; "
            "fine-tune for these classes with --finetune"
        )
    if len(found) > outputs or (expected is None and len(found) != outputs):
        raise BadInput(
            f"the head has {outputs} outputs, the data set {len(found)} classes; fine-tune for "
            "these classes with --finetune, or choose the data set it was trained on"
        )


def check_splits(train: Sequence[str], val: Sequence[str], name: str) -> None:
    """Refuse a training and a held-out split of different classes.

    Args:
        train, val: their classes, in order.
        name: of the data set.

    Raises:
        BadInput: with the classes that are in one alone.
    """
    if list(train) == list(val):
        return
    alone = [
        f"in {split} alone {len(names)} ({listed(names, SHOWN)})"
        for split, names in (
            ("train", [one for one in train if one not in set(val)]),
            ("val", [one for one in val if one not in set(train)]),
        )
        if names
    ]
    raise BadInput(
        f"train of {name} has {len(train)} classes, val {len(val)}: "
        f"{'; '.join(alone) or 'in another order'}; expected the same in both"
    )


def need_labels(source: Source, data_path: PathLike | None, labelled: Sequence[str]) -> None:
    """Refuse a split without labels.

    Args:
        labelled: names of sets that have them.

    Raises:
        BadInput: with what to do.
    """
    if source.labelled:
        return
    instead = f"sets with labels: {', '.join(labelled)}"
    if source.name in labelled:  # of folders it depends on what is in them
        instead = (
            f"{source.split} of {data_path} has no class folders; expected train/<class>/* and "
            "val/<class>/*, or <class>/* alone"
        )
        if stray := beside_folders(source, Path(str(data_path))):
            instead = (
                f"{counted(len(stray), 'image')} in {data_path} beside the class folders "
                f"({listed(stray, SHOWN)}); without them the folders are the classes"
            )
    raise BadInput(f"{source.name} has no labels to learn from; {instead}")


def beside_folders(source: Source, root: Path) -> list[str]:
    """The images directly in a folder that has others in folders of it; empty: it has none."""
    while isinstance(source, Subset):  # the image may be among those held out
        source = source.source
    paths = [Path(source.file_name(i)) for i in range(len(source))]
    direct = [path.name for path in paths if path.parent == root]
    return direct if len(direct) < len(paths) else []


# ---- A part of the classes ---------------------------------------------------------------------


class Relabelled(View):
    """Images of another source, with labels that are indices into other classes, by name.

    Args:
        source: of which every class is among the others.
        classes: the others, in their order.
    """

    def __init__(self, source: Source, classes: Sequence[str]) -> None:
        super().__init__(source, classes=classes)
        self.places = np.array([classes.index(name) for name in source.classes])

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.source[index]
        return image, int(self.places[label])


def as_trained(
    source: Source, expected: Sequence[str] | None, outputs: int, checkpoint: str
) -> Source:
    """A held-out set with the labels that a head gives to its classes, which may be more.

    Args:
        expected: the classes that the head was trained for; None: nobody knows their names.
        outputs: of the head.
        checkpoint: its file, for the message.

    Raises:
        BadInput: the head does not know some of the classes, by name; or, where nobody knows
            the names, their number differs.
    """
    if expected is None and len(source.classes) != outputs:
        raise BadInput(
            f"the head has {outputs} outputs, the data set {len(source.classes)} classes, and "
            f"{checkpoint} does not name its own; a part of them is measured where the training "
            f"split has all {outputs}; else fine-tune for these classes with --finetune"
        )
    if expected is None or list(source.classes) == list(expected):
        check_classes(source.classes, expected, outputs)
        return source
    unknown = [name for name in source.classes if name not in set(expected)]
    if unknown:
        raise BadInput(
            f"{checkpoint} was trained for {len(expected)} classes ({listed(expected, SHOWN)}) and "
            f"does not know {len(unknown)} of the {len(source.classes)} in the data: "
            f"{listed(unknown, SHOWN)}; leave them out, or fine-tune for these classes with "
            "--finetune"
        )
    return Relabelled(source, expected)
