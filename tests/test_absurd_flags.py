"""Every flag of every command takes what can be meant, and refuses the rest in one line at once."""

import argparse
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import COMMANDS

import main_pretrain
from util.config.flags import FlagParser
from util.errors import BadInput, RunFailed, command
from util.flag_types import expanded_path, most_processes
from util.slurm import add_job_flags
from util.train.dist import choose_device
from util.train.memory import create_in_memory

ROOT = Path(__file__).resolve().parent.parent
ABSURD = (
    "100000000000", "-1", "0", "nan", "inf", "-inf", "", "1e400", "9" * 5000, "1e-9", "x", "None",
    "1_0", "٣", "0x10", "1x2x3", "99999x99999", " ",
)  # fmt: skip
# Flags whose value names a file, a folder, a data set's place or a checkpoint.
PATHS = {
    "config", "data_path", "output_dir", "log_dir", "resume", "finetune", "checkpoint", "output",
    "images", "predict", "plan", "papers", "runs", "compare", "save_curve", "docs", "usual_path",
    "packed_path", "made", "plot", "json", "job_dir",
}  # fmt: skip
TEXTS = {
    "model", "models", "device", "tune", "aa", "only", "arms", "what", "partition", "qos",
    "account", "constraint", "comment", "setup", "weights_key",
}  # fmt: skip


def parsers() -> Iterator[tuple[str, FlagParser]]:
    for name in COMMANDS:
        yield name, importlib.import_module(name).build_parser()
    job = FlagParser()
    add_job_flags(job)
    yield "submitit", job


def valued() -> Iterator[tuple[str, FlagParser, argparse.Action]]:
    """Every flag that takes a value."""
    for name, parser in parsers():
        for action in parser._actions:
            if action.option_strings and action.nargs != 0:
                yield name, parser, action


def words(parser: FlagParser, action: argparse.Action, value: str) -> list[str]:
    flag = action.option_strings[0]
    first = ["step"] if any(a.dest == "what" for a in parser._actions) else []
    if isinstance(action.nargs, int):
        return [*first, flag, *[value] * action.nargs]
    return [*first, f"{flag}={value}"]


def test_every_flag_and_every_odd_value() -> None:
    """A value is taken, within bounds, or ends with one short line. Nothing else."""
    taken = 0
    for name, parser, action in valued():
        for value in ABSURD:
            try:
                found = parser.parse(words(parser, action, value))
            except BadInput as error:
                assert len(str(error)) < 1500 and "\n" not in str(error), (name, action.dest)
                continue
            result = getattr(found, action.dest)
            for one in result if isinstance(result, list | tuple) else [result]:
                if isinstance(one, int | float) and not isinstance(one, bool):
                    assert 0 <= one <= 10**12, (name, action.dest, value)
                    taken += 1
    assert taken > 100  # the loop did reach values


def test_every_number_has_bounds_and_every_path_its_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for name, _, action in valued():
        kind = action.type
        where = f"{name} --{action.dest}"
        if action.dest in PATHS and not (name == "lab.bench.command" and action.dest == "images"):
            assert kind is expanded_path, where
        elif action.choices is None and action.dest not in TEXTS:
            assert kind not in (None, int, float, str), f"{where}: no bounds"


@pytest.mark.parametrize("dest", ["batch_size", "num_workers", "prefetch_factor", "input_size"])
def test_the_bound_is_said(dest: str) -> None:
    for module in ("main_pretrain", "main_finetune", "main_segment", "main_knn"):
        with pytest.raises(BadInput, match=r"at most|above"):
            importlib.import_module(module).build_parser().parse([f"--{dest}=99999999999"])


def test_workers_by_the_cores() -> None:
    parser = importlib.import_module("main_pretrain").build_parser()
    assert parser.parse([f"--num_workers={most_processes()}"]).num_workers == most_processes()
    with pytest.raises(BadInput, match="64 for each core of this machine"):
        parser.parse([f"--num_workers={most_processes() + 1}"])


# ---- Sizes that are too large together ---------------------------------------------------------

SIZES = ["--decoder_depth=200", "--decoder_embed_dim=32768", "--decoder_num_heads=16"]
TINY = ["--dataset=digits", "--num_workers=0", "--device=cpu"]


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        ("main_pretrain", SIZES),
        ("main_pretrain", ["--input_size=16384", "--patch_size=1"]),
        ("main_finetune", ["--model=vit_base_patch16", "--input_size=16384", "--patch_size=1"]),
        (
            "main_segment",
            ["--dataset=garments", "--model=vit_micro_patch8", "--channels=65536"],
        ),
    ],
)
def test_a_model_larger_than_memory_is_refused(
    module: str, flags: list[str], tmp_path: Path, run_main
) -> None:
    tiny = TINY[module == "main_segment" :]
    code, _, err = run_main(module, [*tiny, *flags, f"--output_dir={tmp_path / 'run'}"])
    assert code == 2 and err.count("\n") == 1, err
    assert "weights take" in err and "this machine has" in err


def test_counting_a_model_draws_nothing() -> None:
    torch.manual_seed(0)
    one = create_in_memory(lambda: torch.nn.Linear(3, 3)).weight
    torch.manual_seed(0)
    assert torch.equal(one, torch.nn.Linear(3, 3).weight)
    with torch.device("meta"):  # a plan has no memory to fit in
        assert create_in_memory(lambda: torch.nn.Linear(10**6, 10**7)).weight.is_meta


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried ...")])
def test_out_of_memory_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(why: Exception = error) -> None:
        raise why

    with pytest.raises(SystemExit) as end:
        command(fail)()
    assert end.value.code == RunFailed.exit_code
    err = capsys.readouterr().err
    assert err.startswith("error: out of memory") and "--batch_size" in err and err.count("\n") == 1
    with pytest.raises(RuntimeError, match="another"):
        command(fail)(RuntimeError("another fault"))


@pytest.mark.parametrize("flag", ["json", "plot"])
def test_a_benchmark_knows_first_that_it_cannot_write(
    flag: str, tmp_path: Path, run_main, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lab.bench.command as lab_bench

    def measured(*rest: object) -> None:
        raise AssertionError("measured before the file was looked at")

    monkeypatch.setitem(lab_bench.BENCHMARKS, "step", measured)
    for place, expected in ((tmp_path, "is a folder"), ("/proc/x/y.json", "cannot write")):
        code, _, err = run_main("lab.bench.command", ["step", f"--{flag}={place}"])
        assert code == 2 and expected in err


# ---- Devices -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["mps", "meta", "xpu", "vulkan", "nonsense", "", "cuda:99", "cpu:x", "cuda:" + "9" * 40]
)
def test_devices_that_are_not_there(name: str) -> None:
    with pytest.raises(BadInput, match="--device") as caught:
        choose_device(name, 0)
    assert "\n" not in str(caught.value)


def test_an_apple_gpu_that_is_there_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("mps", 0).type == "mps"
    assert choose_device("cpu", 0).type == "cpu"


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("apple", [True, False])
@pytest.mark.parametrize("gpus", [0, 2])
def test_auto_is_what_is_there(
    gpus: int, apple: bool, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVIDIA's GPU of this process, else Apple's where no other takes part, else the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apple)
    expected = "cuda:1" if gpus else "mps" if apple and alone else "cpu"
    assert choose_device("auto", 1, alone=alone) == torch.device(expected)
    if gpus:
        assert choose_device("cuda:0", 1, alone=alone) == torch.device("cuda:0")
        with pytest.raises(BadInput, match="needs GPU 2, and it has 2"):
            choose_device("cuda", 2)


@pytest.mark.smoke
def test_help_says_each_default_that_is_a_value() -> None:
    text = " ".join(main_pretrain.build_parser().format_help().split())
    for flag, value in (("MASK_RATIO", 0.75), ("EPOCHS", 400), ("WEIGHT_DECAY", 0.05)):
        assert re.search(rf"{flag} [^(]*\(default: {value}\)", text)
    assert "default: None" not in text
