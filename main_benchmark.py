"""How fast this machine trains, and where the time goes; peers take turns in the same run.

python main_benchmark.py limits                               what the machine can do at most
python main_benchmark.py step --arms transformers mae mmae    training steps, without data
python main_benchmark.py data --data_path DIR                 images a second from any source
python main_benchmark.py train --data_path DIR                both together: who waits for whom
python main_benchmark.py scaling --plot PNG                   cost by batch, size, mask, model
python main_benchmark.py curves --dataset fashion_mnist       loss of two arms, step by step
python main_benchmark.py files --made DIR --count 1280000     start and memory with many files
python main_benchmark.py jpegs --made DIR --count 2000        a folder like ImageNet, to measure
"""

import argparse
import itertools
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader, RandomSampler, Sampler
from torch.utils.flop_counter import FlopCounterMode

import models_zoo
from engine_pretrain import Masker, train_one_epoch
from util.benchmark import (
    machine,
    machine_lines,
    peak_resident,
    private_memory,
    ratios,
    save_json,
    spread,
    summary,
    table,
    take_turns,
)
from util.children import Answer, Children
from util.config import METHODS, FlagParser, add_data_flags, number
from util.contenders import Arm, name_of, parse_arms
from util.datasets import DATASETS, build_dataset
from util.dist import Place, Processes, choose_device, distribute, join
from util.errors import BadInput, command, needs
from util.images import ImageSource
from util.limits import copy_rate, decode_rates, layer_shapes, matrix_rate, stopwatch
from util.logger import StepReport, say
from util.made_images import jpegs_like_imagenet, make_jpegs, make_tiny_files
from util.masking import count_visible, create_strategy
from util.optim import create_adamw, parameter_groups
from util.peers import UsualFiles, create_vitmae, one_thread
from util.randomness import EpochSampler, Key, generator_of
from util.samples import PretrainSamples, build_loader, default_workers
from util.schedule import CosineSchedule, scaled_lr
from util.step import PRECISIONS, OptimizerStep
from util.transforms import PretrainTransform, normalize

WHAT = ("limits", "step", "data", "train", "scaling", "curves", "files", "jpegs")
# The table: the peer, MAE, and what each switch gives.
ARMS = ("transformers", "mae", "mmae", "mae,cross=.34", "mae,bf16", "mae,checkpointing")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BLR, SMOOTHED = 1.5e-4, 20  # of `curves`: base rate, steps of the moving mean


def build_parser() -> FlagParser:
    """The flags."""
    parser = FlagParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=WHAT)
    group = parser.add_argument_group("what is trained")
    group.add_argument(
        "--arms",
        nargs="+",
        default=argparse.SUPPRESS,
        metavar="ARM",
        help="comma-separated words: transformers|mae|mmae, fp32|bf16|fp16, compile, "
        "checkpointing, cross=SHARE, batch=, size=, mask=, model=, processes=; ratios are to the "
        f"first. Default of step: {' '.join(ARMS)}",
    )
    group.add_argument("--model", default="mae_vit_base_patch16", metavar="NAME")
    group.add_argument("--batch_size", type=number(int, 1), default=32, help="per process")
    group.add_argument("--mask_ratio", type=number(float, 0, 1, open_low=True), default=0.75)
    add_data_flags(parser, list(DATASETS))
    group = parser.add_argument_group("data")
    group.add_argument(
        "--crop_scale", type=number(float, 0, 1, open_low=True), nargs=2, default=[0.2, 1.0]
    )
    group.add_argument("--images", type=number(int, 1), default=1024, help="of one repeat")
    group.add_argument("--usual_path", help="JPEG folder for the peer, where --data_path is none")
    group.add_argument("--made", metavar="DIR", help="new folder, for files and jpegs")
    group.add_argument("--count", type=number(int, 1), default=2000, help="files to make")
    group = parser.add_argument_group("sweeps of scaling")
    for flag, kind, values in (
        ("batches", int, [1, 4, 8, 16, 32, 64]),
        ("sizes", int, [64, 96, 128, 160, 192, 224, 320, 448]),
        ("masks", float, [0.25, 0.5, 0.6, 0.75, 0.9]),
        ("processes", int, [1, 2]),
    ):
        group.add_argument(f"--{flag}", type=number(kind, 0), nargs="*", default=values)
    names = [f"mae_vit_{size}_patch16" for size in ("tiny", "small", "base", "large")]
    group.add_argument("--models", nargs="*", default=names)
    group.add_argument("--plot", metavar="PNG", help="draw the sweeps; needs matplotlib")
    group = parser.add_argument_group("run")
    group.add_argument("--repeats", type=number(int, 1), default=5, help="turns that count")
    group.add_argument("--warmup", type=number(int, 0), default=1, help="turns before them")
    group.add_argument("--steps", type=number(int, 1), help="of a repeat: 1; of curves: 200")
    group.add_argument("--threads", type=number(int, 1), help="of torch; default: the cores")
    group.add_argument("--device", default="auto", help="auto | cpu | cuda")
    group.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0)
    group.add_argument("--peak_tflops", type=number(float, 0, open_low=True), help="for the MFU")
    group.add_argument("--json", metavar="PATH", help="write all repeats there")
    return parser


# ---- Models and their operations -----------------------------------------------------------------


def arguments_of(arm: Arm, in_chans: int = 3) -> dict[str, Any]:
    """Arguments of the arm's model; the peer's sizes are MAE's."""
    terms = METHODS["mae" if arm.method == "transformers" else arm.method]
    arguments = models_zoo.model_arguments(arm.model) | {
        "in_chans": in_chans,
        "norm_pix_loss": True,
        "lscale_init": terms["lscale_init"],
        "pos_offset": terms["pos_offset"],
    }
    if arm.size is not None:
        arguments["img_size"] = arm.size
    if arm.predict_ratio is not None:
        arguments |= {"decoder": "cross", "predict_ratio": arm.predict_ratio}
    return arguments


def create_arm(arm: Arm, in_chans: int = 3) -> Any:
    """The arm's model."""
    arguments = arguments_of(arm, in_chans)
    if arm.method == "transformers":
        return create_vitmae(arguments, arguments["img_size"], arm.mask_ratio)
    return models_zoo.create_model(arm.model, **arguments)


def strategy_of(arm: Arm) -> Any:
    """The masks of the arm's method."""
    terms = METHODS[arm.method]
    names = ("avg_share", "avg_order", "avg_temperature")
    return create_strategy(terms["mask"], **{name: terms[name] for name in names})


def flops_of(arm: Arm) -> int:
    """Operations of one image, forward and backward, as torch's counter sees them in the graph.

    Matrix products, convolutions and attention, two operations a product; what is masked or not
    predicted is not in the graph, and what checkpointing computes again does not count.
    """
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        model = create_arm(arm)
        side = arguments_of(arm)["img_size"]
        images = torch.empty(1, 3, side, side)
        if arm.method == "transformers":
            loss = model(images).loss
        else:
            patches = model.grid[0] * model.grid[1]
            mask = torch.ones(1, patches, dtype=torch.bool)
            order = None if arm.predict_ratio is None else torch.empty(1, patches)
            visible = count_visible(patches, arm.mask_ratio)
            loss = model(images, mask, visible, None, order)["loss"]
        loss.backward()
    return counter.get_total_flops()


# ---- step: training without data -----------------------------------------------------------------


def our_step(arm: Arm, procs: Processes) -> Callable[[], Any]:
    """One step as main_pretrain takes it: masks, normalisation, forward, backward, update."""
    model = create_arm(arm).to(procs.device)
    model.set_grad_checkpointing(arm.checkpointing)
    trained = distribute(model, procs, compiled=arm.compiled).train()
    optimizer = create_adamw(parameter_groups(model, 0.05), 1e-4, betas=(0.9, 0.95))
    optimizer_step = OptimizerStep(trained, optimizer, device=procs.device, precision=arm.precision)
    strategy = strategy_of(arm)
    patches = model.grid[0] * model.grid[1]
    masker = Masker(strategy, count_visible(patches, arm.mask_ratio), model.patch_size)
    size = (arm.batch, 3, *model.img_size)
    images = torch.randint(0, 256, size, dtype=torch.uint8).to(procs.device)
    drawn = [strategy.draw(model.grid, generator_of(0, "mask", i)) for i in range(arm.batch)]
    noise = torch.stack(drawn).to(procs.device)
    order = None
    if arm.predict_ratio is not None:
        order = torch.rand(arm.batch, patches).to(procs.device)

    def forward(batch: Any) -> Tensor:
        mask = masker(images, noise)
        return trained(normalize(images, MEAN, STD), mask, masker.num_visible, None, order)["loss"]

    return lambda: optimizer_step(forward, [None], 1e-4)


def peers_step(arm: Arm, procs: Processes) -> Callable[[], Any]:
    """One step of transformers' ViTMAE, with a fused AdamW and autocast as ours."""
    model = create_arm(arm).to(procs.device).train()
    if arm.checkpointing:
        model.gradient_checkpointing_enable()
    trained = distribute(model, procs, compiled=arm.compiled, fullgraph=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    side = arguments_of(arm)["img_size"]
    images = torch.randn(arm.batch, 3, side, side).to(procs.device)
    dtype = PRECISIONS[arm.precision]
    if arm.precision == "fp16":
        raise BadInput("the peer is measured in fp32 or bf16")

    def step() -> None:
        with torch.autocast(procs.device.type, dtype, enabled=arm.precision != "fp32"):
            loss = trained(pixel_values=images).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def build_step(rank: int, arm: Arm, device_name: str, meeting: str) -> Answer:
    """In a child: what takes so many steps, and gives seconds a step; "peak" gives bytes."""
    device = choose_device(device_name, rank)
    torch.manual_seed(0)
    place = Place(rank, arm.processes, rank, arm.processes, f"file://{meeting}")
    procs = join(place, device)
    if arm.method == "transformers":  # what importing it takes is not the step's
        needs("transformers.models.vit_mae.modeling_vit_mae", "transformers")
    before = peak_resident()
    step = (peers_step if arm.method == "transformers" else our_step)(arm, procs)
    seconds_of = stopwatch(device)

    def answer(request: Any) -> Any:
        if request == "peak":
            if device.type == "cuda":
                return {"peak": torch.cuda.max_memory_allocated(device), "start": 0}
            return {"peak": peak_resident(), "start": before}
        return seconds_of(lambda: [step() for _ in range(request)]) / request

    return answer


def build_limit(rank: int, arm: Arm, precision: str, device_name: str) -> Answer:
    """In a child: the rate of the matrix products of the arm's layers."""
    arguments = arguments_of(arm)
    side, patch = arguments["img_size"], arguments["patch_size"]
    patches = (side // patch) ** 2
    shapes = layer_shapes(arguments, patches, count_visible(patches, arm.mask_ratio), arm.batch)
    device = choose_device(device_name, rank)
    measure = matrix_rate(shapes, PRECISIONS[precision], device)
    return lambda request: measure()


def measure_steps(
    args: argparse.Namespace, arms: dict[str, Arm], threads: int
) -> list[dict[str, Any]]:
    """Images a second of all arms and of the matrix products of their precisions, in turns."""
    first = next(iter(arms.values()))
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        teams: dict[str, Children] = {}
        for name, arm in arms.items():
            meeting = f"{folder}/{len(teams)}"
            team = Children(
                name,
                build_step,
                *(arm, args.device, meeting),
                count=arm.processes,
                threads=max(1, threads // arm.processes),
            )
            stack.callback(team.close)
            teams[name] = team
        limits: dict[str, Children] = {}
        for precision in dict.fromkeys(arm.precision for arm in arms.values()):
            team = Children(precision, build_limit, first, precision, args.device, threads=threads)
            stack.callback(team.close)
            limits[precision] = team
        steps = args.steps or 1
        turns: dict[str, Callable[[], float]] = {
            name: partial(rate_of, team, arms[name], steps) for name, team in teams.items()
        }
        turns |= {f"limit {p}": partial(limit_of, team) for p, team in limits.items()}
        found = take_turns(turns, args.repeats, args.warmup)
        peaks = {name: team.ask("peak") for name, team in teams.items()}
    return [
        step_row(name, arm, found, peaks[name], next(iter(arms)), args.peak_tflops)
        for name, arm in arms.items()
    ]


def rate_of(team: Children, arm: Arm, steps: int) -> float:
    """Images a second of one repeat; the slowest process counts."""
    return arm.batch * arm.processes / max(team.ask(steps))


def limit_of(team: Children) -> float:
    """Operations a second."""
    return team.ask("")[0]


def step_row(
    name: str,
    arm: Arm,
    found: dict[str, list[float]],
    peaks: list[dict[str, int]],
    base: str,
    peak_tflops: float | None,
) -> dict[str, Any]:
    """All that is known of an arm."""
    flops = flops_of(arm)
    rate, limit = found[name], found[f"limit {arm.precision}"]
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
        "convolutions and attention. products: the rate of the blocks' matrix products alone, in "
        "the same turns; share: of it. peak: of a process of its own, all that it held; of the "
        "step: less what it held before there was a model."
    )


# ---- Data and training ---------------------------------------------------------------------------


class TurnSampler(Sampler[list[Key]]):
    """So many batches of a sampler in each iteration, from a new epoch whenever one ends."""

    def __init__(self, sampler: EpochSampler, batches: int) -> None:
        self.sampler, self.batches = sampler, batches
        self.epochs = itertools.count()

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[Key]]:
        left = self.batches
        while left:
            self.sampler.start(next(self.epochs))
            for batch in itertools.islice(self.sampler, left):
                left -= 1
                yield batch


@dataclass(frozen=True)
class Data:
    """A source as the mains read it, in portions of `images`."""

    source: ImageSource
    loader: DataLoader
    masker: Masker
    images: int


def side_of(args: argparse.Namespace) -> int | None:
    """--input_size as one number.

    Raises:
        BadInput: height and width differ.
    """
    if args.input_size is not None and args.input_size[0] != args.input_size[1]:
        raise BadInput(
            f"--input_size {args.input_size}: benchmarks are square, for the peer's sake"
        )
    return None if args.input_size is None else args.input_size[0]


def open_source(args: argparse.Namespace) -> ImageSource:
    """The training split that the flags name."""
    return build_dataset(args.dataset, "train", args.data_path, mean=args.mean, std=args.std)


def open_data(args: argparse.Namespace, arm: Arm, steps: int) -> Data:
    """Source, samples and loader by the flags, as main_pretrain makes them."""
    source = open_source(args)
    arguments = arguments_of(arm)
    side, patch = arguments["img_size"], arguments["patch_size"]
    grid = (side // patch,) * 2
    strategy = strategy_of(arm)
    transform = PretrainTransform((side, side), tuple(args.crop_scale))
    samples = PretrainSamples(source, transform, strategy, grid, args.seed)
    sampler = EpochSampler(len(source), arm.batch, seed=args.seed)
    workers = default_workers(1) if args.num_workers is None else args.num_workers
    pin_memory = args.pin_mem and choose_device(args.device, 0).type == "cuda"
    loader = build_loader(
        samples, TurnSampler(sampler, steps), num_workers=workers, pin_memory=pin_memory
    )
    masker = Masker(strategy, count_visible(grid[0] * grid[1], arm.mask_ratio), (patch, patch))
    return Data(source, loader, masker, steps * arm.batch)


def usual_loader(args: argparse.Namespace, data: Data, arm: Arm) -> DataLoader | None:
    """The peer on the same files, batches and workers; None: the source has no files."""
    source = data.source
    if args.usual_path is not None:
        source = build_dataset("imagefolder", "train", args.usual_path)
    if not os.path.isfile(source.file_name(0)):
        return None
    files = [source.file_name(i) for i in range(len(source))]
    side = arguments_of(arm)["img_size"]
    usual = UsualFiles(files, (side, side), tuple(args.crop_scale))
    return DataLoader(
        usual,
        batch_size=arm.batch,
        sampler=RandomSampler(usual, num_samples=data.images),
        num_workers=data.loader.num_workers,
        worker_init_fn=one_thread,
        persistent_workers=data.loader.num_workers > 0,
        pin_memory=data.loader.pin_memory,
    )


def benchmark_data(args: argparse.Namespace, arms: dict[str, Arm], threads: int) -> Any:
    """Images a second of the loader, masks' noise and normalisation included, and of the peer."""
    arm, device = only(arms, "data"), choose_device(args.device, 0)
    torch.set_num_threads(1)  # the loading processes are what is measured
    data = open_data(args, arm, max(1, args.images // arm.batch))
    seconds_of = stopwatch(device)

    def ours() -> float:
        def read() -> None:
            for batch in data.loader:
                images = batch["image"].to(device, non_blocking=True)
                batch["noise"].to(device, non_blocking=True)
                normalize(images, data.source.mean, data.source.std)

        return data.images / seconds_of(read)

    turns = {"ours": ours}
    peer = usual_loader(args, data, arm)
    if peer is None:
        say("the source has no files of its own: no peer; --usual_path names a JPEG folder for it")
    else:

        def usual() -> float:
            def read() -> None:
                for batch in peer:
                    batch.to(device, non_blocking=True)

            return data.images / seconds_of(read)

        turns = {"PIL + torchvision v1": usual, "ours": ours}
    found = take_turns(turns, args.repeats, args.warmup)
    cores = max(1, data.loader.num_workers)
    base = next(iter(found.values()))
    rows = [
        {
            "arm": name,
            "images_per_s": summary(rates),
            "images_per_s_and_core": summary([rate / cores for rate in rates]),
            "ratio": ratios(rates, base),
        }
        for name, rates in found.items()
    ]
    say(f"{len(data.source):,} images; {data.images} a repeat, {data.loader.num_workers} workers")
    show_rates(rows)
    return rows


def show_rates(rows: Sequence[dict[str, Any]]) -> None:
    """A table of rates and their ratios."""
    shown = [
        {
            "arm": row["arm"],
            "n": row["images_per_s"]["n"],
            "images/s": row["images_per_s"]["median"],
            "min-max": spread(row["images_per_s"]),
            "a core": row.get("images_per_s_and_core", {}).get("median"),
            "ratio": row["ratio"]["median"],
            "ratio min-max": spread(row["ratio"]),
        }
        for row in rows
    ]
    say(table(shown))


def only(arms: dict[str, Arm], what: str) -> Arm:
    """The one arm of ours that a benchmark can use.

    Raises:
        BadInput: several, the peer, or several processes.
    """
    arm = next(iter(arms.values()))
    if len(arms) > 1 or arm.method == "transformers" or arm.processes > 1:
        raise BadInput(
            f"{what} takes one arm of ours on one process (mae or mmae), not {' '.join(arms)}"
        )
    return arm


@dataclass(frozen=True)
class Training:
    """A training run by the engine, some steps at a time."""

    arm: Arm
    data: Data
    trained: nn.Module
    optimizer_step: OptimizerStep
    schedule: Callable[[int], float]

    def run(self, loader: Any, first_step: int, after_step: Callable[[StepReport], bool]) -> int:
        """One epoch of the loader."""
        return train_one_epoch(
            self.trained,
            loader,
            self.optimizer_step,
            self.data.masker,
            self.schedule,
            mean=self.data.source.mean,
            std=self.data.source.std,
            jitter=False,
            partial=self.arm.predict_ratio is not None,
            first_step=first_step,
            after_step=after_step,
        )


def open_training(args: argparse.Namespace, arm: Arm, data: Data, total_steps: int) -> Training:
    """Model and optimiser as main_pretrain makes them, on one process."""
    device = choose_device(args.device, 0)
    torch.manual_seed(args.seed)
    model = create_arm(arm, data.source.channels).to(device)
    model.set_grad_checkpointing(arm.checkpointing)
    trained = distribute(model, Processes(0, 1, 0, 1, device), compiled=arm.compiled)
    lr = scaled_lr(BLR, arm.batch)
    optimizer = create_adamw(parameter_groups(model, 0.05), lr, betas=(0.9, 0.95))
    step = OptimizerStep(trained, optimizer, device=device, precision=arm.precision)
    return Training(
        arm, data, trained, step, CosineSchedule(lr, 0.0, total_steps / 10, total_steps)
    )


def benchmark_train(args: argparse.Namespace, arms: dict[str, Arm], threads: int) -> Any:
    """Step alone, data alone, and both together through the engine, in turns."""
    arm, device = only(arms, "train"), choose_device(args.device, 0)
    torch.set_num_threads(threads)
    steps = args.steps or max(1, args.images // arm.batch)
    data = open_data(args, arm, steps)
    training = open_training(args, arm, data, steps * (args.repeats + args.warmup) * 2)
    kept = next(iter(data.loader))
    seconds_of, waited = stopwatch(device), [0.0]

    def note(report: StepReport) -> bool:
        waited[0] += report.waited
        return False

    def step_alone() -> float:
        return data.images / seconds_of(lambda: training.run([kept] * steps, 0, note))

    def data_alone() -> float:
        return data.images / seconds_of(lambda: [None for _ in data.loader])

    shares: list[float] = []

    def together() -> float:
        waited[0] = 0.0
        seconds = seconds_of(lambda: training.run(data.loader, 0, note))
        shares.append(waited[0] / seconds)
        return data.images / seconds

    turns = {"step alone": step_alone, "data alone": data_alone, "together": together}
    found = take_turns(turns, args.repeats, args.warmup)
    rows = [
        {"arm": name, "images_per_s": summary(rates), "ratio": ratios(rates, found["together"])}
        for name, rates in found.items()
    ]
    waiting = summary(shares[args.warmup :])
    show_rates(rows)
    slower = min(("step alone", "data alone"), key=lambda name: summary(found[name])["median"])
    shared = ", and both share its cores" if device.type == "cpu" else ""
    say(
        f"the bottleneck is the {slower.split()[0]}; the training process waits for data "
        f"{waiting['median']:.1%} of the time{shared}"
    )
    return {"rows": rows, "waiting": waiting, "bottleneck": slower.split()[0]}


def loss_curve(args: argparse.Namespace, arm: Arm, steps: int) -> list[float]:
    """Losses of an arm, step by step, on the images and masks that the seed says."""
    data = open_data(args, arm, steps)
    losses: list[Tensor] = []

    def note(report: StepReport) -> bool:
        losses.append(report.result.loss)
        return False

    open_training(args, arm, data, steps).run(data.loader, 0, note)
    return torch.stack(losses).double().tolist()


def benchmark_curves(args: argparse.Namespace, arms: dict[str, Arm], threads: int) -> Any:
    """How far the loss of each arm is from the first one's, raw and as a moving mean."""
    torch.set_num_threads(threads)
    curves = {}
    for name, arm in arms.items():
        curves[name] = loss_curve(args, only({name: arm}, "curves"), args.steps or 200)
    base = next(iter(curves.values()))
    rows = []
    for name, curve in curves.items():
        rows.append(
            {
                "arm": name,
                "steps": len(curve),
                "first loss": curve[0],
                "last loss": curve[-1],
                "largest difference": f"{apart(curve, base):.3%}",
                f"of means over {SMOOTHED}": f"{apart(smooth(curve), smooth(base)):.3%}",
            }
        )
    say(table(rows))
    return {"rows": rows, "curves": curves}


def smooth(curve: Sequence[float]) -> list[float]:
    """Means over `SMOOTHED` steps in a row; of all, where there are fewer."""
    width = min(SMOOTHED, len(curve))
    return [sum(curve[i : i + width]) / width for i in range(len(curve) - width + 1)]


def apart(curve: Sequence[float], base: Sequence[float]) -> float:
    """Largest relative difference of two curves."""
    return max(abs(a - b) / abs(b) for a, b in zip(curve, base, strict=True))


# ---- Limits, sweeps, many files ------------------------------------------------------------------


def benchmark_limits(args: argparse.Namespace, arms: dict[str, Arm], threads: int) -> Any:
    """Matrix products in each precision, memory, and decoding, in turns."""
    arm, device = next(iter(arms.values())), choose_device(args.device, 0)
    torch.set_num_threads(threads)
    precisions = ["fp32", "bf16", *(["fp16"] if device.type == "cuda" else [])]
    limits = {p: build_limit(0, arm, p, args.device) for p in precisions}
    turns: dict[str, Callable[[], float]] = {
        f"products {p}, GFLOP/s": partial(scaled, partial(limit, None), 1e-9)
        for p, limit in limits.items()
    }
    turns["copy, GB/s read and written"] = partial(scaled, copy_rate(device), 1e-9)
    files = decode_rates(list(jpegs_like_imagenet(64, args.seed)))
    turns |= {f"{name}, images/s a core": measure for name, measure in files.items()}
    found = {k: summary(v) for k, v in take_turns(turns, args.repeats, args.warmup).items()}
    say(
        table(
            [
                {"limit": name, "n": f["n"], "median": f["median"], "min-max": spread(f)}
                for name, f in found.items()
            ]
        )
    )
    return found


def scaled(measure: Callable[[], float], factor: float) -> float:
    """A measurement in another unit."""
    return factor * measure()


def benchmark_scaling(args: argparse.Namespace, arms: dict[str, Arm], threads: int) -> Any:
    """Images a second against each setting alone, the others as given."""
    arm = next(iter(arms.values()))
    if args.plot:
        needs("matplotlib.pyplot", "matplotlib")  # now, not after the measurements
    found: dict[str, list[dict[str, Any]]] = {}
    for field, values in (
        ("batch", args.batches),
        ("size", args.sizes),
        ("mask_ratio", args.masks),
        ("model", args.models),
        ("processes", args.processes),
    ):
        # Two processes: half the batch each, so that the step is the same step.
        sweep = {
            str(value): replace(
                arm,
                **{field: value},
                **({"batch": max(1, arm.batch // value)} if field == "processes" else {}),
            )
            for value in values
        }
        if not sweep:
            continue
        say(f"\n{field}:")
        rows = measure_steps(args, sweep, threads)
        show_steps(rows)
        found[field] = rows
    if args.plot:
        draw_sweeps(found, args.plot, name_of(arm, Arm()))
    return found


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


def build_start(rank: int, given: argparse.Namespace) -> Answer:
    """In a child: opens the data set, and gives the seconds of it and the number of images."""

    def answer(request: Any) -> tuple[float, int]:
        found: list[int] = []
        seconds = stopwatch(torch.device("cpu"))(lambda: found.append(len(open_source(given))))
        return seconds, found[0]

    return answer


def build_growth(rank: int, given: argparse.Namespace, arm: Arm) -> Answer:
    """In a child: reads images, and gives each worker's own memory after a tenth and at the end."""

    def answer(request: Any) -> dict[str, list[int]]:
        steps = max(4, given.images // arm.batch)
        data = open_data(given, arm, steps)
        sizes: dict[str, list[int]] = {}
        for step, _ in enumerate(data.loader, 1):
            if step in (max(2, steps // 10), steps):
                workers = sorted(child.pid or 0 for child in multiprocessing.active_children())
                sizes["early" if step < steps else "late"] = [private_memory(p) for p in workers]
        return sizes

    return answer


def benchmark_files(args: argparse.Namespace, arms: dict[str, Arm], threads: int) -> Any:
    """First and second start on a folder of many files, and the memory of the workers."""
    arm = only(arms, "files")
    if args.made is not None:
        say(f"making {args.count:,} files in {args.made}")
        make_tiny_files(Path(args.made), args.count)
        args.dataset, args.data_path = "imagefolder", args.made
    if args.num_workers == 0:
        raise BadInput("files measures the memory of workers; give --num_workers 1 or more")
    starts, memory = [], {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["MMAE_CACHE"] = cache  # the children's: the first start finds none
        for _ in range(1 + args.repeats):
            child = Children("the start", build_start, args, threads=1)
            ((seconds, images),) = child.ask("start")
            child.close()
            starts.append(seconds)
        child = Children("an epoch", build_growth, args, arm, threads=1)
        (memory,) = child.ask("read")
        child.close()
        del os.environ["MMAE_CACHE"]
    growth = [b - a for a, b in zip(memory["early"], memory["late"], strict=True)]
    later = summary(starts[1:])
    say(f"{images:,} images: first start {starts[0]:.2f} s, later ones {later['median']:.2f} s")
    say(
        f"workers' own memory, MiB: {[round(m / 2**20) for m in memory['early']]} after a tenth, "
        f"{[round(m / 2**20) for m in memory['late']]} at the end of {args.images:,} images"
    )
    return {
        "images": images,
        "first_start_s": starts[0],
        "later_start_s": later,
        "worker_bytes": memory,
        "growth_bytes": growth,
    }


def benchmark_step(args: argparse.Namespace, arms: dict[str, Arm], threads: int) -> Any:
    """Training steps of all arms, in turns."""
    rows = measure_steps(args, arms, threads)
    show_steps(rows)
    return rows


BENCHMARKS: dict[str, Callable[[argparse.Namespace, dict[str, Arm], int], Any]] = {
    "limits": benchmark_limits,
    "step": benchmark_step,
    "data": benchmark_data,
    "train": benchmark_train,
    "scaling": benchmark_scaling,
    "curves": benchmark_curves,
    "files": benchmark_files,
}
DEFAULT_ARMS = {"step": list(ARMS), "curves": ["mmae,fp32", "mmae,bf16"]}


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run one benchmark; see the module."""
    args = build_parser().parse(argv)
    if args.what in ("jpegs", "files") and args.made is None and args.data_path is None:
        raise BadInput(f"{args.what} needs --made DIR, a new folder for {args.count:,} files")
    if args.what == "jpegs":
        make_jpegs(Path(args.made), args.count)
        say(f"{args.count:,} files  --data_path {args.made}")
        return
    base = Arm(
        model=args.model, batch=args.batch_size, size=side_of(args), mask_ratio=args.mask_ratio
    )
    texts = vars(args).get("arms") or DEFAULT_ARMS.get(args.what, ["mmae"])
    arms = parse_arms(texts, base)
    for arm in arms.values():
        models_zoo.model_arguments(arm.model)
    device = choose_device(args.device, 0)
    about = machine(device)
    threads = args.threads or about["cores"]
    about["threads"] = threads
    say("\n".join([*machine_lines(about), f"{args.what}; {threads} threads", ""]))
    result = BENCHMARKS[args.what](args, arms, threads)
    save_json(args.json, args.what, about, result)


if __name__ == "__main__":
    main()
