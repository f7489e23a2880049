"""Write `pinned_flags.yaml` anew: defaults, choices and types of flags, presets, and what public
functions and classes take where nothing is given.

python tests/pin_flags.py    # after a change that is meant; the difference belongs in the commit
"""

import argparse
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from commands import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PINNED = ROOT / "tests" / "pinned_flags.yaml"
HEADER = """\
# Written by `python tests/pin_flags.py`; tests/test_pinned_flags.py compares. A difference is a
# change for users: accept it by running that command, and say it in CHANGELOG.md.
"""
TRAINING = ("main_pretrain", "main_finetune", "main_segment")
UNSET = "unset"  # the flag is not there unless it is given: a preset fills it


def type_text(convert: Any, action: argparse.Action) -> str:
    """What a flag takes, in words; bounds are those that its type was made of."""
    if action.nargs == 0:
        return "switch" if action.const in (None, True, False) else f"stands for {action.const}"
    if convert is None:
        return "text"
    inner = inspect.getclosurevars(convert).nonlocals if inspect.isfunction(convert) else {}
    if "kind" in inner:
        low, high = (
            ("above", "below")[i] if inner[open_] else ("at least", "at most")[i]
            for i, open_ in enumerate(("open_low", "open_high"))
        )
        if inner["why"].endswith("core of this machine"):  # another number on each machine
            return f"{inner['kind'].__name__}, {low} {inner['low']}, at most {inner['why']}"
        return f"{inner['kind'].__name__}, {low} {inner['low']}, {high} {inner['high']}"
    if "convert" in inner:
        return f"none or {type_text(inner['convert'], action)}"
    return str(convert.__name__)


def plain(value: Any) -> Any:
    """In types that YAML has."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted(plain(v) for v in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__name__", None) or str(value)


def flag_rows(parser: argparse.ArgumentParser) -> dict[str, dict[str, Any]]:
    """Every flag by its longest word."""
    rows = {}
    for action in parser._actions:
        default = UNSET if action.default == argparse.SUPPRESS else plain(action.default)
        row = {"type": type_text(action.type, action), "default": default}
        if action.choices is not None:
            row["choices"] = plain(list(action.choices))
        if action.nargs not in (None, 0):
            row["values"] = action.nargs
        flag = max(action.option_strings, key=len, default=action.dest)
        if action.option_strings and action.dest != flag.lstrip("-").replace("-", "_"):
            row["sets"] = action.dest
        if action.nargs == 0 and action.dest in ("compile", "pin_mem", "global_pool"):
            row["to"] = plain(action.const)
        rows[flag] = row
    return rows


def free_on_resume(main: Any) -> list[str]:
    """Flags of a training main that may differ on resume; all others are refused if changed."""
    from util.config.flags import NOT_KEPT, select_arithmetic

    dests = {action.dest for action in main.build_parser()._actions} - {"help", "help_all"}
    # `collect_settings` leaves out what holds for one start alone.
    kept = dict.fromkeys(dests - NOT_KEPT)
    return sorted(dests - select_arithmetic(kept, main.HOUSEKEEPING).keys())


def is_plain(value: Any) -> bool:
    """Whether it is a number, a text, or several."""
    if isinstance(value, tuple):
        return bool(value) and all(map(is_plain, value))
    return isinstance(value, bool | int | float | str)


def public_functions(name: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Functions of a module, its classes and their methods, by the name that a caller writes."""
    for key, value in vars(importlib.import_module(name)).items():
        if key.startswith("_") or getattr(value, "__module__", None) != name:
            continue
        members = {key: value}
        if inspect.isclass(value):
            members = {f"{key}.{k}": v for k, v in vars(value).items() if not k.startswith("_")}
            members[key] = value.__init__
        for called, function in members.items():
            function = getattr(function, "__func__", function)  # of a class method
            if inspect.isfunction(function):
                yield called, function


def defaults_in_python() -> dict[str, dict[str, Any]]:
    """What callers from Python leave to the program, by module and name."""
    found = {}
    files = [*ROOT.glob("models_*.py"), *ROOT.glob("engine_*.py"), *(ROOT / "util").rglob("*.py")]
    for path in sorted(files):
        name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        for called, function in public_functions(name):
            parameters = inspect.signature(function).parameters.items()
            given = {k: plain(p.default) for k, p in parameters if is_plain(p.default)}
            if given and function.__module__ == name:
                found[f"{path.stem}.{called}"] = given
    return found


def collect() -> dict[str, Any]:
    """All that is pinned, in plain types."""
    import build_finetune
    import build_segment
    import eval_pretrain
    import eval_segment
    import lab.bench.command as lab_bench
    import models_zoo
    from models_mmae import METHODS
    from models_targets import PCA_PER_IMAGE
    from util.config import finetune_flags, segment_flags
    from util.data import transforms
    from util.mask.strategies import STANDARD
    from util.slurm import add_job_flags

    job = argparse.ArgumentParser(add_help=False)
    add_job_flags(job)
    rows = {
        name.removesuffix(".command"): flag_rows(importlib.import_module(name).build_parser())
        for name in COMMANDS
    }
    found = {
        "flags": rows | {"job": flag_rows(job)},
        "free on resume": {
            name: free_on_resume(importlib.import_module(name)) for name in TRAINING
        },
        "held to the published recipe": {
            "pretrain": {
                kind.__name__: list(kind.published)
                for kind in dict.fromkeys(kind for kind, _ in models_zoo.MODELS.values())
            },
            "finetune": {k: vars(v) for k, v in build_finetune.PUBLISHED.items()},
            "segment": vars(build_segment.PUBLISHED),
        },
        "presets": {
            "--method": {
                **METHODS,
                **{
                    name: models_zoo.list_methods(name)
                    for name in ("simmim_swin_base_patch4_window6", "simmim_vit_base_patch16")
                },
            },
            "--tune": {"full": finetune_flags.FULL, "linear": finetune_flags.LINEAR},
            "segment": {"lr": segment_flags.LR, "scales": segment_flags.SCALES},
            "segment looks": segment_flags.LOOKS_BY_DEFAULT,
            "standard masks": STANDARD,
            "patches of an image for a PCA": PCA_PER_IMAGE,
            "crop jitter": transforms.JITTER,
            "evaluation": {
                "crop share": transforms.CROP_SHARE,
                "largest with margin": transforms.LARGEST_WITH_MARGIN,
                "seed of masks": eval_pretrain.EVAL_SEED,
                "pictures": eval_pretrain.PICTURES,
            },
            "benchmark": {
                "arms": lab_bench.DEFAULT_ARMS,
                "blr": lab_bench.BLR,
                "crops": lab_bench.CROPS,
            },
        },
        "measured by": {
            "segment": eval_segment.MEASURED_BY,
            "segment, of the checkpoint": segment_flags.LOOKS,
        },
        "models": {
            name: {"class": create.__name__, **arguments}
            for name, (create, arguments) in {**models_zoo.MODELS, **models_zoo.CLASSIFIERS}.items()
        },
        "arguments": defaults_in_python(),
    }
    return dict(plain(found))


def pinned_text() -> str:
    """The file as it should be: a line for each flag, sorted."""
    body = yaml.dump(
        collect(), Dumper=yaml.SafeDumper, sort_keys=True, default_flow_style=None, width=10_000
    )
    return HEADER + body


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PINNED.write_text(pinned_text())
    print(f"written  {PINNED}")
