"""The GPU kit on a CPU: every part at a tiny size, its limits, and its going on past failure."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import lab.gpu.checks as checks
import lab.gpu.command as command
import lab.gpu.parts as parts
import main_pretrain
from lab.gpu.checks import stopping
from lab.gpu.kernels import busy_share, by_kind
from lab.gpu.parts import PARTS, ROOT, Part, Result, Scale, run_part
from lab.gpu.roofline import DEVICES, list_layers, make_rows
from models_zoo import model_arguments


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the whole kit, each part in its own process."""
    folder = tmp_path_factory.mktemp("gpu")
    command.main(["--tiny", f"--folder={folder}", "--seconds=100000"])
    return json.loads((folder / "result.json").read_text())


@pytest.mark.smoke
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_every_part_runs_at_a_tiny_size(part: Part, result: dict[str, Any]) -> None:
    found = {one["name"]: one for one in result["parts"]}[part.name]
    if part.gpu_only:
        assert (found["status"], found["why"]) == ("skipped", "it needs a GPU")
        return
    assert found["status"] == "done", found["why"]
    assert found["found"].get("holds", True) is True and found["seconds"] > 0


def test_what_was_found_is_there(result: dict[str, Any]) -> None:
    found = {one["name"]: one["found"] for one in result["parts"]}
    assert max(found["parity"]["fp32"].values()) < 1e-5
    assert found["precisions"]["overflow"]["weights_kept"]
    assert found["resume"]["eager"]["differing"] == 0 and found["resume"]["eager"]["tensors"] > 50
    arms = {row["arm"].split(",")[0] for row in found["steps"]["base"]}
    assert arms == {"transformers", "official", "mae", "mmae"}
    assert all(row["images_per_s"] > 0 for row in found["steps"]["large"])
    switched = {row["arm"] for row in found["switches"]["arms"]}
    assert {"mae,fp32,adamw=foreach", "mae,fp32,channels_last", "mae,fp32,shard"} <= switched
    assert found["batches"]["large"] and found["modes"]["arms"]
    assert {"files", "packed JPEG", "packed raw", "limits"} <= found["data"].keys()
    assert found["attention"]["decoder"]["math"]["median"] > 0
    assert "refused" in found["attention"]["decoder"]["cudnn"]
    (profiled,) = found["kernels"].values()
    assert 0 < profiled["busy"] <= 1 and sum(profiled["by_kind"].values()) == pytest.approx(
        profiled["ms_a_step"]
    )
    assert result["machine"]["versions"]["torch"]


def test_limits_add_up_to_more_than_there_is_and_the_order_is_worth() -> None:
    """So that a slow part takes time from those that matter less."""
    assert sum(part.limit for part in PARTS) >= command.MOST_SECONDS
    assert [part.name for part in PARTS][:5] == [
        "parity", "precisions", "resume", "no_waits", "steps",
    ]  # fmt: skip
    assert [part.timed for part in PARTS] == [False] * 4 + [True] * (len(PARTS) - 4)


@pytest.mark.gpu
@pytest.mark.parametrize("part", [part for part in PARTS if not part.timed], ids=lambda p: p.name)
def test_a_gpu_is_right(part: Part, tmp_path: Path) -> None:
    """The same checks as the kit's, at their full size."""
    if not torch.cuda.is_available():
        pytest.skip("gpu: none here")
    assert getattr(checks, part.name)(Scale("cuda", False, tmp_path))["holds"]


def test_what_measures_no_time_runs_at_once_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the others one after the other, after them."""
    running: list[str] = []
    most: dict[str, int] = {}
    both = threading.Barrier(4)

    def run(part: Part, scale: Scale, limit: float, more: Any) -> Result:
        running.append(part.name)
        if not part.timed and scale.device == "cuda":
            both.wait(60)  # never passes where they come one by one
        most[part.name] = len(running)
        running.remove(part.name)
        return Result(part.name, "done")

    monkeypatch.setattr(command, "run_part", run)
    names = [part.name for part in PARTS]
    for device in ("cuda", "cpu"):
        results = command.run_parts(Scale(device, True, tmp_path), names, 1e6, {})
        assert sorted(result.name for result in results) == sorted(names)
        assert [result.name for result in results][4:] == names[4:]
        assert all(most[part.name] == 1 for part in PARTS if part.timed or device == "cpu")


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        ("raise ValueError('broken')", "failed", "ValueError: broken"),
        ("import os; os.kill(os.getpid(), 9)", "failed", "exit code -9"),
        ("import time; time.sleep(600)", "out of time", "after 8 s"),
        ("import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)",
         "out of time", "after 8 s"),
    ],
)  # fmt: skip
def test_a_part_that_fails_or_hangs_is_said(
    body: str, status: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process of a part runs another program here."""
    monkeypatch.setattr(parts, "GRACE", 1)
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{body}"\n')
    program.chmod(0o755)
    monkeypatch.setattr(parts.sys, "executable", str(program))
    limit = 8 if status == "out of time" else 600
    found = run_part(PARTS[0], Scale("cpu", True, tmp_path), limit, {})
    assert found.status == status and why in found.why, found


def test_what_is_missing_or_not_reached_is_said(tmp_path: Path) -> None:
    scale = Scale("cpu", True, tmp_path)
    lacking = Part("parity", "", 60, "checks", ["no_such_package_here"])
    assert run_part(lacking, scale, 60, {}).why == "not installed: no_such_package_here"
    assert run_part(PARTS[0], scale, 0, {}).status == "not reached"


def test_the_kit_needs_neither_submitit_nor_pytest(tmp_path: Path) -> None:
    """As on the image of the GPU machine: a part runs where importing them fails."""
    (tmp_path / "lacking").mkdir()
    for name in ("submitit", "pytest"):
        text = f"raise ModuleNotFoundError('No module named {name!r}', name={name!r})"
        (tmp_path / "lacking" / f"{name}.py").write_text(text)
    scale = Scale("cpu", True, tmp_path)
    path = {"PYTHONPATH": str(tmp_path / "lacking")}
    found = run_part(next(p for p in PARTS if p.name == "resume"), scale, 600, path)
    assert found.status == "done", found.why


def test_there_is_no_gpu_here(tmp_path: Path, run_main: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("gpu: there is one")
    code, _, err = run_main("lab.gpu.command", [f"--folder={tmp_path / 'x'}"])
    assert code == 2 and "--tiny goes through" in err and not (tmp_path / "x").exists()


def test_kernels_by_kind_and_the_share_in_which_one_runs() -> None:
    times = {
        "nvjet_sm90_tst_256x128": 3.0, "cudnn_generated_sdpa_sm90_flash_bprop": 2.0,
        "void cudnn::fusion::compute_dot_do_o": 0.5, "triton_poi_fused_gelu_view_11": 1.0,
        "multi_tensor_apply_kernel<FusedAdam": 0.25, "something": 0.125,
    }  # fmt: skip
    assert by_kind(times) == {
        "matrix products": 3.0, "attention": 2.5, "fused by the compiler": 1.0, "optimiser": 0.25,
        "other": 0.125,
    }  # fmt: skip
    assert busy_share([(0, 10)]) == 1
    assert busy_share([(5, 9), (0, 4), (1, 2), (8, 10)]) == 0.9


def test_waits_are_forbidden_in_every_step_but_that_which_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And allowed where a step is told of, and after the loop, however it ends."""
    mode, seen, told = ["default"], [], []

    def steps(*, after_step: Any) -> int:
        for number in range(3):
            seen.append(mode[0])
            if after_step(number):
                break
        return 3

    def end(flags: list[str]) -> int:
        assert flags[-1] in ("--no-compile", "--compile")
        main_pretrain.train_steps(after_step=lambda number: told.append(mode[0]))
        assert mode == ["default"]
        return 0

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda new: mode.__setitem__(0, new))
    monkeypatch.setattr(main_pretrain, "train_steps", steps)
    monkeypatch.setattr(checks, "ends", end)
    assert checks.no_waits(Scale("cpu", True, tmp_path))["holds"]
    assert seen == ["error"] * 3 + ["default", "error", "error"] and told == ["default"] * 6
    assert main_pretrain.train_steps is steps


def test_a_plugin_gives_tests_the_gpu_for_the_cpu() -> None:
    """It comes before the mains take the function by name."""
    program = "import lab.gpu.force, main_visualize; print(main_visualize.choose_device('cpu', 0))"
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "cuda:0\n"


def test_stopping_leaves_no_trace() -> None:
    from util.train.run import Run

    before = Run.after_step
    with stopping(3):
        assert Run.after_step is not before
    assert Run.after_step is before


# ---- The roofline on paper -----------------------------------------------------------------------


def test_a_layer_by_hand() -> None:
    """The first product of ViT-B's encoder: 512 images of 50 tokens, 768 to 2304, twelve times."""
    found = list_layers(model_arguments("mae_vit_base_patch16"), 512, 0.75)
    layers = {(layer.part, layer.name): layer for layer in found}
    qkv = layers["encoder", "qkv"]
    rows = 512 * 50
    assert qkv.flops == 12 * 2 * rows * 768 * 2304
    assert qkv.moved == 12 * 2 * (rows * 768 + 768 * 2304 + rows * 2304)
    device = DEVICES["H100"]
    assert qkv.seconds(device) == qkv.flops / device.flops  # 563 FLOP/B, the ridge is 295
    norm = layers["encoder", "LayerNorm, both"]
    assert norm.seconds(device) == norm.moved / device.bytes_per_s
    scores = layers["decoder", "attention, fused"]
    assert scores.flops == 8 * 2 * 2 * 512 * 197 * 197 * 512


@pytest.mark.parametrize("name", ["mae_vit_base_patch16", "mae_vit_large_patch16"])
def test_its_products_are_those_of_the_step(name: str) -> None:
    """But for the decoder's last block, which computes masked tokens alone."""
    layers = list_layers(model_arguments(name), 1, 0.75)
    plain = ("LayerNorm, both", "residual additions, both", "GELU")
    products = sum(layer.flops for layer in layers if layer.name not in plain)
    counted = {"mae_vit_base_patch16": 19.07e9, "mae_vit_large_patch16": 40.6e9}[name]
    assert products == pytest.approx(counted, rel=0.03)


def test_the_page_of_speed_has_the_table(capsys: Any) -> None:
    page = (ROOT / "docs" / "speed.md").read_text()
    for size, batch in (("base", 512), ("large", 256)):
        layers = list_layers(model_arguments(f"mae_vit_{size}_patch16"), batch, 0.75)
        for row in make_rows(layers, DEVICES["H100"])[:-1]:
            cells = f"| {row['part']}: {row['layer']} | {row['FLOP/B']:.3g} | {row['bound by']} |"
            assert f"{cells} {row['share']} |" in page, (size, cells)
