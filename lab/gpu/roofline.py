"""A roofline on paper: each layer of a masked autoencoder's step on a GPU, before there is one.

python -m lab.gpu.roofline --model mae_vit_base_patch16 --batch_size 512

Operations and bytes of each kind of layer, forward, in half precision. A layer is bound by memory
where its operations for each byte are fewer than the device's (the ridge). Source of the model:
Williams, Waterman and Patterson, "Roofline", CACM 52 (2009).
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lab.bench.measuring import table
from models_zoo import model_arguments
from util.config.flags import FlagParser, number
from util.errors import command
from util.flag_types import MOST_IN_BATCH
from util.mask.strategies import count_visible
from util.progress import say

HALF, SINGLE = 2, 4  # bytes of a number


@dataclass(frozen=True)
class Device:
    """What a GPU does at most, as its maker states it.

    Attributes:
        flops: dense half-precision operations a second.
        bytes_per_s: to and from its memory.
    """

    flops: float
    bytes_per_s: float

    @property
    def ridge(self) -> float:
        """Operations for each byte at which both limits are met."""
        return self.flops / self.bytes_per_s


DEVICES = {"H100": Device(989e12, 3.35e12), "H200": Device(989e12, 4.8e12)}


@dataclass(frozen=True)
class Layer:
    """One kind of layer of a part, all of its blocks together, forward.

    Attributes:
        part: encoder or decoder. name: of the layer.
        flops: operations. moved: bytes that it reads and writes, each once.
    """

    part: str
    name: str
    flops: float
    moved: float

    @property
    def intensity(self) -> float:
        """Operations for each byte."""
        return self.flops / self.moved

    def seconds(self, device: Device) -> float:
        """The least time that it takes."""
        return max(self.flops / device.flops, self.moved / device.bytes_per_s)


def linear(rows: int, inner: int, outer: int) -> tuple[float, float]:
    """Operations and bytes of a product: rows x inner by inner x outer."""
    return 2.0 * rows * inner * outer, HALF * (rows * inner + inner * outer + rows * outer)


def blocks(
    part: str, images: int, tokens: int, width: int, depth: int, heads: int
) -> Iterator[Layer]:
    """The layers of transformer blocks with an MLP of 4 times the width."""
    rows = images * tokens
    for name, inner, outer in (
        ("qkv", width, 3 * width), ("projection", width, width),
        ("MLP, in", width, 4 * width), ("MLP, out", 4 * width, width),
    ):  # fmt: skip
        flops, moved = linear(rows, inner, outer)
        yield Layer(part, name, depth * flops, depth * moved)
    # Fused: scores stay on the chip; q, k, v are read and the output written.
    products = 2 * 2.0 * images * heads * tokens * tokens * (width // heads)
    yield Layer(part, "attention, fused", depth * products, depth * HALF * 4.0 * rows * width)
    # Each reads and writes the residual stream in single precision, as autocast keeps it.
    yield Layer(part, "LayerNorm, both", depth * 2 * 8.0 * rows * width,
                depth * 2 * rows * width * (SINGLE + HALF))  # fmt: skip
    yield Layer(part, "residual additions, both", depth * 2.0 * rows * width,
                depth * 2 * rows * width * (2 * SINGLE + HALF))  # fmt: skip
    yield Layer(part, "GELU", depth * 8.0 * rows * 4 * width, depth * 2 * HALF * rows * 4.0 * width)


def list_layers(arguments: dict[str, Any], images: int, mask_ratio: float) -> list[Layer]:
    """All layers of a step's forward pass.

    Args:
        arguments: of `MaskedAutoencoderViT`, square images and patches.
        images: of the batch.
    """
    patches = (arguments["img_size"] // arguments["patch_size"]) ** 2
    visible = count_visible(patches, mask_ratio)
    encoder = blocks(
        "encoder", images, 1 + visible, arguments["embed_dim"], arguments["depth"],
        arguments["num_heads"],
    )  # fmt: skip
    decoder = blocks(
        "decoder", images, 1 + patches, arguments["decoder_embed_dim"],
        arguments["decoder_depth"], arguments["decoder_num_heads"],
    )  # fmt: skip
    values = 3 * arguments["patch_size"] ** 2
    ends = [
        ("encoder", "patch embedding", images * visible, values, arguments["embed_dim"]),
        ("decoder", "entry", images * (1 + visible), arguments["embed_dim"],
         arguments["decoder_embed_dim"]),
        ("decoder", "prediction", images * (patches - visible), arguments["decoder_embed_dim"],
         values),
    ]  # fmt: skip
    more = [Layer(part, name, *linear(r, i, o)) for part, name, r, i, o in ends]
    return [*encoder, *decoder, *more]


def make_rows(layers: Sequence[Layer], device: Device) -> list[dict[str, Any]]:
    """Lines of the table, and their sum."""
    whole = sum(layer.seconds(device) for layer in layers)
    rows = [
        {
            "part": layer.part,
            "layer": layer.name,
            "GFLOP": layer.flops / 1e9,
            "GB": layer.moved / 1e9,
            "FLOP/B": layer.intensity,
            "bound by": "products" if layer.intensity > device.ridge else "memory",
            "ms": 1000 * layer.seconds(device),
            "share": f"{layer.seconds(device) / whole:.1%}",
        }
        for layer in layers
    ]
    flops, moved = sum(x.flops for x in layers), sum(x.moved for x in layers)
    total = {"part": "all", "layer": "", "GFLOP": flops / 1e9, "GB": moved / 1e9}
    return [*rows, total | {"FLOP/B": flops / moved, "bound by": "", "ms": 1000 * whole}]


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = FlagParser(
        description=__doc__.split("\n")[0],
        example="python -m lab.gpu.roofline --model mae_vit_base_patch16 --batch_size 512",
        first=("model", "batch_size", "mask_ratio", "gpu"),
    )
    add = parser.add_argument
    add("--model", default="mae_vit_base_patch16", help="name of the autoencoder")
    add("--batch_size", type=number(int, 1, MOST_IN_BATCH), default=512, help="images of a step")
    add("--mask_ratio", type=number(float, 0, 1), default=0.75, help="share that is hidden")
    add("--gpu", choices=list(DEVICES), default="H100", help="whose limits count")
    args: argparse.Namespace = parser.parse(argv)
    device = DEVICES[args.gpu]
    layers = list_layers(model_arguments(args.model), args.batch_size, args.mask_ratio)
    say(table(make_rows(layers, device)))
    seconds = sum(layer.seconds(device) for layer in layers)
    products = sum(layer.flops for layer in layers)
    say(
        f"ridge {device.ridge:.0f} FLOP/B. Forward and backward (3 times the forward pass) take at "
        f"least {3000 * seconds:.1f} ms: at most {args.batch_size / (3 * seconds):,.0f} images/s, "
        f"{products / seconds / device.flops:.0%} of the peak"
    )


if __name__ == "__main__":
    main()
