"""Every flag of lab.bench: another value changes what is measured, and nothing else.

What takes time is left out: each row looks at what a measurement is asked for, and at the images
and the weights that it would have had.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import every_flag_training as alike
import pytest
import torch
from every_flag import Command, Row, Table, Told, Trace, Watched, cases, check_complete, digest
from every_flag_files import write_all

import lab.bench.command as lab_bench
from util.data.randomness import Key

pytestmark = pytest.mark.smoke

BASE = [
    "--model=mae_vit_nano_patch4", "--input_size=16", "--batch_size=2", "--device=cpu",
    "--threads=1", "--repeats=2", "--warmup=1", "--num_workers=0", "--images=4",
    "--data_path={data}",
]  # fmt: skip
# The packed copies would be beside the set otherwise, and one image gives four crops.
DATA = "data --batch_size=4 --packed_path={root}/packed"

TABLE: Table = {
    "what": Told("test_what"),
    # ---- What is trained
    "--arms": [Row("--arms mae", "arms start", "train"), Row("--arms mae", "arms", "step")],
    "--model": Row("--model=mae_vit_pico_patch4", "arms", "step"),
    "--batch_size": Row("--batch_size=4", "arms", "step"),
    "--mask_ratio": Row("--mask_ratio=0.5", "arms", "step"),
    "--input_size": Row("--input_size=24", "arms", "step"),
    # ---- Data
    "--dataset": Row("--dataset=synthetic", "images statistics", "train"),
    "--data_path": Row("--data_path={other}", "images", "train"),
    "--mean": Row("--mean 0.1 0.2 0.3", "statistics", "train"),
    "--std": Row("--std 0.1 0.2 0.3", "statistics", "train"),
    "--max_pixels": Row("--max_pixels=2200", "images", "train --images=12"),
    "--num_workers": Row("--num_workers=1", "loader", "train"),
    "--prefetch_factor": Row("--prefetch_factor=5", "loader", "train --num_workers=1"),
    "--no_pin_mem": Told("test_no_pin_mem"),
    "--train_images": Row("--train_images=8", "images", "train"),
    "--crop_scale": [
        Row("--crop_scale 1 1", "images", "train"),
        Row("--crop_scale 1 1", "images peer", DATA),
    ],
    "--no_flip": Row("--no_flip", "images", "train --images=12"),
    "--interpolation": Row("--interpolation=bilinear", "images", "train"),
    "--decode": Row("--decode=pil", "images", "train"),
    "--crops_per_decode": [
        Row("--crops_per_decode=2", "images", "train"),
        Row("--crops_per_decode=2", "arms", DATA),
    ],
    "--augment": [
        Row(f"--augment={a}", "images", "train") for a in ("none", "fixed_crop", "crop_jitter")
    ],
    "--images": Row("--images=8", "turns images", "train"),
    "--usual_path": Row("--usual_path={other}", "peer", DATA),
    "--packed_path": Row("--packed_path={root}/packed", "packed", "data --batch_size=4"),
    "--made": Row("--made={root}/new", "made", "files --num_workers=1"),
    "--count": [
        Row("--count=7", "made", "files --num_workers=1 --made={root}/new"),
        Row("--count=7", "made", "jpegs --made={root}/new"),
    ],
    # ---- Sweeps
    "--batches": Row("--batches 2", "arms", "scaling"),
    "--sizes": Row("--sizes 32", "arms", "scaling"),
    "--masks": Row("--masks 0.5", "arms", "scaling"),
    "--processes": Row("--processes 1", "arms", "scaling"),
    "--models": Row("--models mae_vit_pico_patch4", "arms", "scaling"),
    "--plot": Row("--plot={root}/plot.png", "plot", "scaling"),
    # ---- The run
    "--repeats": [
        Row("--repeats=3", "turns", what)
        for what in ("step", "train", DATA, "limits", "files --num_workers=1")
    ],
    "--warmup": [Row("--warmup=2", "turns", what) for what in ("step", "train", DATA, "limits")],
    "--steps": [
        Row("--steps=3", "turns", "step"),
        Row("--steps=3", "turns images", "train"),
        Row("--steps=1", "images losses", "curves --steps=2"),
    ],
    "--threads": [Row("--threads=2", "threads", what) for what in ("step", "train", "limits")],
    "--device": Told("test_device"),
    "--seed": [
        Row("--seed=1", "images start", "train"),
        Row("--seed=1", "files_of_limits", "limits"),
    ],
    "--peak_tflops": Row("--peak_tflops=1", "peak", "step"),
    "--json": Row("--json={root}/result.json", "files", "step"),
}


class Benchmark(Command):
    """What measurements are asked for; none is made."""

    def watch(self, patch: pytest.MonkeyPatch, trace: Trace) -> None:
        """Stand in for all that takes time."""
        trace["asked"] = True
        for name, stand_in in {
            "measure_steps": self.steps, "compare_reads": self.reads, "pack_copies": self.packs,
            "measure_together": self.together, "measure_files": self.files,
            "take_turns": self.limits, "make_jpegs": self.makes, "make_tiny_files": self.makes,
        }.items():  # fmt: skip
            patch.setattr(lab_bench, name, lambda *a, f=stand_in, **b: f(trace, *a, **b))
        for name in ("show_steps", "show_limits"):
            patch.setattr(lab_bench, name, lambda found: found)

        def draw(found: Any, path: str, title: str) -> None:
            trace["plot"] = Path(path).name

        patch.setattr(lab_bench, "draw_sweeps", draw)
        patch.setattr(torch, "set_num_threads", lambda n: trace.setdefault("threads", []).append(n))
        for name, note in (
            ("open_data", lambda data: self.data(trace, data)),
            ("create_arm", lambda m: trace.setdefault("start", []).append(digest(m.state_dict()))),
            ("loss_curve", lambda losses: trace.setdefault("losses", []).append(losses)),
            ("jpegs_like_imagenet", None),
        ):
            whole = getattr(lab_bench, name)
            if note is not None:
                patch.setattr(lab_bench, name, Watched(whole, note))

        def open_training(args: Any, arm: Any, *rest: Any) -> Any:
            trace.setdefault("arms", []).append(repr(arm))
            return train(args, arm, *rest)

        train = lab_bench.open_training
        patch.setattr(lab_bench, "open_training", open_training)

        def jpegs(count: int, seed: int) -> Any:
            trace["files_of_limits"] = count, seed
            return iter(())

        patch.setattr(lab_bench, "jpegs_like_imagenet", jpegs)
        patch.setattr(lab_bench, "decode_rates", lambda files, device: {})

    @staticmethod
    def steps(trace: Trace, arms: Any, *rest: Any, **more: Any) -> list[Any]:
        trace.setdefault("arms", []).append(repr(arms))
        trace["threads"], trace["peak"] = more.pop("threads"), more.pop("peak_tflops")
        trace["turns"] = more
        return []

    @staticmethod
    def reads(trace: Trace, usual: Any, sources: Any, **more: Any) -> dict[str, Any]:
        trace["peer"] = (
            usual and [Path(name).read_bytes()[-50:] for name in usual.files],
            usual and repr(usual.view),
        )
        trace["turns"], trace["arms"] = more, [(name, n) for name, (_, n) in sources.items()]
        trace["images"] = [digest(samples[Key(0, 0, 0)]["x"]) for samples, _ in sources.values()]
        return {}

    @staticmethod
    def packs(trace: Trace, source: Any, root: Path, described: Any, **more: Any) -> dict[str, str]:
        trace["packed"], trace["loader"] = root.name == "packed", more
        return {}

    @staticmethod
    def data(trace: Trace, data: Any) -> None:
        loader = data.loader
        trace["loader"] = loader.num_workers, loader.prefetch_factor, loader.pin_memory
        trace["statistics"] = data.source.mean, data.source.std
        batches = list(loader)
        trace["images"] = digest([batch["x"] for batch in batches])
        samples = loader.dataset.samples
        trace["view"] = {
            "order": [batch["index"].tolist() for batch in batches],
            "sample": digest(samples[Key(0, 0, 0)]),
            "names": [samples.source.file_name(i) for i in range(len(samples.source))],
        }

    @staticmethod
    def together(trace: Trace, train: Any, loader: Any, *rest: Any, **more: Any) -> dict[str, Any]:
        trace["turns"] = rest, more
        return {}

    @staticmethod
    def files(trace: Trace, *rest: Any, **more: Any) -> dict[str, Any]:
        trace["turns"] = more
        return {}

    @staticmethod
    def limits(trace: Trace, turns: Any, *rest: Any) -> dict[str, Any]:
        trace["turns"] = list(turns), rest
        return {}

    @staticmethod
    def makes(trace: Trace, root: Path, count: int) -> None:
        trace["made"] = root.name, count


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Benchmark:
    root = tmp_path_factory.mktemp("benchmark")
    return Benchmark("lab.bench.command", BASE, write_all(root), root, output="")


def test_every_flag_has_an_entry() -> None:
    check_complete(TABLE, lab_bench.build_parser(), __name__)


@cases(TABLE)
def test_another_value(row: Row, runner: Benchmark) -> None:
    runner.check(row)


def test_order_and_samples_follow_the_seed(runner: Benchmark) -> None:
    """Each of them: what is trained on changes with either."""
    one, other = (runner.baseline(flags)["view"] for flags in ("train", "train --seed=1"))
    assert one["order"] != other["order"] and one["sample"] != other["sample"]
    assert one["names"] == other["names"]


def test_fewer_images_are_evenly_spaced(runner: Benchmark) -> None:
    whole, some = (
        runner.baseline(flags)["view"]["names"] for flags in ("train", "train --train_images=8")
    )
    assert some == [whole[i] for i in (0, 1, 3, 4, 6, 7, 9, 10)]


def test_what(runner: Benchmark) -> None:
    """Each word is another measurement."""
    asked = {}
    for what in lab_bench.WHAT:
        trace = runner(what, "--made={root}/new --num_workers=1 --steps=1 --batch_size=4")
        assert trace["ends"] == 0, trace["text"]
        asked[what] = {k for k in trace if k not in ("text", "files", "ends", "asked")}
    assert "made" in asked["jpegs"] and "losses" in asked["curves"] and "peer" in asked["data"]
    assert "files_of_limits" in asked["limits"] and "start" in asked["train"]
    assert "peak" in asked["step"] and "peak" in asked["scaling"]
    assert "turns" in asked["files"] and asked["files"] != asked["limits"]


def test_no_pin_mem(runner: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU batches are page-locked unless the flag is there."""
    asked = []

    def build_loader(*rest: Any, pin_memory: bool, **more: Any) -> Any:
        asked.append(pin_memory)
        raise alike.Enough

    monkeypatch.setattr(lab_bench, "build_loader", build_loader)
    for flags in ("", "--no_pin_mem"):
        args = lab_bench.build_parser().parse(
            ["train", "--dataset=synthetic", "--input_size=16", *flags.split()]
        )
        arm = lab_bench.Arm(model="mae_vit_micro_patch4", size=16)
        monkeypatch.setattr(lab_bench, "choose_device", lambda *rest: SimpleNamespace(type="cuda"))
        with pytest.raises(alike.Enough):
            lab_bench.open_data(args, arm, 1)
    assert asked == [True, False]


def test_device(runner: Benchmark) -> None:
    trace = runner("step --device=meta")
    assert trace["ends"] == 2 and "--device meta cannot be computed on" in trace["text"]
