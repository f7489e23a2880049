"""Parameter groups and optimisers."""

from typing import Any

import torch
from torch import nn


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
    """AdamW, fused: one kernel for all parameters, which can also skip an update on the device."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
