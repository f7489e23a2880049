"""Where in a file an encoder's weights are: under which keys, and what their names begin with.

Programs wrap a state dict (`{"model_state_dict": ...}`, `{"student": ..., "teacher": ...}`), and
modules wrap one another (`module.` of DDP, `_orig_mod.` of torch.compile, `model.` or `backbone.`
of a Lightning module, `encoder.` beside `target_encoder.`). Neither is a fixed list here: weights
are wherever one prefix reaches the patch projection and the first block of a known naming.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from util.errors import BadInput

Weights = dict[str, Tensor]

# Dicts in dicts are searched so deep: {"model": {"state_dict": {"teacher": ...}}}.
DEPTH = 3
# Modules that wrap others without being a part of the model; they may also stand inside a name.
WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# The patch projection in the names of each program, and what the first block's names begin with.
PROJECTIONS = (
    (re.compile(r"(|.+\.)patch_embed\.proj\.weight"), ("blocks.0.",)),  # timm, MAE, ours
    (re.compile(r"(|.+\.)patch_embed\.projection\.weight"), ("layers.0.",)),  # mmsegmentation
    (
        re.compile(r"(|.+\.)embeddings\.patch_embeddings\.projection\.weight"),  # transformers
        ("encoder.layer.0.", "encoder.layers.0.", "layers.0."),
    ),
)
# A segmenter is read as a whole: its encoder's prefix is part of the names that we know.
SEGMENTER, SEGMENTER_PARTS = "decode_head.conv_seg.weight", ("encoder.", "backbone.")
# Of the words in two addresses, whose weights a user of the method takes. BYOL keeps the online
# network, DINO and I-JEPA the teacher or target; averages stay behind the weights themselves.
ROLES = (
    {"online"},
    {"teacher", "target"},
    set[str](),  # none of these words
    {"student"},
    {"ema", "momentum", "swa", "avg", "average", "averaged", "k"},
)
PLAIN = ROLES.index(set())
# Where neither has such a word, these go before others.
USUAL = ("model", "state_dict")


@dataclass(frozen=True)
class NestedWeights:
    """An encoder's weights in a file, alone or with what belongs to them (a decoder, a head).

    Attributes:
        source: the file's name, for messages.
        wrappers: keys of the dicts that lead to them.
        prefix: what their names begin with, without what `WRAPPERS` names.
        said: the same as it stands in the file.
        weights: by their names without all that.
        beside: other tensors of the same dict, under their whole names.
        others: what else in the file holds weights: names as `--weights_key` takes them, and
            addresses.
        inside: what of `WRAPPERS` stands inside the names.
    """

    source: str
    wrappers: tuple[str, ...]
    prefix: str
    said: str
    weights: Weights
    beside: Weights = field(default_factory=dict)
    others: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    inside: tuple[str, ...] = ()

    @property
    def address(self) -> tuple[str, ...]:
        """Wrappers and parts of the prefix, from outside in."""
        return (*self.wrappers, *self.prefix.split(".")[:-1])

    @property
    def role(self) -> int:
        """The place in `ROLES` of the words in the address; of several the first."""
        words = {word for part in self.address for word in re.split(r"[_.]", part.lower())}
        return next((i for i, role in enumerate(ROLES) if role & words), PLAIN)

    def called(self, key: str) -> bool:
        """Whether a value of `--weights_key` means this: adjoining parts of the address."""
        wanted = tuple(key.strip(".").split("."))
        parts = tuple(part for name in self.address for part in name.split("."))
        return any(parts[i : i + len(wanted)] == wanted for i in range(len(parts)))

    def sentence(self) -> str | None:
        """Where the weights were, for the reader; None: the file itself is the state dict."""
        under = f"weights are under {quoted(['.'.join(self.wrappers)])}" if self.wrappers else ""
        begin = f"names begin with {quoted([self.said])}" if self.said else ""
        text = ", ".join(part for part in (under, begin) if part)
        if text:
            text += f"; {'both are' if under and begin else 'it is'} taken off"
        if self.inside:
            inside = f"{quoted(self.inside)} inside of names is taken off"
            text = f"{text}, and {inside}" if text else inside
        if self.others:
            also = f"the file also holds {quoted(list(self.others))} (--weights_key takes another)"
            text = f"{text}; {also}" if text else also
        return text or None


def quoted(names: Sequence[str]) -> str:
    """Names for a message: 'a', 'b'."""
    return ", ".join(f"'{name}'" for name in names)


def find_weights(state: Mapping[str, Any], source: str, key: str | None = None) -> NestedWeights:
    """The weights in the contents of a file.

    Where several places hold an encoder's, the roles that their names tell decide, see `ROLES`.

    Args:
        source: the file's name, for messages.
        key: which of them, in the user's words; None: as above.

    Raises:
        BadInput: there are none; or several, and no name tells which; or none that `key` means.
    """
    places = list(search(state, source))
    whole = [place for place in places if is_whole(place)]
    if not places:
        if key is not None:
            raise BadInput(
                f"--weights_key {key}: {source} holds no encoder of that name or another"
            )
        return no_encoder(state, source)
    places = whole or places
    chosen = choose(places, key, source)
    labelled = zip(make_labels(places), places, strict=True)
    others = {label: place.address for label, place in labelled if place is not chosen}
    return replace(chosen, others=others)


def search(
    state: Mapping[Any, Any], source: str, wrappers: tuple[str, ...] = ()
) -> Iterator[NestedWeights]:
    """All places in nested dicts with a patch projection, outer dicts first."""
    tensors = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
    yield from places_in(tensors, source, wrappers)
    if len(wrappers) < DEPTH:
        for name, inner in state.items():
            if isinstance(name, str) and isinstance(inner, Mapping):
                yield from search(inner, source, (*wrappers, name))


def places_in(tensors: Weights, source: str, wrappers: tuple[str, ...]) -> Iterator[NestedWeights]:
    """The places in one flat dict, each with the tensors that only its prefix reaches."""
    names = bare_names(tensors, source)
    found = {prefix: None for name in names for prefix in find_prefixes(name, names)}
    prefixes = sorted(found, key=len)
    for prefix in prefixes:
        deeper = tuple(p for p in prefixes if p != prefix and p.startswith(prefix))
        own = {n: k for n, k in names.items() if n.startswith(prefix) and not n.startswith(deeper)}
        said, inside = as_written(prefix, own)
        yield NestedWeights(
            source,
            wrappers,
            prefix,
            said,
            {name.removeprefix(prefix): tensors[key] for name, key in own.items()},
            {key: tensors[key] for name, key in names.items() if name not in own},
            inside=inside,
        )


def bare_names(tensors: Weights, source: str) -> dict[str, str]:
    """Names without `WRAPPERS`, to those in the file.

    Raises:
        BadInput: two different tensors get one name.
    """
    names: dict[str, str] = {}
    for key, tensor in tensors.items():
        bare = WRAPPERS.sub("", key)
        if bare in names and not torch.equal(tensors[names[bare]], tensor):
            raise BadInput(
                f"{source} holds two different tensors for {bare} ({names[bare]} and {key}); give "
                "a file with one of them"
            )
        names[bare] = key
    return names


def find_prefixes(name: str, names: Mapping[str, str]) -> Iterator[str]:
    """What stands before the patch projection, if this is one."""
    for projection, _ in PROJECTIONS:
        if (match := projection.fullmatch(name)) is not None:
            prefix = match[1]
            if "embeddings." in name:
                prefix = re.sub(r"(^|\.)(vit|swin|beit)\.$", r"\1", prefix)  # transformers' own
            for part in SEGMENTER_PARTS:
                outer = prefix.removesuffix(part)
                if outer != prefix and outer + SEGMENTER in names and outer[-1:] in ("", "."):
                    prefix = outer
            yield prefix


def as_written(prefix: str, names: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """A prefix as it stands in the file, and what else of `WRAPPERS` stands inside the names."""
    if all(bare == key for bare, key in names.items()):
        return prefix, ()
    parts = [key.split(".") for key in names.values()]
    said = "".join(f"{part}." for part in parts[0][: in_common(parts)])
    inside = {found for key in names.values() for found in WRAPPERS.findall(key[len(said) :])}
    return said, tuple(sorted(inside))


def in_common(lists: Sequence[Sequence[str]]) -> int:
    """How many entries all lists begin with."""
    count = 0
    for entries in zip(*lists, strict=False):
        if len(set(entries)) > 1:
            break
        count += 1
    return count


def is_whole(place: NestedWeights) -> bool:
    """Whether a first block is beside the patch projection."""
    outer = r"^(vit|swin|beit|encoder(?=\.blocks)|backbone)\."
    names = [re.sub(outer, "", name) for name in place.weights]
    firsts = tuple(first for _, blocks in PROJECTIONS for first in blocks)
    return any(name.startswith(firsts) for name in names)


def choose(places: Sequence[NestedWeights], key: str | None, source: str) -> NestedWeights:
    """The place that a key means, or whose name goes before those of the others.

    Raises:
        BadInput: none is of that name, or nothing tells between two.
    """
    if key is not None:
        meant = [p for p in places if ".".join(p.address) == key.strip(".")]
        meant = meant or [p for p in places if p.called(key)]
        if not meant:
            raise BadInput(
                f"--weights_key {key}: {source} holds no weights of that name, but "
                f"{quoted(make_labels(places))}; give one of these, or leave it out"
            )
        places = meant
    first = min(place.role for place in places)
    best = [place for place in places if place.role == first]
    for usual in ((), *((name,) for name in USUAL)):
        named = [place for place in best if place.address[:1] == usual]
        if len(named) == 1:
            return named[0]
    if all(same_weights(best[0], place) for place in best[1:]):
        return best[0]
    raise BadInput(
        f"{source} holds weights of several encoders, {quoted(make_labels(best))}; name the one to "
        "take with --weights_key"
    )


def same_weights(one: NestedWeights, other: NestedWeights) -> bool:
    """Whether two places hold the same tensors under the same names."""
    a, b = one.weights, other.weights
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def make_labels(places: Sequence[NestedWeights]) -> list[str]:
    """For each place what `--weights_key` takes: a part of its address that no other has."""
    return [
        next(
            (part for part in place.address if sum(p.called(part) for p in places) == 1),
            ".".join(place.address) or "(no name)",
        )
        for place in places
    ]


def no_encoder(state: Mapping[str, Any], source: str) -> NestedWeights:
    """The tensors of a file in which no encoder was found, for whoever says what is missing.

    Raises:
        BadInput: there are no tensors.
    """
    wrappers: tuple[str, ...] = ()
    for name in USUAL:
        if isinstance(state.get(name), Mapping):
            state, wrappers = state[name], (*wrappers, name)
    weights = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not weights:
        inner = [(len(w), name, w) for name, w in tensors_below(state)]
        if inner and "param_groups" not in state:
            _, name, weights = max(inner, key=lambda found: found[:2])
            return NestedWeights(source, (*wrappers, name), "", "", weights)
        what = ", ".join(map(str, list(state)[:8])) or "nothing"
        hint = ""
        if "param_groups" in state:
            hint = ": this is the state of an optimiser; give the file with the model's weights"
        raise BadInput(f"{source} holds no weights, only {what}{hint}")
    return NestedWeights(source, wrappers, "", "", weights)


def tensors_below(state: Mapping[Any, Any]) -> Iterator[tuple[str, Weights]]:
    """The dicts one level down that hold tensors under names."""
    for name, inner in state.items():
        if isinstance(name, str) and isinstance(inner, Mapping):
            found = {k: v for k, v in inner.items() if isinstance(k, str) and isinstance(v, Tensor)}
            if found:
                yield name, found
