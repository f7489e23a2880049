"""How fast this machine trains, and where the time goes; peers take turns in the same run.

python -m lab.bench limits                               what the machine can do at most
python -m lab.bench step --arms transformers mae mmae    training steps, without data
python -m lab.bench data --data_path DIR                 images a second from any source
python -m lab.bench train --data_path DIR                both together: who waits for whom
python -m lab.bench scaling --plot PNG                   cost by batch, size, mask, model
python -m lab.bench curves --dataset fashion_mnist       loss of two arms, step by step
python -m lab.bench files --made DIR --count 1280000     start and memory with many files
python -m lab.bench jpegs --made DIR --count 2000        a folder like ImageNet, to measure
"""

import argparse
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.utils.data import DataLoader

import models_layers
import models_zoo
from engine_pretrain import Masker, PretrainLoss
from engine_train import train_steps
from lab.bench.children import Answer
from lab.bench.contenders import (
    ATTENTION,
    METHODS,
    PEERS,
    Arm,
    is_simmim,
    make_arm_masker,
    name_arm,
    parse_arms,
    preset_terms,
)
from lab.bench.data_speed import (
    TurnSampler,
    compare_reads,
    few,
    has_files,
    pack_copies,
    packed_folder,
    usual_files,
)
from lab.bench.limits import (
    copy_rate,
    decode_rates,
    layer_shapes,
    linear_shapes,
    matrix_rate,
    show_limits,
    stopwatch,
)
from lab.bench.made_images import jpegs_like_imagenet, make_jpegs, make_tiny_files
from lab.bench.many_files import measure_files
from lab.bench.measuring import (
    machine,
    machine_lines,
    peak_resident,
    save_json,
    take_turns,
)
from lab.bench.peers import OfficialMAE, SwinMIM, create_vitmae
from lab.bench.step_speed import (
    compile_options,
    count_flops,
    draw_sweeps,
    measure_steps,
    our_step,
    peers_step,
    show_steps,
)
from lab.bench.training_speed import Train, compare_curves, measure_together
from util.config.flag_parser import load_plugins
from util.config.flags import FlagParser, add_data_flags, add_device_flag, add_view_flags, number
from util.data.datasets import DATASETS, build_dataset
from util.data.randomness import EpochSampler, evenly
from util.data.samples import Drawn, Samples, build_loader, default_workers
from util.data.source import Source, Subset
from util.data.transforms import pretrain_transform
from util.errors import BadInput, command, needs
from util.flag_types import MOST_IN_BATCH, MOST_SIDE, expanded_path, processes_flag
from util.mask.strategies import count_visible
from util.progress import say
from util.spec import Shape
from util.train.dist import Place, Processes, choose_device, distribute, join
from util.train.logger import StepReport, prepare_folder
from util.train.optim import create_adamw, parameter_groups
from util.train.schedule import CosineSchedule, scaled_lr
from util.train.step import PRECISIONS, OptimizerStep

WHAT = ("limits", "step", "data", "train", "scaling", "curves", "files", "jpegs")
# The table of docs/speed.md: the peer, MAE, and what each switch gives.
ARMS = ("transformers", "mae", "mmae", "mae,cross=.34", "mae,bf16", "mae,checkpointing")
BLR = 1.5e-4  # of train and curves: base rate
MOST_WARMING = 120  # seconds that an arm waits for the memory of others
WARM_STEPS = 3  # CUDA graphs are recorded in the second, and replayed from the third on
CROPS = 4  # of each decoded image, in data's row of several
PACKED = {"dataset": "imagefolder", "train_images": None}  # flags of a copy: it holds what is read


def build_parser() -> FlagParser:
    """The flags."""
    parser = FlagParser(
        description=__doc__.split("\n")[0],
        example="python -m lab.bench step --arms transformers mae mmae",
        first=(
            "what", "arms", "model", "batch_size", "input_size", "data_path", "dataset", "repeats",
            "threads", "device", "json", "plot",
        ),
    )  # fmt: skip
    parser.add_argument("what", choices=WHAT, help="what to measure")
    group = parser.add_argument_group("what is trained")
    group.add_argument(
        "--arms",
        nargs="+",
        default=argparse.SUPPRESS,
        metavar="ARM",
        help=f"comma-separated words: {'|'.join(METHODS)}, fp32|bf16|fp16, compile[=MODE], "
        "checkpointing, cross=SHARE, partial=SHARE, adamw=, channels_last, shard, batch=, size=, "
        f"mask=, model=, processes=; ratios are to the first; default of step: {' '.join(ARMS)}",
    )
    group.add_argument(
        "--model",
        default="mae_vit_base_patch16",
        metavar="NAME",
        help="autoencoder; main_pretrain.py --list_models prints the names",
    )
    group.add_argument(
        "--batch_size", type=number(int, 1, MOST_IN_BATCH), default=32, help="images per process"
    )
    group.add_argument(
        "--mask_ratio",
        type=number(float, 0, 1, open_low=True),
        default=0.75,
        help="share of the patches that are hidden",
    )
    add_data_flags(parser, list(DATASETS))
    add_view_flags(parser)
    group = parser.add_argument_group("data, benchmarks")
    group.add_argument("--images", type=number(int, 1), default=1024, help="images of one repeat")
    group.add_argument(
        "--usual_path",
        type=expanded_path,
        help="JPEG folder for the peer, where --data_path is none; default: --data_path",
    )
    group.add_argument(
        "--packed_path",
        type=expanded_path,
        help="folder for the packed copies that data makes; default: one beside --data_path, which "
        "is removed at the end",
    )
    group.add_argument(
        "--made",
        type=expanded_path,
        metavar="DIR",
        help="new folder for files and jpegs; no default",
    )
    group.add_argument("--count", type=number(int, 1), default=2000, help="files to make")
    group = parser.add_argument_group("sweeps of scaling")
    mask = number(float, 0, 1, open_low=True, open_high=True)
    sides = [64, 96, 128, 160, 192, 224, 320, 448]
    for flag, kind, values, what in (
        ("batches", number(int, 1, MOST_IN_BATCH), [1, 4, 8, 16, 32, 64], "sizes of the batch"),
        ("sizes", number(int, 1, MOST_SIDE), sides, "sides of the image, in pixels"),
        ("masks", mask, [0.25, 0.5, 0.6, 0.75, 0.9], "shares of hidden patches"),
        ("processes", processes_flag(1), [1, 2], "numbers of processes"),
    ):
        group.add_argument(
            f"--{flag}", type=kind, nargs="*", default=values, help=f"{what}; none: no such sweep"
        )
    names = [f"mae_vit_{size}_patch16" for size in ("tiny", "small", "base", "large")]
    group.add_argument(
        "--models", nargs="*", default=names, help="models of that sweep; none: no such sweep"
    )
    group.add_argument(
        "--plot",
        type=expanded_path,
        metavar="PNG",
        help="draw the sweeps there (needs matplotlib); default: no plot",
    )
    group = parser.add_argument_group("run")
    group.add_argument(
        "--repeats", type=number(int, 1), default=5, help="measured turns of each arm"
    )
    group.add_argument(
        "--warmup", type=number(int, 0), default=1, help="turns before those that count"
    )
    group.add_argument(
        "--steps",
        type=number(int, 1),
        help="steps of a repeat; default: 1, of curves 200, of others by --images",
    )
    group.add_argument(
        "--threads", type=processes_flag(1), help="threads of torch; default: the cores"
    )
    add_device_flag(group)
    group.add_argument(
        "--seed", type=number(int, 0, 2**32 - 1), default=0, help="seed of weights, masks and order"
    )
    group.add_argument(
        "--peak_tflops",
        type=number(float, 0, open_low=True),
        help="what the device can do at most, for the MFU; default: no MFU",
    )
    group.add_argument(
        "--json",
        type=expanded_path,
        metavar="PATH",
        help="write all repeats there; default: nowhere",
    )
    return parser


# ---- Models and their operations -----------------------------------------------------------------


def arm_arguments(arm: Arm, in_chans: int = 3) -> dict[str, Any]:
    """Arguments of the arm's model; the peer's sizes are MAE's."""
    terms = preset_terms(arm)
    arguments = models_zoo.model_arguments(arm.model) | {"in_chans": in_chans}
    if not is_simmim(arm):
        terms = {name: terms[name] for name in ("lscale_init", "pos_offset")}
        arguments |= {"norm_pix_loss": True, **terms}
    if arm.size is not None:
        arguments["img_size"] = arm.size
    if arm.decoder != "full":
        arguments |= {"decoder": arm.decoder, "predict_ratio": arm.predict_ratio}
    if arm.decoder == "partial":
        arguments["predict_cell"] = preset_terms(arm).get("mask_cell", [1])[0]
    return arguments


def create_arm(arm: Arm, in_chans: int = 3) -> Any:
    """The arm's model."""
    arguments = arm_arguments(arm, in_chans)
    if arm.method == "transformers":
        return create_vitmae(arguments, arguments["img_size"], arm.mask_ratio)
    if arm.method == "official":
        return OfficialMAE(arguments, arguments["img_size"], arm.mask_ratio)
    if arm.method == "transformers_simmim":
        return SwinMIM(arguments, arm.mask_ratio)
    return models_zoo.create_model(arm.model, **arguments)


def count_arm_flops(arm: Arm) -> int:
    """Operations of one image, forward and backward, see `count_flops`."""
    return count_flops(lambda: create_arm(arm), arm, arm_arguments(arm)["img_size"])


# ---- What measures in a process of its own -----------------------------------------------------


def build_step(rank: int, arm: Arm, device_name: str, meeting: str) -> Answer:
    """In a child: what takes so many steps, and gives seconds a step; "peak" gives bytes."""
    device = choose_device(device_name, rank)
    torch.manual_seed(0)
    place = Place(rank, arm.processes, rank, arm.processes, f"file://{meeting}")
    procs = join(place, device)
    if arm.sharded and arm.processes == 1:  # shards need a group, also one of a single process
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=place.rendezvous, rank=0, world_size=1)
    if arm.method == "transformers_simmim":
        needs("transformers.models.swin.modeling_swin", "transformers")
    if arm.method == "transformers":  # what importing it takes is not the step's
        needs("transformers.models.vit_mae.modeling_vit_mae", "transformers")
    before = peak_resident()
    model = create_arm(arm).to(device)
    if arm.method in PEERS:
        step = peers_step(model, arm, procs, arm_arguments(arm)["img_size"])
    else:
        step = our_step(model, arm, procs, make_arm_masker(arm, model))
    step = with_attention(step, arm.attention)
    seconds_of = stopwatch(device)
    if device.type == "cuda":
        return on_a_gpu(step, device)

    def answer(request: Any) -> Any:
        if request == "peak":
            return {"peak": peak_resident(), "start": before}
        return seconds_of(lambda: [step() for _ in range(request)]) / request

    return answer


def with_attention(step: Callable[[], Any], name: str | None) -> Callable[[], Any]:
    """A step whose attention is computed by one of torch's kernels alone; None: by its choice.

    For a process of its own: our models then leave the choice of few tokens to it, too.
    """
    if name is None:
        return step
    models_layers.FEW_TOKENS = 0

    def chosen() -> Any:
        with sdpa_kernel(ATTENTION[name]):
            return step()

    return chosen


def on_a_gpu(step: Callable[[], Any], device: torch.device) -> Answer:
    """What answers for a step whose GPU is shared with other arms, which take turns on it.

    "warm up" compiles: all arms do it at the same time. Where the others' memory leaves none, an
    arm waits and tries again. Before a turn one step is taken that does not count, and after it
    the memory is given back, since that of all arms together does not fit.
    """

    def warm_up() -> None:
        end = time.monotonic() + MOST_WARMING
        while True:
            try:
                for _ in range(WARM_STEPS):
                    step()
                torch.cuda.synchronize(device)
                return
            except RuntimeError as error:  # cuBLAS and cuDNN have errors of their own for it
                full = re.search(r"out of memory|ALLOC_FAILED", str(error), re.I)
                if full is None or time.monotonic() > end:
                    raise
            torch.cuda.empty_cache()
            time.sleep(1)

    def answer(request: Any) -> Any:
        if request == "peak":
            return {"peak": torch.cuda.max_memory_allocated(device), "start": 0}
        if request == "warm up":
            warm_up()
            seconds = 0.0
            torch.cuda.reset_peak_memory_stats(device)
        else:
            step()
            seconds = stopwatch(device)(lambda: [step() for _ in range(request)]) / request
        torch.cuda.empty_cache()
        return seconds

    return answer


def build_limit(rank: int, arm: Arm, device_name: str) -> Answer:
    """In a child: the rate of the matrix products of the arm's layers."""
    arguments = arm_arguments(arm)
    if is_simmim(arm):
        shapes = linear_shapes(models_zoo.create_model(arm.model, **arguments), arm.batch)
    else:
        patches = (arguments["img_size"] // arguments["patch_size"]) ** 2
        visible = count_visible(patches, arm.mask_ratio)
        shapes = layer_shapes(arguments, patches, visible, arm.batch)
    device = choose_device(device_name, rank)
    measure = matrix_rate(shapes, PRECISIONS[arm.precision], device)
    return lambda request: measure()


def run_steps(args: argparse.Namespace, arms: dict[str, Arm], threads: int) -> list[dict[str, Any]]:
    """Training steps of all arms, in turns; the table is printed."""
    rows = measure_steps(
        arms,
        build_step,
        build_limit,
        count_arm_flops,
        device=args.device,
        threads=threads,
        steps=args.steps or 1,
        repeats=args.repeats,
        warmup=args.warmup,
        peak_tflops=args.peak_tflops,
    )
    show_steps(rows)
    return rows


# ---- Data ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BenchmarkData:
    """A source as the mains read it, in portions of `images`."""

    source: Source
    loader: DataLoader
    masker: Masker
    images: int


def square_side(args: argparse.Namespace) -> int | None:
    """--input_size as one number.

    Raises:
        BadInput: height and width differ.
    """
    if args.input_size is not None and args.input_size[0] != args.input_size[1]:
        raise BadInput(
            f"--input_size {args.input_size}: benchmarks are square, for the peer's sake"
        )
    return None if args.input_size is None else args.input_size[0]


def open_source(args: argparse.Namespace, decoder: str = "pil") -> Source:
    """The training split that the flags name."""
    source = build_dataset(
        args.dataset,
        "train",
        args.data_path,
        mean=args.mean,
        std=args.std,
        max_pixels=args.max_pixels,
    )
    source = source.with_decoder(decoder)
    if args.train_images is not None:
        source = Subset(source, evenly(len(source), args.train_images))
    return source


def open_samples(args: argparse.Namespace, arm: Arm, source: Source) -> Samples:
    """Views and noise of its masks, as main_pretrain makes them of the same flags."""
    side = arm_arguments(arm)["img_size"]
    transform = pretrain_transform(
        args.augment,
        args.decode,
        (side, side),
        tuple(args.crop_scale),
        flip=not args.no_flip,
        channels=source.channels,
        margin=source.eval_margin,
        interpolation=args.interpolation,
    )
    masker, draws = plan_masks(arm)
    drawn = Drawn(masker.strategy, masker.cells.grid, draws)
    return Samples(source, transform, args.seed, drawn)


def plan_masks(arm: Arm) -> tuple[Masker, Mapping[str, Shape]]:
    """An arm's masks, and what its samples draw beside them; a peer's are those of our model."""
    with torch.device("meta"):  # no weights, and no random numbers for them
        model = models_zoo.create_model(arm.model, **arm_arguments(arm))
    return make_arm_masker(arm, model), {} if arm.method in PEERS else model.draws


def open_data(args: argparse.Namespace, arm: Arm, steps: int) -> BenchmarkData:
    """Source, samples and loader by the flags, as main_pretrain makes them."""
    source = open_source(args, args.decode)
    samples = open_samples(args, arm, source)
    sampler = EpochSampler(
        len(source), arm.batch, seed=args.seed, crops_per_image=args.crops_per_decode
    )
    loader = build_loader(
        samples,
        TurnSampler(sampler, steps),
        num_workers=default_workers(1) if args.num_workers is None else args.num_workers,
        pin_memory=args.pin_mem and choose_device(args.device, 0).type == "cuda",
        prefetch_factor=args.prefetch_factor,
    )
    masker, _ = plan_masks(arm)
    return BenchmarkData(source, loader, masker, steps * arm.batch)


def open_loader(args: argparse.Namespace, arm: Arm, steps: int) -> DataLoader:
    """The loader of `open_data`."""
    return open_data(args, arm, steps).loader


def benchmark_data(args: argparse.Namespace, arms: dict[str, Arm], threads: int) -> Any:
    """Images a second of one core: the peer, ours, several crops, packed copies; in turns."""
    arm = only(arms, "data")
    crops = args.crops_per_decode if args.crops_per_decode > 1 else CROPS
    source = few(open_source(args, args.decode))
    sources = {"ours": (source, 1), f"ours, {crops} crops a decode": (source, crops)}
    # Refused now, not after the packing.
    EpochSampler(len(source), arm.batch, crops_per_image=crops)
    peers = source
    if args.usual_path is not None:
        peers = few(build_dataset("imagefolder", "train", args.usual_path))
    if args.augment != "random_crop" or args.no_flip:
        say("the peer always crops at random and flips, whatever ours does")
    with ExitStack() as stack:
        if has_files(source):
            root = stack.enter_context(packed_folder(args.packed_path, args.data_path))
            workers = default_workers(1) if args.num_workers is None else args.num_workers
            described = {"dataset": args.dataset, "data_path": args.data_path, "split": "train"}
            whole = few(open_source(args))
            for name, place in pack_copies(whole, root, described, num_workers=workers).items():
                copy = argparse.Namespace(**vars(args) | PACKED | {"data_path": place})
                sources[name] = (open_source(copy, args.decode), 1)
        side = arm_arguments(arm)["img_size"]
        return compare_reads(
            usual_files(peers, (side, side), tuple(args.crop_scale)),
            {name: (open_samples(args, arm, s), n) for name, (s, n) in sources.items()},
            images=max(1, args.images // arm.batch) * arm.batch,
            batch=arm.batch,
            repeats=args.repeats,
            warmup=args.warmup,
        )


# ---- Training ------------------------------------------------------------------------------------


def only(arms: dict[str, Arm], what: str) -> Arm:
    """The one arm of ours that a benchmark can use.

    Raises:
        BadInput: several, the peer, or several processes.
    """
    arm = next(iter(arms.values()))
    if len(arms) > 1 or arm.method in PEERS or arm.processes > 1:
        raise BadInput(
            f"{what} takes one arm of ours on one process (mae or mmae), not {' '.join(arms)}"
        )
    return arm


def open_training(
    args: argparse.Namespace, arm: Arm, data: BenchmarkData, total_steps: int
) -> Train:
    """Model and optimiser as main_pretrain makes them, on one process, and its engine."""
    device = choose_device(args.device, 0)
    torch.manual_seed(args.seed)
    model = create_arm(arm, data.source.channels).to(device)
    model.set_grad_checkpointing(arm.checkpointing)
    procs = Processes(0, 1, 0, 1, device)
    compiled, options = arm.compiled is not None, compile_options(arm)
    trained = distribute(model, procs, compiled=compiled, options=options)
    lr = scaled_lr(BLR, arm.batch)
    optimizer = create_adamw(parameter_groups(model, 0.05), lr, betas=(0.9, 0.95))
    step = OptimizerStep(trained, optimizer, device=device, precision=arm.precision)
    loss = PretrainLoss(
        data.masker,
        data.source.mean,
        data.source.std,
        device,
        draws=tuple(model.draws),
    )

    def train(loader: Any, after_step: Callable[[StepReport], bool]) -> int:
        return train_steps(
            trained,
            loader,
            step,
            loss,
            CosineSchedule(lr, 0.0, total_steps / 10, total_steps),
            first_step=0,
            after_step=after_step,
        )

    return train


def benchmark_train(args: argparse.Namespace, arms: dict[str, Arm], threads: int) -> Any:
    """Step alone, data alone, and both together through the engine, in turns."""
    arm = only(arms, "train")
    torch.set_num_threads(threads)
    steps = args.steps or max(1, args.images // arm.batch)
    data = open_data(args, arm, steps)
    train = open_training(args, arm, data, steps * (args.repeats + args.warmup) * 2)
    return measure_together(
        train,
        data.loader,
        steps,
        data.images,
        device=choose_device(args.device, 0),
        repeats=args.repeats,
        warmup=args.warmup,
    )


def loss_curve(args: argparse.Namespace, arm: Arm, steps: int) -> list[float]:
    """Losses of an arm, step by step, on the images and masks that the seed says."""
    data = open_data(args, arm, steps)
    losses: list[Tensor] = []

    def note(report: StepReport) -> bool:
        losses.append(report.result.loss)
        return False

    open_training(args, arm, data, steps)(data.loader, note)
    return torch.stack(losses).double().tolist()


def benchmark_curves(args: argparse.Namespace, arms: dict[str, Arm], threads: int) -> Any:
    """How far the loss of each arm is from the first one's, raw and as a moving mean."""
    torch.set_num_threads(threads)
    curves = {}
    for name, arm in arms.items():
        curves[name] = loss_curve(args, only({name: arm}, "curves"), args.steps or 200)
    return {"rows": compare_curves(curves), "curves": curves}


# ---- Limits, sweeps, many files ------------------------------------------------------------------


def benchmark_limits(args: argparse.Namespace, arms: dict[str, Arm], threads: int) -> Any:
    """Matrix products in each precision, memory, and decoding, in turns."""
    arm, device = next(iter(arms.values())), choose_device(args.device, 0)
    torch.set_num_threads(threads)
    precisions = ["fp32", "bf16", *(["fp16"] if device.type == "cuda" else [])]
    limits = {p: build_limit(0, replace(arm, precision=p), args.device) for p in precisions}
    turns: dict[str, Callable[[], float]] = {
        f"products {p}, GFLOP/s": partial(scaled, partial(limit, None), 1e-9)
        for p, limit in limits.items()
    }
    turns["copy, GB/s read and written"] = partial(scaled, copy_rate(device), 1e-9)
    turns |= decode_rates(list(jpegs_like_imagenet(64, args.seed)), device)
    return show_limits(take_turns(turns, args.repeats, args.warmup))


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
        rows = run_steps(args, sweep, threads)
        found[field] = rows
    if args.plot:
        draw_sweeps(found, args.plot, name_arm(arm, Arm()))
    return found


def benchmark_files(args: argparse.Namespace, arms: dict[str, Arm], threads: int) -> Any:
    """First and second start on a folder of many files, and the memory of the workers."""
    arm = only(arms, "files")
    if args.made is not None:
        say(f"making {args.count:,} files in {args.made}")
        make_tiny_files(Path(args.made), args.count)
        args.dataset, args.data_path = "imagefolder", args.made
    if args.num_workers == 0:
        raise BadInput("files measures the memory of workers; give --num_workers 1 or more")
    return measure_files(
        partial(open_source, args),
        partial(open_loader, args, arm),
        steps=max(4, args.images // arm.batch),
        batch=arm.batch,
        repeats=args.repeats,
    )


BENCHMARKS: dict[str, Callable[[argparse.Namespace, dict[str, Arm], int], Any]] = {
    "limits": benchmark_limits,
    "step": run_steps,
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
    load_plugins(argv)
    args = build_parser().parse(argv)
    if args.what in ("jpegs", "files") and args.made is None and args.data_path is None:
        raise BadInput(f"{args.what} needs --made DIR, a new folder for {args.count:,} files")
    for name in ("json", "plot"):  # now, not after the measurements
        path = getattr(args, name)
        if path is not None and Path(path).is_dir():
            raise BadInput(f"--{name} {path} is a folder; name a file")
        if path is not None:
            prepare_folder(Path(path).parent)
    if args.what == "jpegs":
        make_jpegs(Path(args.made), args.count)
        say(f"{args.count:,} files  --data_path {args.made}")
        return
    base = Arm(
        model=args.model, batch=args.batch_size, size=square_side(args), mask_ratio=args.mask_ratio
    )
    texts = getattr(args, "arms", None) or DEFAULT_ARMS.get(args.what, ["mmae"])
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
