"""Batch normalisation over all processes, against torch's over the whole batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import start_group, wait
from torch import Tensor, nn

from models_batchnorm import GlobalBatchNorm

C = 5
TORCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Values around 3, from a seed."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 3).to(dtype)


def set_affine(norm: nn.Module) -> None:
    """Weights and biases other than 1 and 0."""
    if norm.weight is not None:
        with torch.no_grad():
            norm.weight.copy_(draw(100, C))
            norm.bias.copy_(draw(101, C))


# ---- One process -------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [(), (4,), (3, 2)])
@pytest.mark.parametrize(
    "settings",
    [{}, {"affine": False, "eps": 1e-6}, {"momentum": None}, {"track_running_stats": False}],
)
def test_one_process_is_torch_bit_for_bit(tail: tuple[int, ...], settings: dict[str, Any]) -> None:
    ours, torchs = GlobalBatchNorm(C, **settings), TORCH[2 + len(tail)](C, **settings)
    for norm in (ours, torchs):
        set_affine(norm)
    for step in range(5):  # the last one in evaluation
        inputs, outputs = [], []
        for norm in (ours, torchs):
            norm.train(step < 4)
            inputs.append(draw(step, 8, C, *tail, dtype=torch.float32).requires_grad_())
            outputs.append(norm(inputs[-1]))
            outputs[-1].square().sum().backward()
        assert torch.equal(*outputs)
        assert torch.equal(inputs[0].grad, inputs[1].grad)
        for mine, theirs in zip(ours.parameters(), torchs.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad)
        for mine, theirs in zip(ours.buffers(), torchs.buffers(), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("affine", [True, False])
def test_state_dicts_interchange_with_torchs(affine: bool) -> None:
    ours, torchs = GlobalBatchNorm(C, affine=affine), nn.BatchNorm1d(C, affine=affine)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    x = draw(0, 6, C, dtype=torch.float32)
    for trained, loaded in ((ours, torchs), (torchs, ours)):
        set_affine(trained)
        trained.reset_running_stats()
        trained(x)
        loaded.load_state_dict(trained.state_dict(), strict=True)
        assert loaded.num_batches_tracked == 1
        assert torch.equal(loaded.eval()(x + 1), trained.eval()(x + 1))
        loaded.train()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_input_that_is_not_finite_leaves_the_running_statistics(
    bad: float, momentum: float | None
) -> None:
    norm, untouched = GlobalBatchNorm(C, momentum=momentum), GlobalBatchNorm(C, momentum=momentum)
    good = [draw(seed, 6, C, dtype=torch.float32) for seed in range(2)]
    broken = good[0].clone()
    broken[2, 3] = bad
    for x in (broken, good[0], broken, good[1]):
        output = norm(x)
        assert output.isfinite().all() == (x is not broken)  # the loss must show the fault
    for x in good:
        untouched(x)
    assert norm.num_batches_tracked == 2
    assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), untouched.buffers(), strict=True))


def test_two_forward_passes_before_the_backward_pass() -> None:
    norm = GlobalBatchNorm(C)
    (norm(draw(0, 6, C).float()).sum() + norm(draw(1, 6, C).float()).square().sum()).backward()
    assert norm.weight.grad.isfinite().all() and norm.num_batches_tracked == 2


def test_the_host_never_waits() -> None:
    # Meta tensors have no values: whatever reads one on the host raises.
    norm = GlobalBatchNorm(C, device="meta")
    assert norm(torch.ones(4, C, device="meta")).shape == (4, C)


@pytest.mark.parametrize("shape", [(C,), (2, C + 1), (2, 3, C)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    for norm in (GlobalBatchNorm(C), GlobalBatchNorm(C).eval()):
        with pytest.raises(ValueError, match=rf"expected \[B, {C}, \.\.\.\]"):
            norm(torch.ones(shape))


def test_one_value_per_channel_has_no_variance() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        GlobalBatchNorm(C)(torch.ones(1, C))


# ---- Several processes -------------------------------------------------------------------------

# Name: (shape behind the channels, settings).
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "vectors": ((), {}),
    "vectors, linear probing": ((), {"affine": False, "eps": 1e-6}),
    "maps": ((3, 2), {"momentum": 0.3}),
    "plain mean": ((4,), {"momentum": None}),
    "no running statistics": ((), {"track_running_stats": False}),
}
SIZES = {2: (2, 5), 3: (1, 4, 2)}  # images of each process
EMPTY = {2: (4, 0), 3: (0, 3, 2)}
STEPS = 3


def results(norm: nn.Module, tail: tuple[int, ...], rows: slice, total: int) -> dict[str, Any]:
    """Outputs and gradients of a few steps for these rows of the batch, then the buffers."""
    norm.double()
    set_affine(norm)
    found: dict[str, Any] = {"output": [], "input": []}
    for step in range(STEPS):
        x = draw(step, total, C, *tail)[rows].requires_grad_()
        output = norm(x)
        (output * draw(50 + step, total, C, *tail)[rows]).sum().backward()
        found["output"].append(output.detach())
        found["input"].append(x.grad)
    found["affine"] = [p.grad for p in norm.parameters()]
    found["buffers"] = list(norm.buffers())
    found["evaluation"] = norm.eval()(draw(99, 2, C, *tail)).detach()
    return found


def far_off(total: int) -> Tensor:
    """Float32 values whose mean is 10,000 deviations away from 0."""
    return ((draw(7, total, C) - 3) / 2 + 1e4).float()


def normalise(rank: int, world: int, folder: Path) -> None:
    """One of several processes: all cases, its results into a file."""
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for kind, sizes in (("", SIZES[world]), (", one empty", EMPTY[world])):
        rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        for name, (tail, settings) in CASES.items():
            norm = GlobalBatchNorm(C, **settings)
            found[name + kind] = results(norm, tail, rows, sum(sizes))

    rows = slice(sum(SIZES[world][:rank]), sum(SIZES[world][: rank + 1]))
    norm = GlobalBatchNorm(C)
    found["far off"] = norm(far_off(sum(SIZES[world]))[rows]).detach(), norm.running_var

    norm = GlobalBatchNorm(C)
    with torch.autocast("cpu", torch.bfloat16):
        output = norm(draw(8, sum(SIZES[world]), C)[rows].bfloat16())
    found["autocast"] = output.detach(), norm.running_mean, norm.running_var

    norm = GlobalBatchNorm(C, momentum=None)
    x = draw(9, sum(SIZES[world]), C).float()[rows]
    norm(x * (torch.nan if rank == 1 else 1.0))
    first = [b.clone() for b in norm.buffers()]
    norm(x)
    before = [b.clone() for b in norm.buffers()]
    norm(x * (torch.inf if rank == 1 else 1.0))
    found["not finite"] = first, before, list(norm.buffers())
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Results of each process."""
    world, folder = request.param, tmp_path_factory.mktemp("batchnorm")
    assert wait(start_group(normalise, world, folder)) == [0] * world
    return [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in range(world)]


def assert_close(one: Tensor, other: Tensor) -> None:
    """Float64, relative to values of order 1."""
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["", ", one empty"])
@pytest.mark.parametrize("name", CASES)
def test_unequal_batches_are_as_one_batch(ranks: list[dict], name: str, kind: str) -> None:
    tail, settings = CASES[name]
    found = [rank[name + kind] for rank in ranks]
    total = sum((EMPTY if kind else SIZES)[len(ranks)])
    whole = results(TORCH[2 + len(tail)](C, **settings), tail, slice(None), total)
    for step in range(STEPS):
        for key in ("output", "input"):
            assert_close(torch.cat([f[key][step] for f in found]), whole[key][step])
    for i, gradient in enumerate(whole["affine"]):
        assert_close(sum(f["affine"][i] for f in found), gradient)
    assert len(whole["buffers"]) == (3 if settings.get("track_running_stats", True) else 0)
    for i, buffer in enumerate(whole["buffers"]):
        for f in found:
            assert_close(f["buffers"][i], buffer)
            assert torch.equal(f["buffers"][i], found[0]["buffers"][i])
    for f in found:
        assert_close(f["evaluation"], whole["evaluation"])


@pytest.mark.dist
def test_a_mean_far_from_zero_does_not_cancel(ranks: list[dict]) -> None:
    x = far_off(sum(SIZES[len(ranks)])).double()
    reference = nn.BatchNorm1d(C).double()
    output = torch.cat([rank["far off"][0] for rank in ranks]).double()
    # Float32 numbers near 10,000 are 1e-3 apart; the mean of squares would be off by 8.
    torch.testing.assert_close(output, reference(x), rtol=0, atol=3e-3)
    running_var = ranks[0]["far off"][1].double()
    torch.testing.assert_close(running_var, reference.running_var, rtol=1e-3, atol=0)


@pytest.mark.dist
def test_statistics_are_float32_under_autocast(ranks: list[dict]) -> None:
    x = draw(8, sum(SIZES[len(ranks)]), C).bfloat16()
    reference = nn.BatchNorm1d(C)
    expected = reference(x.float()).detach()
    outputs = torch.cat([rank["autocast"][0] for rank in ranks])
    assert outputs.dtype == torch.bfloat16
    torch.testing.assert_close(outputs.float(), expected, rtol=2**-8, atol=1e-5)
    for _, mean, var in (rank["autocast"] for rank in ranks):  # in bf16 they would be off by 1e-2
        torch.testing.assert_close(mean, reference.running_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(var, reference.running_var, rtol=1e-6, atol=1e-6)


@pytest.mark.dist
def test_one_process_that_is_not_finite_leaves_the_statistics_of_all(ranks: list[dict]) -> None:
    reference = nn.BatchNorm1d(C, momentum=None)
    untouched = [b.clone() for b in reference.buffers()]
    reference(draw(9, sum(SIZES[len(ranks)]), C).float())
    for first, before, after in (rank["not finite"] for rank in ranks):
        assert all(torch.equal(a, b) for a, b in zip(first, untouched, strict=True))
        for a, b in zip(before, reference.buffers(), strict=True):  # fp32, one step
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
