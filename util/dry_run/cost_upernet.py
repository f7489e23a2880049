"""What UPerNet on a vision transformer costs: its layers for `util.dry_run.cost`, from its
arguments.

Norms are BatchNorm, which autocast leaves in the precision of the products; the losses are float32.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from util.dry_run.cost import Layer, block_layers, grid_of, patch_values

Map = tuple[int, int]


def segmenter_layers(arguments: Mapping[str, Any], factors: Sequence[float]) -> list[Layer]:
    """The layers of `UperNet` in training, on images of its own size, in order.

    Args:
        arguments: of the model, `UperNet.arguments`.
        factors: how many times as fine as the patches each map of its neck is.
    """
    (gh, gw), D = grid_of(arguments), arguments["embed_dim"]
    H, W = arguments["img_size"]
    maps = [(max(1, int(gh * f)), max(1, int(gw * f))) for f in factors]
    return [
        *_encoder_layers(arguments, gh * gw, patch_values(arguments)),
        *_neck_layers(gh * gw, D, factors, maps),
        *_head_layers(arguments, [h * w for h, w in maps]),
        *_auxiliary_layers(arguments, maps[arguments["aux_tap"]]),
        # Log-probabilities of both outputs, enlarged to the image; its labels as int64.
        Layer("head", full=2 * arguments["num_classes"] * H * W + 2 * H * W),
    ]


def _encoder_layers(arguments: Mapping[str, Any], L: int, values: int) -> list[Layer]:
    D, heads, N = arguments["embed_dim"], arguments["num_heads"], 1 + L
    layers = [Layer("encoder", 2 * L * values * D, narrow=L * values, weights=values * D)]
    lscale = arguments.get("lscale_init") is not None
    for i in range(arguments["depth"]):
        layers += block_layers("encoder", i, D, heads, arguments["mlp_ratio"], N, lscale=lscale)
        if arguments["relative_bias"]:  # one of a block for all images
            layers.append(Layer("encoder", shared=heads * N * N))
    return layers


def _neck_layers(L: int, D: int, factors: Sequence[float], maps: Sequence[Map]) -> list[Layer]:
    def up(tokens: int) -> Layer:
        """A transposed 2 x 2 convolution."""
        return Layer("neck", 2 * tokens * 4 * D * D, narrow=tokens * D, weights=4 * D * D)

    layers: list[Layer] = []
    for factor, (h, w) in zip(factors, maps, strict=True):
        if factor == 4:  # between the two a norm and a GELU, which keep what they read
            layers += [up(L), Layer("neck", narrow=2 * 4 * L * D), up(4 * L)]
        elif factor == 2:
            layers.append(up(L))
        elif factor < 1:  # the maximum: its input, and where it was, as int64
            layers.append(Layer("neck", full=2 * h * w * D, narrow=L * D))
    return layers


def _conv(tokens: int, fan_in: int, fan_out: int, kernel: int, *, norm: bool = True) -> Layer:
    """A convolution of the heads; with a norm and a ReLU, which keep its output and their own."""
    weights = fan_in * fan_out * kernel**2
    kept = tokens * fan_in + 2 * norm * tokens * fan_out
    return Layer("head", 2 * tokens * weights, narrow=kept, weights=weights)


def _head_layers(arguments: Mapping[str, Any], tokens: Sequence[int]) -> list[Layer]:
    D, C, K = (arguments[name] for name in ("embed_dim", "channels", "num_classes"))
    scales = arguments["pool_scales"]
    *finer, coarsest = tokens
    return [
        Layer("head", narrow=coarsest * D),  # what the pools read
        *(_conv(side**2, D, C, 1) for side in scales),
        _conv(coarsest, D + len(scales) * C, C, 3),
        *(_conv(count, D, C, 1) for count in finer),
        *(_conv(count, C, C, 3) for count in finer),
        _conv(tokens[0], len(tokens) * C, C, 3),
        _conv(tokens[0], C, K, 1, norm=False),
    ]


def _auxiliary_layers(arguments: Mapping[str, Any], size: Map) -> list[Layer]:
    D, C, K = (arguments[name] for name in ("embed_dim", "aux_channels", "num_classes"))
    count = size[0] * size[1]
    return [_conv(count, D, C, 3), _conv(count, C, K, 1, norm=False)]
