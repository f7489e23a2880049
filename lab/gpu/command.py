"""What a GPU shows in eight minutes: whether the framework is right on it, and how fast.

python -m lab.gpu                          all parts, the most important first
python -m lab.gpu --only steps data        some of them
python -m lab.gpu --tiny                   at a tiny size, on any machine
"""

import argparse
import importlib
import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lab.bench.measuring import machine, machine_lines, table
from lab.gpu.parts import PARTS, Part, Result, Scale, run_part, save
from util.config.flags import FlagParser, number
from util.errors import EXIT_FAILED, BadInput, command
from util.files import write_text
from util.flag_types import expanded_path
from util.progress import say
from util.train.logger import prepare_folder

MOST_SECONDS = 480
# Several arms compile at once: each with few processes for it.
ENVIRONMENT = {"TORCHINDUCTOR_COMPILE_THREADS": "4"}
TRYING_OUT = 60  # times the limits of a GPU
NAMES = [part.name for part in PARTS]


def build_parser() -> FlagParser:
    """The flags."""
    parser = FlagParser(
        description=__doc__.split("\n")[0],
        example="python -m lab.gpu --folder output_dir/gpu",
        first=("folder", "only", "seconds", "device", "tiny"),
    )
    parser.add_argument(
        "--folder",
        type=expanded_path,
        default="output_dir/gpu",
        help="folder for result.json and the files of the parts",
    )
    parser.add_argument(
        "--only",
        choices=NAMES,
        nargs="+",
        default=NAMES,
        help="only these parts, in their own order",
    )
    parser.add_argument(
        "--seconds",
        type=number(float, 1),
        default=MOST_SECONDS,
        help="for all parts together; what is not reached by then is said",
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        help="device to measure; default: cuda, with --tiny the CPU where there is no GPU",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="every branch at the smallest size, without figures"
    )
    parser.add_argument(
        "--part", choices=NAMES, help=argparse.SUPPRESS
    )  # in the process of a part, which the command starts
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts; see the module."""
    args = build_parser().parse(argv)
    if args.device is None:
        args.device = "cpu" if args.tiny and not torch.cuda.is_available() else "cuda"
    scale = Scale(args.device, args.tiny, Path(args.folder).resolve())
    if args.part:
        part = next(part for part in PARTS if part.name == args.part)
        module = importlib.import_module(f"lab.gpu.{part.module}")
        found = getattr(module, part.name)(scale)
        write_text(scale.folder / f"{part.name}.json", json.dumps(found))
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("there is no GPU here; --tiny goes through the parts that need none")
    prepare_folder(scale.folder)
    about = machine(torch.device(args.device))
    say("\n".join(machine_lines(about)))
    results = run_parts(scale, args.only, args.seconds, about)
    say("")
    say(table([summary_row(result) for result in results]))
    say(f"result  {scale.folder / 'result.json'}")
    if wrong := [r for r in results if r.status in ("failed", "out of time")]:
        say("\n".join(f"\n{r.name}: {r.status}: {r.why}" for r in wrong))
        raise SystemExit(EXIT_FAILED)


def run_parts(scale: Scale, only: Sequence[str], seconds: float, about: dict) -> list[Result]:
    """Those that measure no time at once on a GPU's machine, then each in turn.

    The file holds all results so far.
    """
    end = time.monotonic() + seconds
    results: list[Result] = []
    saving = threading.Lock()

    def run(part: Part) -> Result:
        left = end - time.monotonic()
        # On a machine that is only trying the kit out, nothing is measured and nothing hurries.
        limit = min(part.limit * (TRYING_OUT if scale.tiny else 1), left)
        say(f"{part.name}: {part.question} (at most {limit:.0f} s)")
        result = run_part(part, scale, limit, ENVIRONMENT)
        say(f"{part.name}: {result.status} in {result.seconds:.1f} s")
        with saving:
            results.append(result)
            save(scale.folder / "result.json", about, results)
        return result

    wanted = [part for part in PARTS if part.name in only]
    untimed = [part for part in wanted if not part.timed]
    # A processor of few cores has them one after the other.
    with ThreadPoolExecutor(len(untimed) or 1 if scale.device == "cuda" else 1) as pool:
        list(pool.map(run, untimed))
    for part in wanted:
        if part.timed:
            run(part)
    return results


def summary_row(result: Result) -> dict[str, object]:
    """A line of the last table."""
    holds = result.found.get("holds")
    return {
        "part": result.name,
        "status": result.status,
        "seconds": round(result.seconds, 1),
        "holds": "" if holds is None else "yes" if holds else "no",
        "why": result.why.splitlines()[0] if result.why else "",
    }
