"""The arms of the step benchmark: what each trains, said in a few words."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch.nn.attention import SDPBackend

import models_zoo
from engine_pretrain import Masker, build_masker
from models_mmae import METHODS as PRESETS
from util.console import shown
from util.errors import BadInput
from util.flag_types import MOST_IN_BATCH, MOST_SIDE, PER_CORE, most_processes
from util.train.step import PRECISIONS

PEERS = ("transformers", "official", "transformers_simmim")
METHODS = ("mae", "mmae", "pixio", "simmim", *PEERS)
# Of SimMIM, with what its arms have unless told otherwise.
SIMMIM = ("simmim", "transformers_simmim")
SIMMIM_USUAL = {"model": "simmim_swin_base_patch4_window6", "mask_ratio": 0.6}
USUAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(SIMMIM, SIMMIM_USUAL),
    "pixio": {"model": "pixio_vit_base_patch16"},
}
# torch.compile's own names of its ways; a word alone is the first, which training has.
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# torch's kernels of attention.
ATTENTION = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
ADAMW = ("fused", "foreach", "plain")


@dataclass(frozen=True)
class Arm:
    """One way to take a training step.

    Attributes:
        method: mae | mmae | pixio | simmim, or a peer of the same sizes: transformers (its ViTMAE),
            official (`lab.bench.peers.OfficialMAE`: MAE as its authors compute it),
            transformers_simmim (its Swin for masked images).
        model: name in the zoo.
        precision: fp32 | bf16 | fp16.
        compiled: through torch.compile, in this of its `MODES`; None: not.
        checkpointing: activations are computed again in the backward pass.
        decoder: full: MAE's; partial or cross.
        predict_ratio: share of the hidden patches that such a decoder predicts.
        batch: images of each process.
        size: side of the image, pixels; None: the model's.
        mask_ratio: share of the patches that is masked.
        processes: training together; the cores are divided among them.
        adamw: fused | foreach | plain: how torch computes the update.
        attention: cudnn | flash | efficient | math, torch's kernels on a GPU; None: its choice.
        channels_last: images come with their channels innermost, as they are decoded.
        sharded: parameters go through `fully_shard` also where one process has them all.
    """

    method: str = "mae"
    model: str = "mae_vit_base_patch16"
    precision: str = "fp32"
    compiled: str | None = None
    checkpointing: bool = False
    decoder: str = "full"
    predict_ratio: float = 1.0
    batch: int = 32
    size: int | None = None
    mask_ratio: float = 0.75
    processes: int = 1
    adamw: str = "fused"
    attention: str | None = None
    channels_last: bool = False
    sharded: bool = False


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """What reads a value that is one of these names."""

    def read(text: str) -> str:
        if text not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return text

    return read


# Decoders that can predict some of the hidden patches; a word, and with a value their share.
SOME = ("partial", "cross")
# Words with a value, and how it is read; the others are words alone.
VALUES: dict[str, tuple[str, Any]] = {
    "model": ("model", str),
    **{name: ("predict_ratio", float) for name in SOME},
    "batch": ("batch", int),
    "size": ("size", int),
    "mask": ("mask_ratio", float),
    "processes": ("processes", int),
    "compile": ("compiled", one_of(MODES)),
    "adamw": ("adamw", one_of(ADAMW)),
    "attention": ("attention", one_of(tuple(ATTENTION))),
}
WORDS: dict[str, tuple[str, Any]] = {
    **{name: ("method", name) for name in METHODS},
    **{name: ("precision", name) for name in PRECISIONS},
    "compile": ("compiled", MODES[0]),
    "checkpointing": ("checkpointing", True),
    "channels_last": ("channels_last", True),
    "shard": ("sharded", True),
    **{name: ("decoder", name) for name in SOME},
}


def parse_arm(text: str, base: Arm) -> Arm:
    """`mae,bf16,cross=.34` over what is common to all arms.

    Raises:
        BadInput: an unknown word, or a value that cannot be.
    """
    given: dict[str, Any] = {}
    for word in text.split(","):
        name, equals, value = word.strip().partition("=")
        known = VALUES if equals else WORDS
        if name not in known:
            raise BadInput(
                f"unknown word {word.strip()!r} in the arm {text!r}; choose from "
                f"{', '.join(WORDS)}, {', '.join(f'{name}=' for name in VALUES)}"
            )
        field, meaning = known[name]
        try:
            given[field] = meaning(value) if equals else meaning
            if name in SOME:
                given["decoder"] = name
        except ValueError as error:
            wanted = str(error) if str(error).startswith("one of") else "a number"
            raise BadInput(f"{word.strip()!r} in the arm {text!r} needs {wanted}") from None
    given = USUAL.get(given.get("method", base.method), {}) | given
    arm = replace(base, **given)
    check_arm(arm, text)
    return arm


def check_arm(arm: Arm, text: str) -> None:
    """Refuse numbers that cannot be, and what the peer does not have."""
    counts = (arm.batch, arm.processes, arm.size or 1)
    most = (MOST_IN_BATCH, most_processes(), MOST_SIDE)
    if any(count > bound for count, bound in zip(counts, most, strict=True)):
        raise BadInput(
            f"arm {shown(text)}: batch, processes and size are at most {most[0]:,}, {most[1]:,} "
            f"({PER_CORE} for each core of this machine) and {most[2]:,}"
        )
    shares = (arm.mask_ratio, arm.predict_ratio)
    if min(counts) < 1 or not all(0 < share <= 1 for share in shares) or arm.mask_ratio == 1:
        raise BadInput(
            f"arm {text!r}: batch, size and processes are at least 1; mask lies between 0 and 1, "
            "partial and cross are above 0 and at most 1"
        )
    if arm.method in (*PEERS, *SIMMIM) and arm.decoder != "full":
        raise BadInput(f"arm {text!r}: {arm.method} has no {arm.decoder} decoder")
    families = (arm.method in SIMMIM, arm.method == "pixio")
    if families != (is_simmim(arm), is_pixio(arm)):
        raise BadInput(f"arm {text!r}: {arm.model} is not a model of {arm.method}")
    if arm.method == "transformers_simmim" and "_swin_" not in arm.model:
        raise BadInput(f"arm {text!r}: transformers has SimMIM with Swin alone")
    if arm.method in PEERS and (arm.sharded or arm.channels_last or arm.adamw != "fused"):
        raise BadInput(f"arm {text!r}: shard, channels_last and adamw= are of mae and mmae")
    if arm.method == "official" and arm.checkpointing:
        raise BadInput(f"arm {text!r}: MAE's own code has no checkpointing")


def is_simmim(arm: Arm) -> bool:
    """Whether its model is SimMIM's, ours or the peer's."""
    return arm.model.startswith("simmim_")


def is_pixio(arm: Arm) -> bool:
    """Whether its model is Pixio's."""
    return arm.model.startswith("pixio_")


def preset_terms(arm: Arm) -> Mapping[str, Any]:
    """What the arm's method presets; the peers of MAE are MAE."""
    if is_simmim(arm) or is_pixio(arm):
        return next(iter(models_zoo.list_methods(arm.model).values()))
    return PRESETS["mae" if arm.method in PEERS else arm.method]


def make_arm_masker(arm: Arm, model: Any) -> Masker:
    """The masks of the arm's method on the grid of a model, which may have no weights."""
    return build_masker({**preset_terms(arm), "mask_ratio": arm.mask_ratio}, model)


def name_arm(arm: Arm, base: Arm) -> str:
    """An arm by what differs from the common settings; always with its method and precision."""
    words = [arm.method, arm.precision]
    written = {field: word for word, (field, _) in VALUES.items()}
    alone = {field: word for word, (field, _) in WORDS.items()}
    for field in fields(arm):
        value = getattr(arm, field.name)
        if field.name in ("method", "precision", "predict_ratio"):
            continue
        if field.name == "decoder" and value != "full":
            words.append(value if arm.predict_ratio == 1 else f"{value}={arm.predict_ratio}")
        elif value == getattr(base, field.name):
            continue
        elif value is True or value == MODES[0]:
            words.append(alone[field.name])
        else:
            words.append(f"{written[field.name]}={value}")
    return ",".join(words)


def parse_arms(texts: Sequence[str], base: Arm) -> dict[str, Arm]:
    """Name to arm, in order.

    Raises:
        BadInput: none, or the same twice.
    """
    arms: dict[str, Arm] = {}
    for text in texts:
        arm = parse_arm(text, base)
        name = name_arm(arm, base)
        if name in arms:
            raise BadInput(f"the arm {name} is given twice")
        arms[name] = arm
    if not arms:
        raise BadInput("no arm to measure; give --arms, for example --arms transformers mae")
    return arms
