"""Parameter groups and optimisers."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from util.errors import BadInput
from util.train.shard import local, optimizer_parts, total_norm


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """MAE's pretraining groups: no decay on 1-D parameters, nor where the model asks for none.

    Tokens are 3-D and so decayed, as in the official code. Frozen parameters are left out.

    Args:
        model: may have `no_weight_decay() -> set of names`.

    Returns:
        two groups with `params`, `weight_decay` and the names of their parameters.
    """
    exempt: set[str] = getattr(model, "no_weight_decay", set)()
    groups: list[dict[str, Any]] = [
        {"weight_decay": weight_decay, "params": [], "param_names": []},
        {"weight_decay": 0.0, "params": [], "param_names": []},
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = groups[parameter.ndim <= 1 or name in exempt]
            group["params"].append(parameter)
            group["param_names"].append(name)
    return groups


def create_adamw(
    groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW, fused: one kernel for all parameters, which can also skip an update on the device.

    Not fused on Apple's GPUs: nothing says that the kernel there leaves a step out.
    """
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    fused = "mps" not in devices
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)

    def keep(optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group["fused"] = fused

    # A checkpoint's groups say what was right where it was written.
    optimizer.register_load_state_dict_post_hook(keep)
    return optimizer


def load_moments(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Go on with what an optimiser knows of each parameter, at the settings of this start.

    torch would take decay, betas and the layers' factors from the file too: with --allow_changes a
    run would say that they are others now, and train with the old ones. The rate is the file's
    until the next step sets it: a resume says what it was.

    Args:
        state: `state_dict()` of an optimiser of the same kind, without shards.

    Raises:
        BadInput: other parameters learnt in the checkpoint's run than learn now.
    """
    own, saved = optimizer.state_dict()["param_groups"], state["param_groups"]
    counts = [[len(group["params"]) for group in groups] for groups in (saved, own)]
    names = [[group.get("param_names") for group in groups] for groups in (saved, own)]
    if counts[0] != counts[1] or (None not in names[0] and names[0] != names[1]):
        raise BadInput(
            f"other parameters learn than in the run of the checkpoint ({sum(counts[1])} tensors, "
            f"there {sum(counts[0])}): its optimiser cannot go on with them; give the flags that "
            "decide it (--tune, --positions) as there, or take the weights alone into another "
            "--output_dir"
        )
    kept = ("params", "lr")
    groups = [
        mine | {name: its[name] for name in kept} for mine, its in zip(own, saved, strict=True)
    ]
    optimizer.load_state_dict(optimizer_parts(optimizer, {**state, "param_groups": groups}))


def layer_decay_groups(
    model: nn.Module, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Groups whose learning rate falls from output to input, for fine-tuning (BEiT, MAE).

    Layer `i` of `n` has the factor `layer_decay ** (n - 1 - i)`: for ViT-B, n = 14, the embeddings
    have .65 ** 13, block i .65 ** (12 - i), what comes after the blocks 1. Parameters of at most
    one dimension are not decayed, nor those that the model names (MAE: position code and class
    token).

    Args:
        model: has `layer_groups() -> list of lists of parameter names`, from input to output, and
            `no_weight_decay() -> set of names`.
        layer_decay: in (0, 1]; 1 gives all parameters the full rate.

    Returns:
        at most two groups a layer, decayed and not, from input to output, with `params`,
        `param_names`, `weight_decay` and `lr_scale` (see `util.train.step`). Frozen parameters are
        left out, and so are groups without any.

    Raises:
        BadInput: `layer_decay` out of range.
        ValueError: a trainable parameter that stands in no layer, or in more than one.
    """
    if not 0 < layer_decay <= 1:
        raise BadInput(
            f"layer_decay {layer_decay} must be above 0 and at most 1; 1 gives every layer the "
            "full learning rate"
        )
    described = cast(Any, model)
    layers: list[list[str]] = described.layer_groups()
    exempt: set[str] = described.no_weight_decay()
    homes: dict[str, list[int]] = {}
    for layer, names in enumerate(layers):
        for name in names:
            homes.setdefault(name, []).append(layer)

    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if len(homes.get(name, [])) != 1:
            raise ValueError(
                f"parameter {name} must stand in exactly one of the {len(layers)} layers of "
                f"layer_groups(), it stands in {homes.get(name) or 'none'}"
            )
        layer, plain = homes[name][0], parameter.ndim <= 1 or name in exempt
        new: dict[str, Any] = {
            "weight_decay": 0.0 if plain else weight_decay,
            "lr_scale": layer_decay ** (len(layers) - 1 - layer),
            "params": [],
            "param_names": [],
        }
        group = groups.setdefault((layer, plain), new)
        group["params"].append(parameter)
        group["param_names"].append(name)
    return [groups[key] for key in sorted(groups)]


class LARS(torch.optim.Optimizer):
    """Momentum SGD whose step is a set fraction of each parameter's norm (You et al., 1708.03888).

    For more than one dimension, as MAE uses it for linear probing (arXiv 2111.06377, A.1):
    g += weight_decay p; g *= trust_coefficient |p| / |g|, or 1 where a norm is 0. For biases and
    norms neither. Then v = momentum v + g and p -= lr v.

    It leaves out a step like a fused optimiser: where the tensor `found_inf` is not 0, neither
    parameter nor momentum changes, and the host need not know. So it works in `util.train.step`.
    Norms of parameters in shards are those of the whole parameter.

    Args:
        params: parameters or groups; a group may have `lr`, `weight_decay`, `momentum` and
            `trust_coefficient` of its own.

    Raises:
        ValueError: a negative setting.
    """

    # Asks GradScaler to set `found_inf` and `grad_scale` here, not to read them on the host.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            for name in defaults:
                if not group[name] >= 0:
                    raise ValueError(f"LARS: {name} {group[name]} must not be negative")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns what `closure` returns, which may compute the gradients anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        skip = None if found_inf is None else found_inf.reshape(()) != 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    gradient = p.grad if grad_scale is None else p.grad / grad_scale
                    self._update(p, gradient, group, skip)
        return loss

    def _update(
        self, p: Tensor, gradient: Tensor, group: dict[str, Any], skip: Tensor | None
    ) -> None:
        trust: float | Tensor = 1.0
        if p.ndim > 1:
            gradient = gradient.add(p, alpha=group["weight_decay"])
            p_norm, norm = total_norm([p]), total_norm([gradient])
            ratio = group["trust_coefficient"] * p_norm / norm
            trust = ratio.where((p_norm > 0) & (norm > 0), 1.0)
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        # From here on each entry is by itself, so shards need no more than their own.
        old, before = local(p), local(state["momentum_buffer"])
        velocity = before * group["momentum"] + local(gradient) * trust
        moved = old - group["lr"] * velocity
        if skip is not None:  # chosen, not multiplied by 0: the gradient may be NaN
            velocity, moved = before.where(skip, velocity), old.where(skip, moved)
        before.copy_(velocity)
        old.copy_(moved)


def create_lars(groups: list[dict[str, Any]], lr: float) -> LARS:
    """LARS with momentum .9 and trust coefficient .001 (MAE's linear probing)."""
    return LARS(groups, lr)
