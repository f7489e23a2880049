"""An optimiser that goes on: its moments are the checkpoint's, its settings those of the start."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from util.errors import BadInput
from util.train.checkpoint import LAST, load_file
from util.train.optim import create_adamw, create_lars, load_moments, parameter_groups

FLAGS = [
    "--dataset=synthetic", "--model=vit_micro_patch8", "--input_size=16", "--train_images=8",
    "--batch_size=4", "--warmup_epochs=0", "--eval_every=0", "--log_every=1", "--num_workers=0",
    "--device=cpu", "--mixup=0",
]  # fmt: skip


def groups_of(folder: Path) -> list[dict]:
    return load_file(folder / LAST)["optimizer"]["param_groups"]


def test_changed_settings_of_the_optimizer_are_those_trained_with(
    tmp_path: Path, run_main: Callable
) -> None:
    """torch takes a file's settings with its moments: the change was said, and not made."""
    flags = [*FLAGS, f"--output_dir={tmp_path / 'run'}"]
    assert run_main("main_finetune", [*flags, "--epochs=1"])[0] == 0
    changes = ["--weight_decay=0.3", "--betas", "0.5", "0.6", "--layer_decay=0.5"]
    changed = [*flags, "--epochs=2", *changes, "--allow_changes"]
    code, out, err = run_main("main_finetune", changed)
    assert code == 0 and "weight_decay: was 0.05, is 0.3" in out, err
    # What a run has that begins with these settings.
    new = [*FLAGS, f"--output_dir={tmp_path / 'new'}", "--epochs=1", *changes]
    assert run_main("main_finetune", new)[0] == 0
    names = ("weight_decay", "betas", "lr_scale", "param_names")
    mine, theirs = (
        [[group[name] for name in names] for group in groups_of(tmp_path / folder)]
        for folder in ("run", "new")
    )
    assert mine == theirs and {group["weight_decay"] for group in groups_of(tmp_path / "run")} == {
        0.0, 0.3,
    }  # fmt: skip


@pytest.mark.parametrize("change", [["--tune=full"], ["--tune=partial:2"]])
def test_other_parameters_that_learn_are_refused(
    change: list[str], tmp_path: Path, run_main: Callable
) -> None:
    """torch's exception ended the command with a traceback."""
    flags = [*FLAGS, f"--output_dir={tmp_path}"]
    assert run_main("main_finetune", [*flags, "--epochs=1", "--tune=partial:1"])[0] == 0
    before = (tmp_path / LAST).read_bytes()
    code, _, err = run_main("main_finetune", [*flags, "--epochs=2", *change, "--allow_changes"])
    assert code == 2 and "other parameters learn" in err and "--tune" in err
    assert (tmp_path / LAST).read_bytes() == before


@pytest.mark.parametrize("kind", ["adamw", "lars"])
def test_moments_go_on_and_settings_do_not(kind: str) -> None:
    def create(decay: float, lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        groups = parameter_groups(model, decay)
        optimizer = (
            create_lars(groups, lr) if kind == "lars" else create_adamw(groups, lr, (0.0, 0.0))
        )
        return model, optimizer

    model, optimizer = create(0.1, 0.5)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    _, other = create(0.2, 0.7)
    load_moments(other, saved)
    now = other.state_dict()
    assert now["state"].keys() == saved["state"].keys()
    for number, entries in saved["state"].items():
        assert all(torch.equal(now["state"][number][name], entries[name]) for name in entries)
    # The rate of the last step is kept until the next one sets it: a resume says what it was.
    assert [(g["weight_decay"], g["lr"]) for g in now["param_groups"]] == [(0.2, 0.5), (0.0, 0.5)]


def test_parameters_under_other_names_are_refused() -> None:
    """As many as before, but not the same ones."""
    first, second = (
        create_adamw(parameter_groups(nn.Linear(2, 2), 0.1), 1, (0.0, 0.0)) for _ in "ab"
    )
    second.param_groups[0]["param_names"] = ["another"]
    with pytest.raises(BadInput, match="other parameters learn"):
        load_moments(second, first.state_dict())
