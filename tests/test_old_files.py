"""Files that older commits wrote load, resume and export today as they did with their own code.

`make_old_files.py` wrote them, and what the old code made of them stands beside them.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from make_old_files import (
    EXPECTED,
    NEIGHBOURS,
    OLD_FILES,
    RECONSTRUCTIONS,
    compute_outputs,
    read_looked,
    read_numbers,
    small_models,
    unpack,
)
from stopped_runs import write_pairs

import models_zoo
from util.train.checkpoint import LAST, load_file, write_signed
from util.train.resume import VERSION

# Of the largest number of an output, in float32. Without vector instructions 8e-7 differs.
OUTPUTS = 1e-4
# Of each number that a run records, for 8 steps with learning rates up to 1e-2 or more. Without
# vector instructions 3e-7 differs.
RECORDS = 1e-4
# The same of a segmenter, by the end of a number's name. Its head of 4 channels leaves the encoder
# gradients that are mostly rounding, and Adam makes whole steps of them: without vector
# instructions losses differ by 1e-4, norms of gradients and the last outputs by 5e-2. A lost
# moment of the optimiser changes losses by 5e-3, and the others by more than 1.
LOOSE = {"loss": 1e-3, "grad_norm": 0.2, "outputs": 0.2}
# What a fault changes at least, see `test_a_fault_of_a_resume_is_seen`.
FAULT = 1e-2

KNOWN = {
    path.parent.name: yaml.safe_load(path.read_text()) for path in OLD_FILES.glob(f"*/{EXPECTED}")
}
Files = Callable[[str], Path]


def each(what: str, *mains: str) -> list[Any]:
    """Commit and name of every file of `trainings` or `exports`."""
    return [
        pytest.param(commit, name, id=f"{commit}-{name}")
        for commit, known in KNOWN.items()
        for name, job in known[what].items()
        if not mains or job["main"] in mains
    ]


@pytest.fixture(scope="module", autouse=True)
def models() -> Iterator[None]:
    """The names of the files' models."""
    with pytest.MonkeyPatch.context() as patch:
        for names, name, entry in small_models(models_zoo):
            patch.setitem(names, name, entry)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """``files(commit) -> folder``, with the files as they were written; for reading only."""
    found: dict[str, Path] = {}

    def unpacked(commit: str) -> Path:
        if commit not in found:
            found[commit] = tmp_path_factory.mktemp(commit)
            unpack(OLD_FILES / commit, found[commit])
            write_pairs(found[commit] / "pairs")
        return found[commit]

    return unpacked


def worst(found: Any, expected: Any) -> float:
    """The largest difference of two outputs, relative to the largest number."""
    a, b = (torch.tensor(x, dtype=torch.float64).flatten() for x in (found, expected))
    assert a.shape == b.shape
    assert b.numel() == 1 or b.std() > 1e-2 * b.abs().max(), "outputs all alike show nothing"
    return float((a - b).abs().max() / b.abs().max())


def same_outputs(found: dict[str, Any], expected: dict[str, Any], bound: float = OUTPUTS) -> None:
    assert found.keys() == expected.keys()
    differences = {name: worst(found[name], expected[name]) for name in expected}
    assert max(differences.values()) <= bound, differences


def gaps(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> dict[str, float]:
    """How far the records of two runs are apart, by number: the largest relative difference."""
    assert [(r["kind"], r["step"]) for r in found] == [(r["kind"], r["step"]) for r in expected]
    apart: dict[str, float] = {}
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for key in b.keys() - {"kind", "step"}:
            gap = abs(a[key] - b[key]) / max(abs(b[key]), 1e-12)
            apart[f"{b['kind']} {key}"] = max(gap, apart.get(f"{b['kind']} {key}", 0.0))
    return apart


def go_on(
    run_main: Any, commit: str, name: str, files: Files, folder: Path, *flags: str
) -> tuple[int, str, str]:
    """Start the file's command again in a folder, which is given the file where it has none."""
    known, path = KNOWN[commit]["trainings"][name], files(commit) / f"{name}.pth"
    if not folder.exists():
        folder.mkdir()
        shutil.copy(path, folder / LAST)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(files(commit))  # the settings of a fine-tuning name its file
        return run_main(known["main"], [*known["flags"], f"--output_dir={folder}", *flags])


def numbers(commit: str, name: str, folder: Path) -> list[dict[str, Any]]:
    known = KNOWN[commit]["trainings"][name]
    return read_numbers(folder, known["main"], known["stop"])


def test_there_are_old_files() -> None:
    assert KNOWN


# ---- Loading -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("commit", "name"), each("trainings"))
def test_the_models_in_a_checkpoint_are_what_they_were(
    commit: str, name: str, files: Files
) -> None:
    known, path = KNOWN[commit]["trainings"][name], files(commit) / f"{name}.pth"
    same_outputs(compute_outputs(str(path), known["kind"]), known["outputs"])


@pytest.mark.parametrize(("commit", "name"), each("exports"))
def test_an_exported_file_is_read_as_it_was(commit: str, name: str, files: Files) -> None:
    known, path = KNOWN[commit]["exports"][name], files(commit) / name
    same_outputs(compute_outputs(str(path), known["kind"], foreign=True), known["outputs"])


# ---- Going on ----------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize(("commit", "name"), each("trainings"))
def test_a_run_goes_on_as_it_did(
    commit: str, name: str, files: Files, tmp_path: Path, run_main: Any
) -> None:
    known, folder = KNOWN[commit]["trainings"][name], tmp_path / "run"
    code, said, err = go_on(run_main, commit, name, files, folder)
    assert code == 0, err
    assert f"{known['stop']} steps done" in said and "changed since" not in said
    loose = LOOSE if known["kind"] == "segmenter" else {}
    for number, apart in gaps(numbers(commit, name, folder), known["records"]).items():
        assert apart <= loose.get(number.split()[-1], RECORDS), (number, apart)
    found = compute_outputs(str(folder / LAST), known["kind"])
    same_outputs(found, known["ended"], loose.get("outputs", OUTPUTS))


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["mmae"])
@pytest.mark.parametrize("commit", KNOWN)
def test_a_run_goes_on_in_another_folder(
    commit: str, name: str, files: Files, tmp_path: Path, run_main: Any
) -> None:
    known, folder = KNOWN[commit]["trainings"][name], tmp_path / "run"
    folder.mkdir()
    resume = f"--resume={files(commit) / name}.pth"
    code, _, err = go_on(run_main, commit, name, files, folder, resume)
    assert code == 0, err
    apart = gaps(numbers(commit, name, folder), known["records"])
    assert max(apart.values()) <= RECORDS, apart


def lose_moments(state: dict[str, Any]) -> None:
    """Start the optimiser anew."""
    for moments in state["optimizer"]["state"].values():
        for moment in moments.values():
            if isinstance(moment, torch.Tensor):
                moment.zero_()


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], None], list[str]]] = {
    "no moments": (lose_moments, []),
    "other draws": (lambda state: None, ["--seed=4", "--allow_changes"]),
    "other rate": (lambda state: None, ["--lr=1.1e-2", "--allow_changes"]),
    "other mask": (lambda state: None, ["--avg_order=near", "--allow_changes"]),
}


@pytest.mark.smoke
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("commit", KNOWN)
def test_a_fault_of_a_resume_is_seen(
    commit: str, fault: str, files: Files, tmp_path: Path, run_main: Any
) -> None:
    """The bound of `test_a_run_goes_on_as_it_did` is far below what it is to find."""
    spoil, flags = FAULTS[fault]
    folder, state = tmp_path / "run", load_file(files(commit) / "mmae.pth")
    spoil(state)
    folder.mkdir()
    write_signed(folder / LAST, state)
    code, _, err = go_on(run_main, commit, "mmae", files, folder, *flags)
    assert code == 0, err
    expected = KNOWN[commit]["trainings"]["mmae"]["records"]
    assert gaps(numbers(commit, "mmae", folder), expected)["train loss"] > FAULT


# ---- Settings that came later ------------------------------------------------------------------


@pytest.mark.smoke
def test_a_setting_that_came_later_has_the_value_that_the_run_had(
    files: Files, tmp_path: Path, run_main: Any
) -> None:
    commit, folder = "427e0f3", tmp_path / "run"
    state = load_file(files(commit) / "mmae.pth")
    assert state["resume_version"] < VERSION and "mask_cell" not in state["arithmetic"]
    code, _, err = go_on(run_main, commit, "mmae", files, folder, "--mask_cell=2")
    assert code == 2 and "mask_cell: was [1], is [2]" in err and err.count(": was ") == 1
    code, _, err = go_on(run_main, commit, "mmae", files, folder)
    assert code == 0, err
    state = load_file(folder / LAST)
    assert state["resume_version"] == VERSION and state["arithmetic"]["mask_cell"] == [1]


@pytest.mark.smoke
def test_a_run_whose_masks_were_others_is_refused(
    files: Files, tmp_path: Path, run_main: Any
) -> None:
    """The same file as if from before settings had versions: block masks leaned then."""
    commit, folder = "427e0f3", tmp_path / "run"
    state = load_file(files(commit) / "pca.pth")
    del state["resume_version"]
    folder.mkdir()
    write_signed(folder / LAST, state)
    code, _, err = go_on(run_main, commit, "pca", files, folder)
    assert code == 2 and "block masks leaned toward the bottom before" in err, err
    code, said, err = go_on(run_main, commit, "pca", files, folder, "--allow_changes")
    assert code == 0 and "block masks leaned" in said, err


# ---- Export, neighbours, pictures --------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize(("commit", "name"), each("exports"))
def test_an_old_checkpoint_is_exported_as_it_was(
    commit: str, name: str, files: Files, tmp_path: Path, run_main: Any
) -> None:
    known = KNOWN[commit]["exports"][name]
    source = f"--checkpoint={files(commit) / known['source']}.pth"
    code, _, err = run_main("main_export", [source, *known["flags"], f"--output={tmp_path / name}"])
    assert code == 0, err
    found = compute_outputs(str(tmp_path / name), known["kind"], foreign=True)
    same_outputs(found, known["outputs"])


@pytest.mark.smoke
@pytest.mark.parametrize(("commit", "name"), each("trainings", "main_pretrain"))
def test_neighbours_and_pictures_of_an_old_checkpoint(
    commit: str, name: str, files: Files, tmp_path: Path, run_main: Any
) -> None:
    known = KNOWN[commit]["trainings"][name]
    looked = [f"--checkpoint={files(commit) / name}.pth", f"--output_dir={tmp_path}"]
    pictures = [flag for flag in RECONSTRUCTIONS if flag != "--measure"]
    for main, flags in (
        ("main_knn", NEIGHBOURS), ("main_visualize", RECONSTRUCTIONS), ("main_visualize", pictures),
    ):  # fmt: skip
        code, _, err = run_main(main, [*looked, *flags])
        assert code == 0, err
    found = read_looked(tmp_path)
    assert worst(found["neighbours"], known["neighbours"]) <= OUTPUTS
    assert found["reconstruction"] == pytest.approx(known["reconstruction"], rel=RECORDS)
    assert (tmp_path / "grid.png").exists()
