"""Training steps without data, ours and the peer's: how they are taken, measured and shown."""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from engine_pretrain import Masker
from lab.bench.children import Answer, Children
from lab.bench.contenders import PEERS, Arm, make_arm_masker
from lab.bench.measuring import ratios, spread, summary, table, take_turns
from util.data.randomness import make_generator
from util.data.transforms import normalize
from util.errors import BadInput, RunFailed, needs
from util.progress import say
from util.train.dist import Processes, choose_device, distribute
from util.train.memory import keep_freed_memory
from util.train.optim import create_adamw, parameter_groups
from util.train.shard import cut
from util.train.step import PRECISIONS, OptimizerStep

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---- One step ------------------------------------------------------------------------------------


def our_step(
    model: Any,
    arm: Arm,
    procs: Processes,
    masker: Masker,
) -> Callable[[], Any]:
    """One step as main_pretrain takes it: masks, normalisation, forward, backward, update.

    Args:
        model: on the device.
        masker: of its masks.
    """
    keep_freed_memory(procs.device)  # as every main does, see `util.train.dist.processes`
    model.set_grad_checkpointing(arm.checkpointing)
    if arm.sharded:
        assert dist.group.WORLD is not None
        cut(model, DeviceMesh.from_group(dist.group.WORLD, procs.device.type))
    trained = distribute(
        model, procs, compiled=arm.compiled is not None, options=compile_options(arm)
    ).train()
    groups = parameter_groups(model, 0.05)
    if arm.adamw == "fused":
        optimizer = create_adamw(groups, 1e-4, betas=(0.9, 0.95))
    else:
        foreach = arm.adamw == "foreach"
        optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), foreach=foreach)
    optimizer_step = OptimizerStep(trained, optimizer, device=procs.device, precision=arm.precision)
    size = (arm.batch, *model.input.shape)
    images = torch.randint(0, 256, size, dtype=torch.uint8).to(procs.device)
    layout = torch.channels_last if arm.channels_last else torch.contiguous_format
    grid, strategy = masker.cells.grid, masker.strategy
    drawn = [strategy.draw(grid, make_generator(0, "mask", i)) for i in range(arm.batch)]
    noise = torch.stack(drawn).to(procs.device)
    more = {
        name: (torch.rand(arm.batch, *shape) - 0.5).to(procs.device)
        for name, shape in model.draws.items()
    }

    def forward(batch: Any) -> Tensor:
        mask = masker(images, noise)
        x = normalize(images, MEAN, STD).contiguous(memory_format=layout)
        return trained(x, mask, masker.num_visible, **more)["loss"]

    return lambda: optimizer_step(forward, [None], 1e-4)


def compile_options(arm: Arm) -> dict[str, Any]:
    """torch.compile's options that its mode of this name stands for."""
    if arm.compiled in (None, "default"):
        return {}
    return dict(torch._inductor.list_mode_options(arm.compiled))


def peers_step(model: Any, arm: Arm, procs: Processes, side: int) -> Callable[[], Any]:
    """One step of a peer, with a fused AdamW and autocast as ours.

    Args:
        model: of `lab.bench.peers`, on the device.
        side: of the image, pixels.

    Raises:
        BadInput: a precision that is not measured.
    """
    model.train()
    if arm.checkpointing:
        model.gradient_checkpointing_enable()
    trained = distribute(
        model,
        procs,
        compiled=arm.compiled is not None,
        fullgraph=False,
        options=compile_options(arm),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    images = torch.randn(arm.batch, 3, side, side).to(procs.device)
    dtype = PRECISIONS[arm.precision]
    if arm.precision == "fp16":
        raise BadInput("the peer is measured in fp32 or bf16")

    def step() -> None:
        with torch.autocast(procs.device.type, dtype, enabled=arm.precision != "fp32"):
            loss = peers_loss(trained(images))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peers_loss(output: Any) -> Tensor:
    """Of what a peer gives: the loss, or transformers' output that has it."""
    return output if isinstance(output, Tensor) else output.loss


def flop_counter() -> FlopCounterMode:
    """torch's counter, which also counts the fused attention of CPUs, as it does that of GPUs.

    torch 2.15 does so by itself, 2.14 counts nothing for it.
    """
    aten = torch.ops.aten
    ours = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    missing = {op: count for op, count in ours.items() if op not in flop_registry}
    return FlopCounterMode(display=False, custom_mapping=missing)


def _attention(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(grad, q, k, v))


def count_flops(create: Callable[[], Any], arm: Arm, side: int) -> int:
    """Operations of one image, forward and backward, as torch's counter sees them in the graph.

    Matrix products, convolutions and attention, two operations a product; what is masked or not
    predicted is not in the graph, and what checkpointing computes again does not count.

    Args:
        create: makes the arm's model.
        side: of the image, pixels.
    """
    with FakeTensorMode(), flop_counter() as counter:
        model = create()
        images = torch.empty(1, 3, side, side)
        if arm.method in PEERS:
            loss = peers_loss(model(images))
        else:
            mask = torch.ones(1, math.prod(model.mask_grid), dtype=torch.bool)
            more = {name: torch.empty(1, *shape) for name, shape in model.draws.items()}
            visible = make_arm_masker(arm, model).num_visible
            loss = model(images, mask, visible, **more)["loss"]
        loss.backward()
    return counter.get_total_flops()


# ---- All arms in turns ---------------------------------------------------------------------------


def measure_steps(
    arms: Mapping[str, Arm],
    build_step: Callable[..., Answer],
    build_limit: Callable[..., Answer],
    count_arm_flops: Callable[[Arm], int],
    *,
    device: str,
    threads: int,
    steps: int,
    repeats: int,
    warmup: int,
    peak_tflops: float | None,
) -> list[dict[str, Any]]:
    """Images a second of all arms and of the matrix products of their layers, in turns.

    Args:
        build_step: (rank, arm, device, meeting file) to what takes so many steps and gives seconds
            a step; asked for "peak" it gives bytes. Called in a process of its own.
        build_limit: (rank, arm, device) to what gives operations a second; likewise.
        count_arm_flops: operations of one image.
        threads: of torch, shared out among an arm's processes.
        steps: of a repeat.
        repeats, warmup: turns that count, and turns before them.
        peak_tflops: of the device, for the MFU.

    Returns:
        `step_row` of each.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        # Compiling is work of the processor, of which a GPU's machine has many cores.
        at_once = choose_device(device, 0).type == "cuda"

        def start_team(name: str, *given: Any, count: int = 1) -> Children:
            share = max(1, threads // count)
            team = Children(name, *given, count=count, threads=share, wait=not at_once)
            stack.callback(team.close)
            return team

        teams = {
            name: start_team(name, build_step, arm, device, f"{folder}/{n}", count=arm.processes)
            for n, (name, arm) in enumerate(arms.items())
        }
        limits = {
            bound: start_team(f"limit of {arm}", build_limit, bound, device)
            for arm, bound in ((name, find_limit_arm(arm)) for name, arm in arms.items())
        }
        if at_once:
            for team in limits.values():
                team.hear()
            arms = {name: arms[name] for name in warm_up(teams)}
            teams = {name: teams[name] for name in arms}
        turns: dict[str, Callable[[], float]] = {
            name: partial(measure_images_per_second, team, arms[name], steps)
            for name, team in teams.items()
        }
        turns |= {f"limit {bound}": partial(measure_limit, team) for bound, team in limits.items()}
        found = take_turns(turns, repeats, warmup)
        peaks = {name: team.ask("peak") for name, team in teams.items()}
    return [
        step_row(name, arm, count_arm_flops(arm), found, peaks[name], next(iter(arms)), peak_tflops)
        for name, arm in arms.items()
    ]


def warm_up(teams: Mapping[str, Children]) -> list[str]:
    """Let all arms be built and compile at the same time.

    Returns:
        names of those that could; of the others it is said why, and they are left out.

    Raises:
        RunFailed: none could.
    """
    names = list(teams)
    for request in (None, "warm up"):  # what their processes answer first is that they are built
        for name in names if request else ():
            teams[name].tell(request)
        for name in tuple(names):
            try:
                teams[name].hear()
            except (BadInput, RunFailed) as error:
                names.remove(name)
                say(f"{name} is left out: {str(error).splitlines()[0]}")
    if not names:
        raise RunFailed("no arm could be measured")
    return names


def find_limit_arm(arm: Arm) -> Arm:
    """What decides the products of an arm's layers: arms that share it share their limit."""
    return Arm(
        model=arm.model,
        precision=arm.precision,
        batch=arm.batch,
        size=arm.size,
        mask_ratio=arm.mask_ratio,
    )


def measure_images_per_second(team: Children, arm: Arm, steps: int) -> float:
    """Images a second of one repeat; the slowest process counts."""
    return arm.batch * arm.processes / max(team.ask(steps))


def measure_limit(team: Children) -> float:
    """Operations a second."""
    return team.ask("")[0]


def step_row(
    name: str,
    arm: Arm,
    flops: int,
    found: dict[str, list[float]],
    peaks: list[dict[str, int]],
    base: str,
    peak_tflops: float | None,
) -> dict[str, Any]:
    """All that is known of an arm."""
    rate, limit = found[name], found[f"limit {find_limit_arm(arm)}"]
    row = {
        "arm": name,
        "settings": vars(arm),
        "images_per_s": summary(rate),
        "ratio": ratios(rate, found[base]),
        "gflops_per_image": flops / 1e9,
        "gflops_per_s": flops * summary(rate)["median"] / 1e9,
        "limit_gflops_per_s": {k: summary(limit)[k] / 1e9 for k in ("median", "min", "max")},
        "share_of_limit": summary([flops * a / b for a, b in zip(rate, limit, strict=True)]),
        "peak_bytes": [peak["peak"] for peak in peaks],
        "start_bytes": [peak["start"] for peak in peaks],
    }
    if peak_tflops is not None:
        row["mfu"] = row["gflops_per_s"] / (1000 * peak_tflops) / arm.processes
    return row


def show_steps(rows: Sequence[dict[str, Any]]) -> None:
    """The table of `step`."""
    shown = []
    for row in rows:
        line = {
            "arm": row["arm"],
            "n": row["images_per_s"]["n"],
            "images/s": row["images_per_s"]["median"],
            "min-max": spread(row["images_per_s"]),
            "ratio": f"{row['ratio']['median']:.3f}",
            "ratio min-max": f"{row['ratio']['min']:.3f}-{row['ratio']['max']:.3f}",
            "GFLOP/image": row["gflops_per_image"],
            "GFLOP/s": row["gflops_per_s"],
            "products GFLOP/s": row["limit_gflops_per_s"]["median"],
            "share": f"{row['share_of_limit']['median']:.1%}",
            "peak GiB": sum(row["peak_bytes"]) / 2**30,
            "of the step": (sum(row["peak_bytes"]) - sum(row["start_bytes"])) / 2**30,
        }
        if "mfu" in row:
            line["MFU"] = f"{row['mfu']:.1%}"
        shown.append(line)
    say(table(shown))
    say(
        "ratio: to the first arm, turn by turn. GFLOP/image: forward and backward, products, "
        "convolutions and attention. products: the rate of the arm's own matrix products alone, "
        "in the same turns; share: of it. peak: of a process of its own, all that it held; of the "
        "step: less what it held before there was a model."
    )


def draw_sweeps(found: dict[str, list[dict[str, Any]]], path: str, title: str) -> None:
    """One panel for each setting: median of images a second, bars from smallest to largest."""
    plot = needs("matplotlib.pyplot", "matplotlib")
    plot.switch_backend("agg")
    figure, axes = plot.subplots(1, len(found), figsize=(3.4 * len(found), 3.2), squeeze=False)
    for axis, (field, rows) in zip(axes[0], found.items(), strict=True):
        rates = [row["images_per_s"] for row in rows]
        names = [row["arm"].removeprefix("mae_vit_").removesuffix("_patch16") for row in rows]
        low = [rate["median"] - rate["min"] for rate in rates]
        high = [rate["max"] - rate["median"] for rate in rates]
        axis.errorbar(names, [rate["median"] for rate in rates], [low, high], marker="o", capsize=3)
        axis.set(xlabel=field, ylabel="images/s", ylim=(0, None))
    figure.suptitle(f"training step, {title}")
    figure.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plot.close(figure)
    say(f"plot        {path}")
