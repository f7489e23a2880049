"""Files of measurements: a new one never takes the place of what was measured of something else."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from util.data.splits import find_leak, read_hold_out
from util.files import writing
from util.progress import say
from util.train.checkpoint import BEST

MEASURED = "measured"


def make_identity(checkpoint: str, step: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a measurement is of, to be kept under `MEASURED` in its file.

    Args:
        checkpoint: path or address. step: of its training, None where it does not say.
        settings: flags that decide what is measured, in plain types; those that were not given
            (None) are left out, so that results of before a flag came are of the same.
    """
    place = checkpoint if "://" in checkpoint else str(Path(checkpoint).resolve())
    return {"checkpoint": place, "step": step, **given(settings)}


def given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were given; a seed of nothing held out is none."""
    found = {name: value for name, value in settings.items() if value is not None}
    if "val_fraction" not in found:
        found.pop("val_seed", None)
    return found


def chosen_on(checkpoint: str, state: Mapping[str, Any]) -> str | None:
    """The images that a checkpoint was chosen on among those of its run; None: it was not chosen.

    Args:
        checkpoint: path or address. state: what it holds.
    """
    if not Path(checkpoint).name.startswith(BEST[:-4]):
        return None
    return read_hold_out(state.get("arithmetic", {})).words


def measured_on(
    settings: Mapping[str, Any], state: Mapping[str, Any], checkpoint: str, *, speaks: bool
) -> dict[str, str]:
    """Which images a result is of; and a warning where the checkpoint may have learnt from them.

    Args:
        settings: flags of the measurement. state: what the checkpoint holds.
        speaks: whether to tell the reader as well.
    """
    hold_out = read_hold_out(settings)
    leak = find_leak(state, hold_out, checkpoint)
    if speaks and leak is not None:
        say(f"warning: {leak}")
    return {"measured_on": hold_out.words} | ({} if leak is None else {"warning": leak})


def set_others_aside(folder: Path, names: Sequence[str], identity: Mapping[str, Any]) -> None:
    """Rename the files of an earlier measurement unless it was of the same, and say so.

    `eval.json` becomes `eval-1.json`, or the next number that none of the files has.

    Args:
        names: of the new files in `folder`; the first is JSON and holds its identity. Without it
            nobody knows what the others are of.

    Raises:
        CannotWrite: it cannot be renamed.
    """
    first = folder / names[0]
    with writing(first):
        kept = [folder / name for name in names if (folder / name).exists()]
        if not kept:
            return
    try:
        held = json.loads(first.read_text())
    except (OSError, ValueError, RecursionError):
        held = None
    before = held.get(MEASURED) if isinstance(held, dict) else None
    # Through JSON, which has no tuples.
    if isinstance(before, dict) and given(before) == given(json.loads(json.dumps(identity))):
        return
    number = 1
    with writing(first):
        while any(_numbered(folder / name, number).exists() for name in names):
            number += 1
        for path in kept:
            path.rename(_numbered(path, number))
    say(f"kept        {_numbered(kept[0], number)}, an earlier measurement of something else")


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")
