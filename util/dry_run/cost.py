"""What a model costs before it is built: products, activations and parameters, layer by layer.

Everything follows from the model's arguments by arithmetic. What is counted: the multiplications
and additions of matrix products (2 a pair), as `torch.utils.flop_counter` counts them, attention's
own products among them. What is not: norms, activation functions, softmax, additions, optimiser.

An activation is a tensor that the backward pass needs and that is no parameter: its size is known
from the layer's formula, its width from the precision. Temporary tensors are not counted.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

FULL, HALF = 4, 2  # bytes of a float32, and of a bf16 or fp16
# A fused backward pass of attention computes the scores again: five products for two.
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class Layer:
    """One layer, for one image.

    Attributes:
        part: encoder | decoder | head.
        products: operations of the products with weights, forward.
        attention: operations of attention's products of two activations, forward.
        full: numbers kept for the backward pass in float32 whatever the precision (what norms
            read: the residual stream, and losses).
        narrow: numbers kept in the precision of the products.
        entry: numbers that a block is computed again from with activation checkpointing; 0: a layer
            that is not computed again.
        block: which block of its part it belongs to, for what is computed again together; None: no
            block. A block's layer begins with a norm.
        last: operations of a block's last product, which is not computed again: nothing keeps what
            it gives.
        weights: numbers in its product's weights, which autocast copies.
        shared: numbers kept in the precision of the products, once for all images.
        trains: its weights learn.
    """

    part: str
    products: float = 0
    attention: float = 0
    full: float = 0
    narrow: float = 0
    entry: float = 0
    block: int | None = None
    last: float = 0
    weights: float = 0
    shared: float = 0
    trains: bool = True


@dataclass(frozen=True)
class Cost:
    """What a step costs for each image.

    Attributes:
        forward, backward: operations.
        attention: those of both that are attention's own.
        activations: bytes kept at the fullest moment.
        copies: bytes of the weights in half precision, once for all images; 0 in float32.
        shared: bytes of what else is kept once for all images: biases of attention.
    """

    forward: float
    backward: float
    attention: float
    activations: float
    copies: float
    shared: float = 0

    @property
    def total(self) -> float:
        """Operations of forward and backward."""
        return self.forward + self.backward


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def grid_of(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """(gh, gw) patches of a model's arguments."""
    (h, w), (ph, pw) = _pair(arguments["img_size"]), _pair(arguments["patch_size"])
    return h // ph, w // pw


def patch_values(arguments: Mapping[str, Any]) -> int:
    """Numbers in a patch."""
    ph, pw = _pair(arguments["patch_size"])
    return int(ph * pw * arguments.get("in_chans", 3))


def _product(tokens: float, fan_in: float, fan_out: float) -> float:
    return 2 * tokens * fan_in * fan_out


def block_layers(
    part: str,
    number: int,
    dim: int,
    heads: int,
    mlp_ratio: float,
    tokens: int,
    *,
    lscale: bool,
    queries: int | None = None,
) -> list[Layer]:
    """A transformer block: its attention half and its MLP half.

    Args:
        tokens: of the sequence.
        queries: those that the block computes; None: all of them.
        lscale: a scale on both branches, which keeps what it scales.
    """
    N, hidden = tokens, int(dim * mlp_ratio)
    M = tokens if queries is None else queries
    # The slice of a batch's last tokens is copied for the product with the query's weights.
    copied = 0 if queries is None else M * dim
    attention = Layer(
        part,
        products=_product(M, dim, 2 * dim) + _product(N, dim, 2 * dim),
        attention=2 * _product(M, N, dim),
        full=N * dim + 2 * N + M * heads,  # the norm's input and statistics, the softmax's sums
        # Normalised tokens; queries, keys, values; what attention gives; for a scale, its input.
        narrow=N * dim + copied + M * dim + 2 * N * dim + M * dim + lscale * M * dim,
        entry=N * dim,
        block=number,
        weights=4 * dim * dim,
    )
    mlp = Layer(
        part,
        products=_product(M, dim, 2 * hidden),
        full=M * dim + 2 * M,
        narrow=M * dim + 2 * M * hidden + lscale * M * dim,
        block=number,
        last=0 if lscale else _product(M, hidden, dim),
        weights=2 * dim * hidden,
    )
    return [attention, mlp]


def cross_block_layers(
    number: int,
    dim: int,
    memory_dim: int,
    heads: int,
    mlp_ratio: float,
    queries: int,
    tokens: int,
    *,
    lscale: bool,
) -> list[Layer]:
    """A block of CrossMAE's decoder: `queries` tokens read `tokens` of the encoder's width."""
    M, N, hidden = queries, tokens, int(dim * mlp_ratio)
    attention = Layer(
        "decoder",
        products=_product(M, dim, 2 * dim) + _product(N, memory_dim, 2 * dim),
        attention=2 * _product(M, N, dim),
        full=M * dim + 2 * M + 2 * N + M * heads,
        narrow=M * dim + N * memory_dim + 2 * M * dim + 2 * N * dim + lscale * M * dim,
        entry=M * dim,
        block=number,
        weights=2 * dim * dim + 2 * memory_dim * dim,
    )
    mlp = Layer(
        "decoder",
        products=_product(M, dim, 2 * hidden),
        full=M * dim + 2 * M,
        narrow=M * dim + 2 * M * hidden + lscale * M * dim,
        block=number,
        last=0 if lscale else _product(M, hidden, dim),
        weights=2 * dim * hidden,
    )
    return [attention, mlp]


def autoencoder_layers(
    arguments: Mapping[str, Any], num_visible: int, num_predicted: int | None = None
) -> list[Layer]:
    """The layers of `MaskedAutoencoderViT`, in order.

    Args:
        arguments: of the model, by name.
        num_visible: patches that the encoder sees.
        num_predicted: masked patches that are predicted; None: all of them.
    """
    gh, gw = grid_of(arguments)
    values = patch_values(arguments)
    L, K = gh * gw, num_visible
    M = L - K if num_predicted is None else num_predicted
    D, E = arguments["embed_dim"], arguments["decoder_embed_dim"]
    ratio, lscale = arguments.get("mlp_ratio", 4.0), arguments.get("lscale_init") is not None
    cross = arguments.get("decoder", "full") == "cross"
    # With mask tokens in the encoder it sees every patch, the masked ones as that token.
    tokens = 1 + (L if arguments.get("encoder_mask_tokens") else K)
    outputs = num_output_values(arguments, values)
    layers = [
        Layer("encoder", _product(K, values, D), narrow=K * values, weights=values * D),
        *(
            layer
            for i in range(arguments["depth"])
            for layer in block_layers(
                "encoder", i, D, arguments["num_heads"], ratio, tokens, lscale=lscale
            )
        ),
        Layer("encoder", full=tokens * D + 2 * tokens),  # the final norm
    ]
    heads, depth = arguments["decoder_num_heads"], arguments["decoder_depth"]
    if cross:
        mixed = arguments["depth"] + 1
        # The encoder's outputs side by side, and each block's own sum of them.
        mixing = Layer(
            "decoder",
            _product(tokens * D, mixed, depth),
            narrow=(mixed + depth) * tokens * D,
        )
        layers.append(mixing)
        for i in range(depth):
            layers += cross_block_layers(i, E, D, heads, ratio, M, tokens, lscale=lscale)
    else:
        embed = Layer("decoder", _product(tokens, D, E), narrow=tokens * D, weights=D * E)
        layers.append(embed)
        for i in range(depth):
            queries = M if i == depth - 1 else None
            layers += block_layers(
                "decoder", i, E, heads, ratio, 1 + L, lscale=lscale, queries=queries
            )
    # The norm; the product; prediction and target, which the squared error keeps.
    layers += [
        Layer("decoder", full=M * E + 2 * M),
        Layer("decoder", _product(M, E, outputs), narrow=M * E, weights=E * outputs),
        Layer("decoder", full=2 * M * outputs),
    ]
    return layers


def num_output_values(arguments: Mapping[str, Any], values: int) -> int:
    """Numbers predicted of a patch: its pixel values, or so many principal components."""
    return int(arguments.get("pca_components") or values)


def classifier_layers(arguments: Mapping[str, Any], tune: float | None = None) -> list[Layer]:
    """The layers of the classifier `VisionTransformer`, in order.

    Args:
        arguments: of the model, by name.
        tune: how many of the last blocks learn, 0.5: the last MLP; None: everything.
    """
    gh, gw = grid_of(arguments)
    values = patch_values(arguments)
    L, N, D, depth = gh * gw, 1 + gh * gw, arguments["embed_dim"], arguments["depth"]
    classes, probe = arguments["num_classes"], arguments.get("probe", False)
    lscale = arguments.get("lscale_init") is not None
    if tune == depth:
        tune = None
    layers = [Layer("encoder", _product(L, values, D), narrow=L * values, weights=values * D)]
    layers[0] = replace(layers[0], trains=tune is None)
    for i in range(depth):
        attention, mlp = block_layers(
            "encoder", i, D, arguments["num_heads"], arguments.get("mlp_ratio", 4.0), N,
            lscale=lscale,
        )  # fmt: skip
        whole = tune is None or i >= depth - int(tune)
        half = tune == 0.5 and i == depth - 1
        layers += [replace(attention, trains=whole), replace(mlp, trains=whole or half)]
    pooled = arguments.get("global_pool", "avg") == "avg"
    layers += [
        Layer("encoder", full=D + 2 if pooled else N * D + 2 * N, trains=tune != 0),
        Layer("head", full=D if probe else 0, trains=False),
        Layer("head", _product(1, D, classes), narrow=D, full=classes, weights=D * classes),
    ]
    return layers


def _with_gradient(layers: Sequence[Layer]) -> Iterator[tuple[Layer, bool]]:
    """Each layer, and whether what its product reads needs a gradient: something before learns."""
    before = False
    for layer in layers:
        yield layer, before or (layer.trains and layer.block is not None)  # its own norm
        before = before or layer.trains


def cost_of(
    layers: Sequence[Layer], *, precision: str = "fp32", grad_checkpointing: bool = False
) -> Cost:
    """What one image costs in a training step.

    Args:
        layers: in the order of the forward pass.
        precision: fp32 | bf16 | fp16; autocast's rules: products in it, norms and loss in float32.
        grad_checkpointing: blocks keep what they read and are computed again in the backward pass.
    """
    narrow = FULL if precision == "fp32" else HALF
    forward = backward = attention = kept = copies = shared = 0.0
    again: dict[tuple[str, int], float] = {}
    for layer, before in _with_gradient(layers):
        forward += layer.products + layer.attention
        attention += layer.attention
        # A copy is kept where the gradient of what the product reads needs it.
        copies += layer.weights * HALF * before if precision != "fp32" else 0
        shared += layer.shared * narrow
        if not (layer.trains or before):
            continue
        backward += layer.products * (layer.trains + before) + ATTENTION_BACKWARD * layer.attention
        attention += ATTENTION_BACKWARD * layer.attention
        saved = FULL * layer.full + narrow * layer.narrow
        if grad_checkpointing and layer.block is not None:
            key = (layer.part, layer.block)
            again[key] = again.get(key, 0) + saved
            kept += FULL * layer.entry
            backward += layer.products - layer.last + layer.attention
            attention += layer.attention
        else:
            kept += saved
    # Computed again one block after another: the largest is the fullest moment.
    kept += max(again.values(), default=0)
    return Cost(forward, backward, attention, kept, copies, shared)


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step holds on one device.

    Attributes:
        weights: all parameters and buffers in float32.
        copies: half-precision copies of the weights that autocast makes.
        biases: of attention, one of a block for all images.
        gradients: of what learns.
        optimizer: its state.
        averages: of the weights, where they are kept (EMA).
        activations: of a micro-batch.
        images: the micro-batch itself, as uint8 and as float32.
    """

    weights: float
    copies: float
    biases: float
    gradients: float
    optimizer: float
    averages: float
    activations: float
    images: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(vars(self).values())


# Numbers of state for each parameter that learns.
OPTIMIZER_STATE = {"adamw": 2, "lars": 1}


def memory_of(
    cost: Cost,
    *,
    batch_size: int,
    image_values: int,
    parameters: int,
    learning: int,
    optimizer: str,
    averages: bool = False,
) -> Memory:
    """Bytes on one device, with all of the weights there.

    Args:
        batch_size: images of a micro-batch.
        image_values: numbers in an image.
        parameters: numbers in the weights, frozen ones and buffers among them.
        learning: those that learn.
        optimizer: a key of `OPTIMIZER_STATE`.
        averages: averaged weights are kept too.
    """
    return Memory(
        weights=FULL * parameters,
        copies=cost.copies,
        biases=cost.shared,
        gradients=FULL * learning,
        optimizer=FULL * OPTIMIZER_STATE[optimizer] * learning,
        averages=FULL * parameters * averages,
        activations=cost.activations * batch_size,
        images=batch_size * image_values * (1 + FULL),
    )


def checkpoint_bytes(parameters: int, learning: int, optimizer: str, averages: bool = False) -> int:
    """Bytes of one checkpoint: weights, averaged ones, the optimiser's state; see `memory_of`."""
    return FULL * (parameters * (1 + averages) + OPTIMIZER_STATE[optimizer] * learning)


def numbered_checkpoints(epochs: int, save_every: int, keep: int) -> int:
    """Files that a run leaves; `checkpoint-last.pth` is a second name of the last numbered one."""
    if save_every == 0:
        return 1
    numbered = epochs // save_every + (epochs % save_every > 0)
    return min(numbered, keep) if keep else numbered
