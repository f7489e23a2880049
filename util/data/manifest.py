"""JSON of a packed data set, with a checksum of its own; and every field of its index checked.

Without one, a changed digit of the statistics would change each image and nothing would say so.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from util.errors import BadInput

VERSION = 1
MANIFEST, RECORDS, NAMES, NAME_ENDS = "packed.json", "records.npy", "names.npy", "name_ends.npy"
TABLES = (RECORDS, NAMES, NAME_ENDS)
FORMATS = ("jpeg", "raw", "keep")
CHECKSUM = "checksum"  # its key; of all other keys and values, in one spelling
AGAIN = "restore the file, or delete it and run the main_pack.py command again"
KEYS = {
    "version", "name", "format", "images", "channels", "mean", "std", "eval_margin", "labelled",
    "classes", "settings", "shards", "tables",
}  # fmt: skip


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"shard-{number:05d}.bin"


# ---- Checksums ---------------------------------------------------------------------------------


def compute_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 over JSON content in one spelling: keys sorted, ASCII, no spaces."""
    rest = {key: value for key, value in content.items() if key != CHECKSUM}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def sealed(content: Mapping[str, Any], indent: int | None = None) -> bytes:
    """Content as JSON with its checksum."""
    return json.dumps({**content, CHECKSUM: compute_digest(content)}, indent=indent).encode("ascii")


def opened(data: bytes, *, must: bool) -> dict[str, Any]:
    """What `sealed` wrote, compared with its checksum.

    Args:
        must: refuse content without one.

    Raises:
        ValueError: with what is wrong, in words.
    """
    try:
        content = json.loads(data.decode(), parse_constant=_no_number, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, expected an object")
    if must and CHECKSUM not in content:
        raise ValueError("it has no checksum")
    if CHECKSUM in content and content[CHECKSUM] != compute_digest(content):
        raise ValueError("its checksum does not match: it is not what was written")
    return content


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is no number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it holds a key twice")
    return found


# ---- The index ---------------------------------------------------------------------------------


def read_manifest(root: Path) -> dict[str, Any]:
    """What DIR/split/packed.json says, each field checked.

    An index that was written before there were checksums has none, and opens.

    Raises:
        BadInput: it is missing, damaged, or of another version.
    """
    path = root / MANIFEST
    try:
        about = opened(path.read_bytes(), must=False)
    except FileNotFoundError:
        raise BadInput(
            f"no {path}: not a packed data set, or its packing has not ended; expected what "
            "main_pack.py --output_dir DIR writes, and --data_path packed:DIR"
        ) from None
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {path}: {error}; {AGAIN}") from error
    if about.get("version") != VERSION:
        raise BadInput(f"{path} is not of version {VERSION}, which this code reads; pack it anew")
    if fault := fault_in(about):
        raise BadInput(f"{path} is damaged: {fault}; {AGAIN}")
    return about


def fault_in(about: Mapping[str, Any]) -> str | None:
    """What no packing writes into an index, in words; None: nothing."""
    if differing := sorted(KEYS ^ (about.keys() - {CHECKSUM})):
        return f"its keys are others ({', '.join(map(repr, differing[:3]))})"
    for key, holds, expected in _rules(about):
        if not holds:
            return f"{key} is {str(about[key])[:60]!r}, expected {expected}"
    return _fault_in_files(about)


def _rules(about: Mapping[str, Any]) -> list[tuple[str, bool, str]]:
    """(key, whether its value can be, what it should be) of the fields that say what the set is."""
    channels, settings = about["channels"], about["settings"]
    counted = is_whole(channels, 1)
    return [
        ("name", isinstance(about["name"], str), "a text"),
        ("format", about["format"] in FORMATS, f"one of {', '.join(FORMATS)}"),
        ("images", is_whole(about["images"], 1), "a whole number from 1"),
        ("channels", counted, "a whole number from 1"),
        ("mean", counted and is_stats(about["mean"], channels, 0), "numbers 0..1, one a channel"),
        (
            "std",
            counted and is_stats(about["std"], channels, math.ulp(0.0)),
            "numbers above 0 to 1, one a channel",
        ),
        ("eval_margin", isinstance(about["eval_margin"], bool), "true or false"),
        ("labelled", isinstance(about["labelled"], bool), "true or false"),
        ("classes", is_texts(about["classes"]), "a list of texts"),
        (
            "settings",
            isinstance(settings, dict)
            and settings.get("format") == about["format"]
            and is_whole(settings.get("short_side"), 0)
            and is_whole(settings.get("quality"), 1),
            "format, short_side and quality of the packing",
        ),
    ]


def _fault_in_files(about: Mapping[str, Any]) -> str | None:
    shards, tables = about["shards"], about["tables"]
    if not isinstance(shards, list) or not shards:
        return "shards is no list of files"
    for number, shard in enumerate(shards):
        if not (
            isinstance(shard, dict)
            and shard.keys() == {"file", "bytes", "sha256"}
            and shard["file"] == shard_name(number)
            and is_whole(shard["bytes"], 0)
            and is_digest(shard["sha256"])
        ):
            found = str(shard)[:60]
            return f"number {number} of shards is {found!r}, expected its file, bytes and sha256"
    if not isinstance(tables, dict) or tables.keys() != set(TABLES):
        return f"tables is {str(tables)[:60]!r}, expected {', '.join(TABLES)}"
    return next((f"no checksum of {n}" for n, s in tables.items() if not is_digest(s)), None)


def is_whole(value: Any, lowest: int) -> bool:
    """A whole number of 63 bits; true is none."""
    return type(value) is int and lowest <= value < 2**63


def is_stats(values: Any, count: int, lowest: float) -> bool:
    """One finite number a channel, in units of gray levels 0..1."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(v) in (int, float) and lowest <= v <= 1 for v in values)
    )


def is_texts(values: Any) -> bool:
    """A list of texts."""
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def is_digest(value: Any) -> bool:
    """A SHA-256 in hexadecimal."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
