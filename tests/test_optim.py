"""Parameter groups for fine-tuning, and LARS."""

import copy
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models_zoo import create_model
from util.errors import BadInput
from util.train.optim import LARS, create_adamw, create_lars, layer_decay_groups
from util.train.step import OptimizerStep

# ---- Layer decay -------------------------------------------------------------------------------

# MAE's recipe, by hand: what a ViT-B block holds, and whether it is decayed.
BLOCK = {
    "norm1.weight": False, "norm1.bias": False,
    "attn.qkv.weight": True, "attn.qkv.bias": False,
    "attn.proj.weight": True, "attn.proj.bias": False,
    "ls1.gamma": False,
    "norm2.weight": False, "norm2.bias": False,
    "mlp.fc1.weight": True, "mlp.fc1.bias": False,
    "mlp.fc2.weight": True, "mlp.fc2.bias": False,
    "ls2.gamma": False,
}  # fmt: skip
BEFORE = {
    "cls_token": False, "pos_embed": False,
    "patch_embed.proj.weight": True, "patch_embed.proj.bias": False,
}  # fmt: skip
AFTER = {
    "fc_norm.weight": False, "fc_norm.bias": False, "head.weight": True, "head.bias": False,
}  # fmt: skip


def collect_settings(groups: Iterable[dict]) -> dict[str, tuple[float, float]]:
    """Each parameter's (lr_scale, weight_decay)."""
    return {n: (g["lr_scale"], g["weight_decay"]) for g in groups for n in g["param_names"]}


def test_every_parameter_of_vit_base() -> None:
    model = create_model("vit_base_patch16", lscale_init=0.1)
    expected = {name: (0.65**13, 0.05 * decayed) for name, decayed in BEFORE.items()}
    for i in range(12):
        for name, decayed in BLOCK.items():
            expected[f"blocks.{i}.{name}"] = (0.65 ** (12 - i), 0.05 * decayed)
    expected |= {name: (1.0, 0.05 * decayed) for name, decayed in AFTER.items()}
    groups = layer_decay_groups(model, weight_decay=0.05, layer_decay=0.65)
    assert collect_settings(groups) == expected
    # Each name stands beside its own parameter, and nothing is in twice.
    pairs = [p for g in groups for p in zip(g["param_names"], g["params"], strict=True)]
    assert len(pairs) == len(expected) and len(groups) == 2 * 14
    named = dict(model.named_parameters())
    assert all(parameter is named[name] for name, parameter in pairs)
    flat = layer_decay_groups(model, weight_decay=0.05, layer_decay=1.0)
    assert collect_settings(flat) == {name: (1.0, decay) for name, (_, decay) in expected.items()}


class Stack(nn.Module):
    """Three layers: a token, a matrix with a bias, a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 2))
        self.linear = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(2))
        self.layers = [["token"], ["linear.weight", "linear.bias"], ["scale"]]

    def layer_groups(self) -> list[list[str]]:
        return self.layers

    def no_weight_decay(self) -> set[str]:
        return {"token"}


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    model = Stack()
    model.token.requires_grad_(False)
    model.linear.bias.requires_grad_(False)
    model.layers[0] = []  # a frozen parameter need not stand in a layer
    groups = layer_decay_groups(model, 0.1, 0.5)
    assert [g["param_names"] for g in groups] == [["linear.weight"], ["scale"]]
    assert collect_settings(groups) == {"linear.weight": (0.5, 0.1), "scale": (1.0, 0.0)}


@pytest.mark.parametrize("layer_in", [[], [0, 1], [1, 1]])
def test_a_parameter_must_stand_in_one_layer(layer_in: list[int]) -> None:
    model = Stack()
    model.layers[2] = []
    for layer in layer_in:
        model.layers[layer].append("scale")
    with pytest.raises(ValueError, match="parameter scale must stand in exactly one of the 3"):
        layer_decay_groups(model, 0.1, 0.5)


@pytest.mark.parametrize("layer_decay", [0.0, -0.5, 1.5, float("nan")])
def test_layer_decay_out_of_range(layer_decay: float) -> None:
    with pytest.raises(BadInput, match="must be above 0 and at most 1"):
        layer_decay_groups(Stack(), 0.1, layer_decay)


def test_the_step_applies_the_scale() -> None:
    model = Stack()
    optimizer = create_adamw(layer_decay_groups(model, 0.0, 0.5), 1.0, (0.9, 0.999))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = OptimizerStep(model, optimizer, device=torch.device("cpu"))
    step(lambda _: sum(p.sum() for p in model.parameters()), [None], lr=0.1)
    # Adam's first step is the learning rate, whatever the gradient; fp32, tolerance 1e-6.
    for name, rate in {"token": 0.025, "linear.weight": 0.05, "scale": 0.1}.items():
        moved = before[name] - model.get_parameter(name)
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=0, atol=1e-6)


# ---- LARS --------------------------------------------------------------------------------------

# Name: (start, gradient scale, weight decay); the groups differ in learning rate as well.
SHAPES: dict[str, tuple[tuple[int, ...], float, float]] = {
    "matrix": ((4, 3), 1.0, 0.1),
    "kernel": ((2, 3, 2), 5.0, 0.0),
    "zero": ((2, 2), 1.0, 0.1),
    "still": ((3, 2), 0.0, 0.0),
    "shrinking": ((3, 2), 0.0, 0.1),
    "bias": ((3,), 1.0, 0.1),
}
RATES = {"matrix": 0.3, "kernel": 0.5, "zero": 0.3, "still": 0.5, "shrinking": 0.3, "bias": 0.3}


def start(generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Values of all parameters, float64."""
    values = {name: generator.normal(size=shape) for name, (shape, _, _) in SHAPES.items()}
    return values | {"zero": np.zeros(SHAPES["zero"][0])}


def test_lars_is_the_formula() -> None:
    generator = np.random.default_rng(0)
    values = start(generator)
    parameters = {name: nn.Parameter(torch.tensor(v)) for name, v in values.items()}
    groups = [
        {"params": [p], "weight_decay": SHAPES[name][2], "lr": RATES[name]}
        for name, p in parameters.items()
    ]
    optimizer = create_lars(groups, lr=99.0)  # every group has its own
    velocity = {name: np.zeros_like(v) for name, v in values.items()}
    for number in range(5):
        for name, (shape, size, weight_decay) in SHAPES.items():
            g = generator.normal(size=shape) * size
            parameters[name].grad = torch.tensor(g)
            p = values[name]
            if name != "bias":
                g = g + weight_decay * p
                p_norm, g_norm = np.sqrt((p * p).sum()), np.sqrt((g * g).sum())
                if p_norm > 0 and g_norm > 0:
                    g = g * 0.001 * p_norm / g_norm
            velocity[name] = 0.9 * velocity[name] + g
            values[name] = p - RATES[name] * velocity[name]
        optimizer.step()
        for name, p in parameters.items():  # float64
            expected = torch.tensor(values[name])
            torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)
        if number == 0:
            assert not np.array_equal(values["zero"], np.zeros((2, 2))), "gradient taken whole"
    assert torch.equal(parameters["still"], torch.tensor(start(np.random.default_rng(0))["still"]))


def make(settings: dict | None = None) -> tuple[nn.Sequential, LARS]:
    """A small model and its optimiser, always the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    return model, LARS(model.parameters(), lr=0.5, weight_decay=0.1, **(settings or {}))


def set_gradients(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    """Gradients from a seed."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator) * scale


def everything(model: nn.Module, optimizer: LARS) -> list[Tensor]:
    """Copies of all parameters and all momentum."""
    momentum = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
    return [t.detach().clone() for t in (*model.parameters(), *momentum)]


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("skipped_at", [0, 2])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_found_inf_leaves_all_as_it_is(skipped_at: int, shape: tuple[int, ...]) -> None:
    model, optimizer = make()
    reference, reference_optimizer = make()
    kept: list[Tensor] = []  # before the first step there is no momentum to keep
    for number in range(4):
        optimizer.found_inf = torch.zeros(shape)
        if number == skipped_at:
            optimizer.found_inf = torch.ones(shape)
            set_gradients(model, number, torch.nan)
            optimizer.step()
            if kept:
                assert_equal(everything(model, optimizer), kept)
            optimizer.found_inf = torch.zeros(shape)
        set_gradients(model, number)
        set_gradients(reference, number)
        optimizer.step()
        reference_optimizer.step()
        kept = everything(model, optimizer)
        assert_equal(kept, everything(reference, reference_optimizer))


def test_grad_scale_divides_the_gradient() -> None:
    model, optimizer = make()
    reference, reference_optimizer = make()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(64.0), torch.zeros(())
    for number in range(3):
        set_gradients(model, number, 64.0)
        set_gradients(reference, number)
        optimizer.step()
        reference_optimizer.step()
    # A power of two only moves the exponent.
    assert_equal(everything(model, optimizer), everything(reference, reference_optimizer))


def test_the_host_never_waits() -> None:
    # Meta tensors have no values: whatever reads one on the host raises.
    with torch.device("meta"):
        model = nn.Linear(3, 2)
        optimizer = LARS(model.parameters(), lr=0.1, weight_decay=0.1)
        optimizer.found_inf, optimizer.grad_scale = torch.ones(()), torch.ones(())
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        bool(optimizer.found_inf)  # the guard itself bites


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_with_a_loss_that_is_not_finite_is_skipped(precision: str) -> None:
    model, optimizer = make()
    step = OptimizerStep(model, optimizer, device=torch.device("cpu"), precision=precision)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))

    def run(factor: float) -> tuple[list[Tensor], float]:
        result = step(lambda _: model(x).float().square().mean() * factor, [None], lr=0.5)
        return everything(model, optimizer), result.skipped.item()

    first, skipped = run(0.1)
    assert skipped == 0 and optimizer.param_groups[0]["lr"] == 0.5
    same, skipped = run(torch.nan)
    assert skipped == 1
    assert_equal(same, first)
    after, skipped = run(0.1)
    assert skipped == 0
    assert not any(torch.equal(a, b) for a, b in zip(after, first, strict=True))


def test_resume_is_bit_identical(tmp_path: Path) -> None:
    model, optimizer = make()
    for number in range(6):
        if number == 3:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, tmp_path / "state.pt")
        set_gradients(model, number)
        optimizer.step()
    again, again_optimizer = make({"momentum": 0.5, "trust_coefficient": 1.0})  # the file's win
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(state["model"])
    again_optimizer.load_state_dict(state["optimizer"])
    for number in range(3, 6):
        set_gradients(again, number)
        again_optimizer.step()
    assert_equal(everything(again, again_optimizer), everything(model, optimizer))


def test_a_closure_computes_the_gradients() -> None:
    model, optimizer = make()
    before = copy.deepcopy(model.state_dict())

    def closure() -> Tensor:
        loss = model(torch.ones(2, 4)).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    assert not any(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "settings", [{"lr": -1.0}, {"momentum": -0.1}, {"weight_decay": -1.0},
                 {"trust_coefficient": float("nan")}],
)  # fmt: skip
def test_lars_refuses_what_cannot_work(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        LARS([nn.Parameter(torch.ones(2))], **({"lr": 0.1} | settings))
