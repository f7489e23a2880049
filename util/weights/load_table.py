"""What became of the tensors of a file when a model took its weights: a table of a few lines."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from util.spec import Pair
from util.weights.assumed import assumptions
from util.weights.convert import LICENCE, PLACE

# Where in a file's contents, once a model took its weights, the lines about that stand.
LOADED = "loaded"
MOST_GROUPS = 7  # named in a line; the others are counted


@dataclass
class Loading:
    """What a model took from a file.

    Attributes:
        new: tensors of the model that the file does not have, and that stay as they were drawn.
        left: tensors of the file that the model does not have.
        resized: what was brought to another size, a text each.
        fitted: what else became of the file's tensors, a text each; see `Encoder.fit_weights`.
    """

    new: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    fitted: list[str] = field(default_factory=list)

    def lines(self, model: nn.Module, state: Mapping[str, Any]) -> list[str]:
        """The table, the file's name above it.

        Args:
            model: with the weights in it.
            state: contents of the file, as `in_our_names` gives them.
        """
        place, own = state[PLACE], model.state_dict()
        taken = [name for name in own if name not in set(self.new)]
        count = sum(own[name].numel() for name in taken)
        left = [*self.left, *place.beside]
        rows = {
            "taken": f"{amount(taken)}, {count:,} parameters: {grouped(taken)}",
            "resized": "; ".join(self.resized),
            "fitted": "; ".join(self.fitted),
            "new": f"{amount(self.new)}: {grouped(self.new)}" if self.new else "",
            "left": "; ".join(
                [*([f"{amount(left)}: {grouped(left)}"] if left else []), *state["notes"]]
            ),
            "licence": state.get(LICENCE, ""),
        }
        # Where our own files have them is nothing to tell.
        usual = "model_args" in state and place.address == ("model",) and not place.others
        where = None if usual else place.sentence()
        return [
            f"weights of {place.source}{about(state)}",
            *([f"  {where}"] if where else []),
            *(f"  {title:8} {text}" for title, text in rows.items() if text),
        ]


def positions_resized(to: Pair, grid: Pair, resize: str) -> list[str]:
    """What to say of positions on a grid that came from another; nothing where it is the same."""
    if tuple(to) == tuple(grid):
        return []
    return [f"pos_embed {grid[0]}x{grid[1]} -> {to[0]}x{to[1]} patches (--pos_resize {resize})"]


def about(state: Mapping[str, Any]) -> str:
    """What a file says of the model and its training, in brackets; or whose names it has."""
    flags = state.get("args")
    model = state.get("model_name") or state.get("arch") or getattr(flags, "model", None)
    found = [text for text in (state.get("task"), model) if isinstance(text, str)]
    if state.get("task") != "export":
        counts = [name for name in ("epoch", "step") if is_count(state.get(name))]
        found += [f"{name} {state[name]}" for name in counts]
    style = state["style"].partition("_")[0]  # transformers_swin
    if style in ("transformers", "mmseg"):
        found.append(f"names of {style.replace('mmseg', 'mmsegmentation')}")
    return f" ({', '.join(found)})" if found else ""


def is_count(value: object) -> bool:
    """Whether an entry of a foreign file is a number of epochs or steps."""
    return isinstance(value, int) and not isinstance(value, bool)


def amount(names: Iterable[str]) -> str:
    """How many tensors."""
    count = len(list(names))
    return f"{count} tensor{'' if count == 1 else 's'}"


def grouped(names: Iterable[str]) -> str:
    """Names of tensors by the module that they are in: blocks.0-11 144, cls_token, head.* 2."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name_group(name), []).append(name)
    texts = []
    for group, members in list(groups.items())[:MOST_GROUPS]:
        text = group
        if numbers := sorted({int(n) for m in members for n in re.findall(r"^blocks\.(\d+)\.", m)}):
            text = "blocks." + "-".join(map(str, sorted({numbers[0], numbers[-1]})))
        texts.append(text if members == [group] else f"{text} {len(members)}")
    more = sum(len(members) for members in list(groups.values())[MOST_GROUPS:])
    return ", ".join([*texts, *([f"and {more} more"] if more else [])])


def name_group(name: str) -> str:
    """The module of a tensor, `decoder_*` for all of a decoder, or the name of a single one."""
    if name.startswith("decoder_"):
        return "decoder_*"
    first, dot, _ = name.partition(".")
    return f"{first}.*" if dot else name


def describe_reading(
    state: Mapping[str, Any], source: str, statistics: str | None = None
) -> list[str]:
    """What was taken from a file, and what was assumed of its model: lines for the reader.

    Args:
        state: what else the file holds, as the functions that load it return it.
        source: the file. statistics: see `util.weights.assumed.assumptions`.
    """
    return [*state[LOADED], *assumptions(state, source, statistics)]
