"""The names that other programs give to the tensors of our encoders.

The file of an encoder's names registers them here, and `util.weights` applies them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from util.names import Registry

Weights = dict[str, Tensor]

EPS = 1e-6  # of MAE's LayerNorms; what other programs' files say goes before it


@dataclass(frozen=True)
class Style:
    """How a program names the tensors of one kind of encoder.

    Attributes:
        recognises: whether the keys of a file are its names. One key tells: of a file that mixes
            names, the others come out as unexpected when it is loaded.
        read: weights in our names, and what was left out, of weights and the file's name. A key
            that no rule knows keeps its name, so that the strict loading names it.
        write: weights of ours in its names.
        arguments: what its config.json says of the model (`model_args` of our class, and more), of
            the configuration and the file's name; None: it has no such file.
        config: that file, of our arguments, eps and names of classes.
    """

    recognises: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Tensor], str], tuple[Weights, list[str]]]
    write: Callable[[Mapping[str, Tensor]], Weights]
    arguments: Callable[[Mapping[str, Any], str], dict[str, Any]] | None = None
    config: Callable[[Mapping[str, Any], float, list[str] | None], dict[str, Any]] | None = None


# In the order in which a file is tried; what none recognises has our names, which are timm's.
STYLES: Registry[Style] = Registry("program that writes weights")
