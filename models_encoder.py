"""What an encoder owes to all that handles it: fine-tuning, kNN, prediction, segmentation.

Callers import it from `models_protocols`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from models_batchnorm import GlobalBatchNorm
from util.errors import BadInput
from util.spec import InputSpec, Pair


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
        mlp: how names inside of a stage begin that are its MLP's, with its norm and scale: what
            `partial:0.5` trains of the last one. Empty: a stage has none.
        moved: names in files whose tensors `fit_weights` takes under other names.
    """

    input: InputSpec
    num_features: int
    pools: ClassVar[Sequence[str]] = ("avg",)
    stages: Sequence[str] = ()
    plain_blocks: ClassVar[bool] = False
    mlp: ClassVar[Sequence[str]] = ()
    moved: ClassVar[Sequence[str]] = ()
    feature_info: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def fit_arguments(cls, stored: Mapping[str, Any], size: Pair | None) -> dict[str, Any]:
        """The constructor's arguments for an encoder that is to be used.

        Args:
            stored: arguments that its weights are of. size: (height, width) of the images; None:
                as there.
        """
        return {**stored, **({} if size is None else {"img_size": list(size)})}

    @classmethod
    def for_any_size(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The constructor's arguments for an encoder whose `pyramid` takes images of any size."""
        return dict(arguments)

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
                f"{self.called} cannot pool by {global_pool!r}, only by "
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
    def called(self) -> str:
        """What messages call it."""
        return f"an encoder of kind {getattr(self, 'kind', type(self).__name__)}"

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
            token = "; it has no class token" if kind == "cls" and "cls" not in self.pools else ""
            raise BadInput(
                f"{self.called} has no features {kind!r}, only {', '.join(self.pools)}{token}"
            )
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
        raise BadInput(f"{self.called} gives no maps for segmentation")

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
            raise BadInput(f"{self.called} cannot compute its activations again")

    def tuned_names(self, tune: str) -> set[str]:
        """See `PartlyTuned`; the units are the stages."""
        count = count_tuned_blocks(tune, len(self.stages))
        first, *stages, after = self.layer_groups()
        if count is None or count == len(stages):
            return {name for group in (first, *stages, after) for name in group}
        if count == 0:
            return {name for name in after if name.startswith("head.")}
        if count == 0.5 and not self.mlp:
            raise BadInput(f"{self.called} has no MLP of a last block: give --tune partial:1")
        if count == 0.5:
            inside = tuple(f"{self.stages[-1]}.{name}" for name in self.mlp)
            return {name for name in stages[-1] if name.startswith(inside)} | set(after)
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
