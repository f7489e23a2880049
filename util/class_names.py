"""The names of classes: those of a head against those of a data set."""

from collections.abc import Sequence

from util.errors import BadInput


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
