"""What a pretraining model and an encoder owe to all that handles them: mains, engines, plans.

A method is one class. What is here is all that the rest of the program asks of it: a base class
with an answer for everything that a simple method does not care about. That of an encoder is in
`models_encoder`, and can be imported from here.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models_encoder import Encoder, PartlyTuned, count_tuned_blocks
from util.errors import BadInput
from util.flag_types import number
from util.mask.strategies import count_visible
from util.spec import EncoderState, InputSpec, Shape

__all__ = [
    "Encoder",
    "PartlyTuned",
    "PretrainModel",
    "add_drop_path_flag",
    "check_drop_path",
    "count_tuned_blocks",
]


class PretrainModel(nn.Module):
    """A model that is pretrained by hiding parts of its input.

    A subclass sets `input` and `mask_grid` in its constructor, whose arguments are plain values and
    include `img_size` (side or (height, width)) and `in_chans`; it defines `forward` and
    `reconstruct`, and `encoder_state` for whatever is to follow the pretraining. Everything else
    has a default.

    Attributes:
        input: what it takes.
        mask_grid: the grid that a mask hides the places of: (rows, columns) of patches, or (times,
            rows, columns). Each place covers as many pixels along each axis as the others.
        draws: random numbers that each sample owes the model, by name: their shape. They are
            uniform in [-1/2, 1/2), a function of seed, epoch and image, and come to `forward` under
            their names, float32 [B, *shape].
        borrows_statistics: `reconstruct` gives each hidden patch its true mean and deviation, which
            the model does not predict; the fills that it is compared with then get the same.
        note: what a reader of its pictures and PSNR has to know; None: nothing.
        methods: what `--method` can be, and what each presets: values of flags by name. The first
            is the default. None: the class's own name, which presets nothing. See `presets`.
        published: base learning rate for 256 images, and global batch, of the published recipe; a
            run is told where it is far from them.
        default_model: name in `models_zoo.MODELS` that a method without `--model` stands for; None:
            the first that is registered of the class.
    """

    input: InputSpec
    mask_grid: Shape
    draws: Mapping[str, Shape] = {}
    borrows_statistics: bool = False
    methods: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    published: ClassVar[tuple[float, int]] = (1.5e-4, 4096)
    default_model: ClassVar[str | None] = None

    @classmethod
    def presets(cls, arguments: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """`methods`, as a model of these arguments presets them.

        Args:
            arguments: of the constructor, those that the model's name stands for.
        """
        return cls.methods or {cls.__name__.lower(): {}}

    @classmethod
    def from_encoder(
        cls, encoder: EncoderState, rest: Mapping[str, Tensor]
    ) -> "PretrainModel | None":
        """The model in a file of another program; None: it holds none of this method.

        Args:
            encoder: that was found in it.
            rest: all tensors of the file, under the names that they have there.
        """
        return None

    def beside_encoder(self) -> dict[str, Tensor]:
        """What the files of other programs hold beside the encoder, by the names that they have
        there; what begins with `decoder` is no part of it.

        Raises:
            BadInput: no other program has this model.
        """
        raise BadInput(f"no other program has a model like {type(self).__name__}")

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        """Add the flags that are the method's own."""

    @classmethod
    def from_args(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the constructor that flags decide; those left out are the model name's.

        Args:
            values: of all flags, by name.
        """
        return {}

    def forward(
        self, x: Tensor, mask: Tensor, num_visible: int | None = None, **drawn: Tensor
    ) -> dict[str, Tensor]:
        """One pretraining pass; with `num_visible` given, without waiting for the device.

        Args:
            x: float [B, C, *size], normalised.
            mask: bool [B, L], L places of `mask_grid` in raster order, True = masked.
            num_visible: False entries in each row, the same in all; None: counted.
            drawn: what `draws` asks for; while training alone.

        Returns:
            loss: scalar, a mean over the batch.
            pred: what was predicted, as the model likes.
        """
        raise NotImplementedError

    def reconstruct(self, x: Tensor, mask: Tensor, num_visible: int | None = None) -> Tensor:
        """The input with its hidden parts as the model predicts them; arguments as `forward`.

        Returns:
            float [B, C, *size], in the space of `x`. Only its hidden parts are looked at.
        """
        raise BadInput(f"{type(self).__name__} does not reconstruct its input")

    def encoder_state(self) -> EncoderState:
        """The encoder, for fine-tuning, features, segmentation and export.

        Raises:
            BadInput: it has none that could be used without the rest.
        """
        raise BadInput(
            f"{type(self).__name__} does not say what its encoder is (`encoder_state`): it can be "
            "pretrained, measured and shown, and nothing else"
        )

    def count_unmasked(self, mask: Tensor) -> int:
        """Visible places of each row of a mask [B, L], after checking it; waits for the device.

        Raises:
            BadInput: not a boolean mask of this grid, or rows with different counts.
        """
        places = torch.Size(self.mask_grid).numel()
        if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[1] != places:
            raise BadInput(f"mask is {mask.dtype} {tuple(mask.shape)}, expected bool [B, {places}]")
        counts = (~mask).sum(dim=1).unique().tolist()
        if len(counts) != 1 or not 0 < counts[0] < places:
            raise BadInput(f"every row needs the same count of visible patches, found {counts}")
        return int(counts[0])

    def check_images(self, images: Tensor, mask: Tensor) -> None:
        """Refuse images of another size than `input`, or another number of masks."""
        self.input.check(images)
        if len(mask) != len(images):
            raise BadInput(f"{len(mask)} masks for {len(images)} images")

    @property
    def note(self) -> str | None:
        """See the class."""
        return None

    @staticmethod
    def num_visible(places: int, ratio: float) -> int:
        """How many of so many places stay visible: MAE's int(L (1 - r)).

        Raises:
            BadInput: nothing would be visible, or nothing masked.
        """
        return count_visible(places, ratio)

    def adjust_lr(self, lr: float, num_visible: int) -> float:
        """The peak learning rate, of the one that `--blr` gives."""
        return lr

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are never decayed, beside biases and those of one axis."""
        return set()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations again in the backward pass instead of keeping them.

        Raises:
            BadInput: it cannot.
        """
        if enable:
            raise BadInput(
                f"{type(self).__name__} cannot compute its activations again; leave "
                "--grad_checkpointing out"
            )

    def fit_images(self, values: Mapping[str, Any]) -> int:
        """How many training images `fit` has to see before a new run's first step; 0: no fit.

        Args:
            values: of all flags, by name.
        """
        return 0

    def fit(
        self,
        batches: Iterable[tuple[Tensor, Mapping[str, Tensor]]],
        images: int,
        values: Mapping[str, Any],
        sum_over_ranks: Callable[[Tensor], Tensor],
    ) -> str:
        """Fit what is not trained by gradients, on views of evenly spaced training images.

        Args:
            batches: this process's (x, drawn), as `forward` gets them; drawn has whatever `draws`
                names.
            images: how many there are on all processes.
            values: of all flags, by name.
            sum_over_ranks: adds a float64 tensor over all processes.

        Returns:
            what was fitted, for the reader.
        """
        raise NotImplementedError

    def describe(self, num_visible: int) -> str:
        """What a plan says of the model beside its input: 49 of 196 visible ..."""
        places = torch.Size(self.mask_grid).numel()
        return f"{num_visible} of {places} visible"


def check_drop_path(rate: float) -> None:
    """Refuse a stochastic depth that would drop every branch, or none that there is."""
    if not 0 <= rate < 1:
        raise BadInput(f"drop_path {rate} must be from 0 on and below 1")


def add_drop_path_flag(group: Any) -> None:
    """`--drop_path` of an encoder in pretraining."""
    group.add_argument(
        "--drop_path",
        type=number(float, 0, 1, open_high=True),
        help="stochastic depth of the encoder's last block, rising to it from 0; default: the "
        "model's",
    )
