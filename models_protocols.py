"""What a pretraining model and an encoder owe to all that handles them: mains, engines, plans.

A method is one class. What is here is all that the rest of the program asks of it: base classes
with an answer for everything that a simple method does not care about.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from models_batchnorm import GlobalBatchNorm
from util.errors import BadInput
from util.mask.strategies import count_visible
from util.spec import EncoderState, InputSpec, Pair, Shape


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
        if tuple(images.shape[1:]) != self.input.shape:
            raise BadInput(
                f"images are {tuple(images.shape[1:])}, the model was built for "
                f"{self.input.shape} (channels, height, width)"
            )
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


class PartlyTuned:
    """What every encoder with a head can: start its head anew, and learn in part.

    A mixin for modules with `head`; they say in `tuned_names` which parts there are.

    Attributes:
        head_std: deviation from which the head of a full or partial fine-tuning starts.
    """

    head: nn.Module
    head_std: ClassVar[float] = 2e-5

    @property
    def linear(self) -> nn.Linear:
        """The linear layer of the head, with or without a BatchNorm before it."""
        head = self.head[1] if isinstance(self.head, nn.Sequential) else self.head
        assert isinstance(head, nn.Linear), "a model without a head"
        return head

    def init_head(self, std: float) -> None:
        """Start the head anew from N(0, std), cut at two deviations of 1 as MAE's code does."""
        nn.init.trunc_normal_(self.linear.weight, std=std)
        nn.init.zeros_(self.linear.bias)

    def tuned_names(self, tune: str) -> set[str]:
        """Names of the parameters that learn, see `freeze_to`."""
        raise NotImplementedError

    def freeze_to(self, tune: str) -> list[str]:
        """Let only part of the parameters learn, and return the names of that part.

        Args:
            tune: full; linear (the linear layer of the head); or partial:K, K a number of blocks
                from the end, with what comes after them: 0 is linear, the depth full. Of a vision
                transformer 0.5 is the MLP of the last block with its norm and LScale.

        What is frozen is deterministic: whole frozen blocks run without drop path.

        Raises:
            BadInput: no such part.

        Source: He et al. (arXiv 2111.06377), section 4.3, "partial fine-tuning".
        """
        module = cast(nn.Module, self)
        tuned = self.tuned_names(tune)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in tuned)
        module.train(module.training)
        return [name for name, _ in module.named_parameters() if name in tuned]


class Encoder(PartlyTuned, nn.Module):
    """An encoder with a head, or none: what fine-tuning, kNN and prediction ask of one.

    A subclass that is not a vision transformer takes, beside arguments of its own, `img_size`,
    `in_chans`, `num_classes` (0: no head), `global_pool` (of `pools`), `drop_path` and `probe`. It
    sets the attributes below, calls `make_head` at the end of its constructor, and defines
    `forward_features` and `pool`.

    Attributes:
        input: what it takes.
        num_features: width D of what `pool` gives.
        pools: names of the ways to pool, the default first.
        stages: the parts of the network in the order of the data, each a name of a module in it
            (`body`, `layers.0.blocks.1`); they are the units of partial tuning and of layer decay.
        feature_info: `stride` (height, width) in pixels and `channels` of each map of `pyramid`,
            from fine to coarse, where these differ.
        plain_blocks: whether each of `stages` gives tokens of the same shape, so that those behind
            one can be left out (`--probe_block`); the constructor then has a `depth`.
    """

    input: InputSpec
    num_features: int
    pools: ClassVar[Sequence[str]] = ("avg",)
    stages: Sequence[str] = ()
    plain_blocks: ClassVar[bool] = False
    feature_info: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def fit_arguments(cls, stored: Mapping[str, Any], size: Pair | None) -> dict[str, Any]:
        """The constructor's arguments for an encoder that is to be used.

        Args:
            stored: arguments that its weights are of. size: (height, width) of the images; None:
                as there.
        """
        return {**stored, **({} if size is None else {"img_size": list(size)})}

    def fit_weights(
        self, weights: Mapping[str, Tensor], stored: Mapping[str, Any], pos_resize: str
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Weights of an encoder of this kind as this one takes them: what depends on its size.

        Args:
            weights: by its own names.
            stored: arguments of the constructor that they are of.
            pos_resize: rescale | extend, see `main_finetune.py --pos_resize`.

        Returns:
            the weights, and what was done to them, for the reader. What is missing is then new,
            where the loading allows it.
        """
        return dict(weights), []

    def make_head(self, num_classes: int, global_pool: str | None, probe: bool) -> None:
        """Give it `head`, a linear layer on pooled features, with a BatchNorm before a probe's."""
        self.num_classes, self.global_pool = num_classes, global_pool or self.pools[0]
        if self.global_pool not in self.pools:
            raise BadInput(
                f"{type(self).__name__} cannot pool by {global_pool!r}, only by "
                f"{', '.join(self.pools)}; --global_pool stands for avg, --cls_token for cls"
            )
        head: nn.Module = nn.Identity()
        if num_classes:
            head = nn.Linear(self.num_features, num_classes)
            if probe:
                norm = GlobalBatchNorm(self.num_features, affine=False, eps=1e-6)
                head = nn.Sequential(norm, head)
        self.head = head

    @property
    def img_size(self) -> Pair:
        """(height, width)."""
        return self.input.image_size

    @property
    def in_chans(self) -> int:
        """Channels of an image."""
        return self.input.channels

    def forward_features(self, x: Tensor) -> Tensor:
        """What `pool` reads, of normalised inputs float [B, C, *size]."""
        raise NotImplementedError

    def pool(self, x: Tensor, kind: str) -> Tensor:
        """What `forward_features` gave, pooled in one of the ways of `pools`: [B, D]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, K], or pooled features of an encoder without a head."""
        return self.head(self.pool(self.forward_features(x), self.global_pool))

    def features(self, x: Tensor, kind: str) -> Tensor:
        """Pooled features, [B, D].

        Raises:
            BadInput: it does not pool so.
        """
        if kind not in self.pools:
            raise BadInput(f"unknown features {kind!r}, choose from {', '.join(self.pools)}")
        return self.pool(self.forward_features(x), kind)

    def pyramid(self, images: Tensor, taps: Sequence[int]) -> list[Tensor]:
        """Four maps for segmentation, [B, C, h, w] from early to late, without a norm.

        Args:
            images: normalised, float [B, C, H, W], of any size in whole patches.
            taps: blocks whose outputs they are, where all have one resolution (`plain_blocks`);
                else the maps are those of `feature_info`, and this is empty.

        Raises:
            BadInput: it gives none.
        """
        raise BadInput(f"{type(self).__name__} gives no maps for segmentation")

    def layer_groups(self) -> list[list[str]]:
        """Names of all parameters from input to output; the last group is of what comes after all
        stages, with the head, the first of what stands in none.

        The one source of freezing, partial tuning and layer decay.
        """
        groups: list[list[str]] = [[] for _ in range(len(self.stages) + 2)]
        for name, _ in self.named_parameters():
            groups[self.layer_of(name)].append(name)
        return groups

    def layer_of(self, name: str) -> int:
        """The number of a parameter's group in `layer_groups`; -1: the last."""
        if name.startswith("head."):
            return -1
        inside = (i for i, stage in enumerate(self.stages, 1) if name.startswith(f"{stage}."))
        return next(inside, 0)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are never decayed, beside biases and those of one axis."""
        return set()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See `PretrainModel.set_grad_checkpointing`."""
        if enable:
            raise BadInput(f"{type(self).__name__} cannot compute its activations again")

    def tuned_names(self, tune: str) -> set[str]:
        """See `PartlyTuned`; the units are the stages."""
        count = count_tuned_blocks(tune, len(self.stages))
        first, *stages, after = self.layer_groups()
        if count is None or count == len(stages):
            return {name for group in (first, *stages, after) for name in group}
        if count == 0:
            return {name for name in after if name.startswith("head.")}
        if count == 0.5:
            raise BadInput(
                f"{type(self).__name__} has no MLP of a last block: give --tune partial:1"
            )
        return {name for group in (*stages[-int(count) :], after) for name in group}

    def train(self, mode: bool = True) -> "Encoder":
        """Training mode for what learns; whole stages that are frozen stay in evaluation mode."""
        super().train(mode)
        for name in self.stages:
            stage = self.get_submodule(name)
            if not any(p.requires_grad for p in stage.parameters()):
                stage.eval()
        return self


def count_tuned_blocks(tune: str, depth: int | None = None) -> float | None:
    """How many blocks `tune` trains: None for full, 0 for linear, K for partial:K.

    Raises:
        BadInput: no such part, or more blocks than `depth`.
    """
    if tune in ("full", "linear"):
        return None if tune == "full" else 0.0
    kind, _, count = tune.partition(":")
    try:
        blocks = float(count)
    except ValueError:
        blocks = -1.0
    whole = blocks == 0.5 or (blocks >= 0 and blocks.is_integer())
    if kind != "partial" or not whole or blocks > (depth or blocks):
        most = f"{depth} blocks" if depth else "the model's depth"
        raise BadInput(
            f"tune {tune!r} is not full, linear, or partial:K with K 0, 0.5, 1, 2 ... up to {most}"
        )
    return blocks
