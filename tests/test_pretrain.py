"""main_pretrain.py as its users run it: small, on real digits and drawn images."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from launch import PATIENCE
from runs import different, records, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trained import Trained

import main_pretrain
from models_zoo import create_model
from util.train.optim import create_adamw, parameter_groups
from util.train.schedule import CosineSchedule, scaled_lr
from util.train.step import OptimizerStep

ROOT = Path(__file__).parent.parent
# 1,500 digits in batches of 300 are 5 steps an epoch.
TINY = [
    "--dataset=digits", "--model=mae_vit_micro_patch4", "--input_size=16", "--batch_size=300",
    "--warmup_epochs=1", "--blr=1e-3", "--log_every=1", "--num_workers=0", "--device=cpu",
    "--decoder_depth=1", "--picture_every=0", "--epochs=1",
]  # fmt: skip


@pytest.mark.smoke
def test_a_run_writes_what_it_names(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = [*TINY, "--epochs=2", f"--output_dir={tmp_path}", "--save_every=1"]
    main_pretrain.main([*flags, "--picture_every=1", "--eval_every=1", "--eval_images=40"])
    out = capsys.readouterr().out
    for line in out.splitlines():
        name, _, path = line.partition("  ")
        if name in ("checkpoint", "metrics", "events", "pictures"):
            assert Path(path.split("  (")[0].strip()).exists(), line
    assert {p.name for p in tmp_path.glob("*.pth")} == {
        "checkpoint-0.pth", "checkpoint-1.pth", "checkpoint-last.pth",
    }  # fmt: skip
    train = records(tmp_path, "train")
    assert [r["step"] for r in train] == list(range(1, 11))
    assert train[-1]["loss"] < train[0]["loss"]
    assert all(r["images_per_s"] > 0 and 0 <= r["waiting"] <= 1 for r in train)
    epochs = records(tmp_path, "epoch")
    for number, record in enumerate(epochs):
        mean = sum(r["loss"] for r in train[5 * number : 5 * number + 5]) / 5
        assert record["loss"] == pytest.approx(mean, rel=1e-6)
    measured = records(tmp_path, "eval")[-1]
    assert measured["images"] == 40
    assert {"model_psnr", "mean_psnr", "nearest_psnr", "model_ssim"} <= measured.keys()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 11))
    assert events.Images("reconstruction")


@pytest.mark.smoke
def test_saved_settings_are_a_recipe_of_the_same_run(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ["--epochs=1", "--avg_share=0.25", "--input_size=16x24", "--no_flip", "--crop_scale"]
    main_pretrain.main([*TINY, *flags, "0.5", "1", f"--output_dir={one}"])
    main_pretrain.main(["--config", str(one / "config.yaml"), f"--output_dir={two}"])
    assert not different(weights(one), weights(two))
    saved = [yaml.safe_load((f / "config.yaml").read_text()) for f in (one, two)]
    assert {k for k in saved[0] if saved[0][k] != saved[1][k]} == {"output_dir"}


@pytest.mark.smoke
@pytest.mark.parametrize("flags", [
    ["--method=mae"], ["--mask=block"], ["--mask=grid", "--mask_ratio=0.6"], ["--mask=average"],
    ["--pos_offset=jitter"], ["--pos_offset=center", "--lscale_init=none"], ["--precision=bf16"],
    ["--input_size=24x16"], ["--patch_size=2x8"], ["--in_chans=3"], ["--norm_pix_loss"],
    ["--dataset=synthetic", "--batch_size=128", "--in_chans=5"],
    ["--dataset=photos", "--input_size=32"],
    ["--precision=fp16"], ["--grad_checkpointing"], ["--mean", "0.3", "--std", "0.4"],
    ["--clip_grad=1", "--accum_iter=2"],
    ["--decoder_embed_dim=64", "--decoder_num_heads=2", "--decoder_depth=3"],
])  # fmt: skip
def test_every_switch_trains(tmp_path: Path, flags: list[str]) -> None:
    main_pretrain.main([*TINY, "--epochs=1", f"--output_dir={tmp_path}", *flags])
    losses = [r["loss"] for r in records(tmp_path, "train")]
    assert len(losses) >= 2 and all(math.isfinite(x) for x in losses)


def test_logged_lr_is_the_closed_form(tmp_path: Path) -> None:
    flags = ["--epochs=3", "--warmup_epochs=1", "--min_lr=1e-5", "--blr=1e-3"]
    main_pretrain.main([*TINY, *flags, f"--output_dir={tmp_path}"])
    peak = 1e-3 * 300 / 256
    for record in records(tmp_path, "train"):
        epoch = (
            record["step"] - 1
        ) / 5  # the official code's fractional epoch, at the step's start
        if epoch < 1:
            expected = peak * epoch
        else:
            expected = 1e-5 + (peak - 1e-5) * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / 2))
        assert record["lr"] == pytest.approx(expected, rel=1e-12)


def test_schedule_with_fractional_or_no_warmup() -> None:
    assert CosineSchedule(1.0, 0.0, 0, 10)(0) == 1.0
    assert CosineSchedule(1.0, 0.0, 2.5, 10)(2) == pytest.approx(0.8)
    assert CosineSchedule(1.0, 0.0, 20, 10)(9) == pytest.approx(0.45)  # still warming up
    assert scaled_lr(1.5e-4, 4096) == pytest.approx(2.4e-3)


def test_weight_decay_groups_are_maes() -> None:
    model = create_model("mae_vit_micro_patch4", lscale_init=0.1, pos_offset="learned")
    decayed, exempt = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.05, 0.0)
    assert {"cls_token", "mask_token", "patch_embed.proj.weight"} <= set(decayed["param_names"])
    assert {"pos_phase", "decoder_pos_phase", "blocks.0.ls1.gamma", "norm.weight"} <= set(
        exempt["param_names"]
    )
    by_shape = {n for n, p in model.named_parameters() if p.ndim > 1 and "phase" not in n}
    assert set(decayed["param_names"]) == by_shape - {"pos_embed", "decoder_pos_embed"}
    named = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(decayed["param_names"]) | set(exempt["param_names"]) == named


@pytest.mark.smoke
def test_workers_and_unrelated_flags_change_no_number(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    flags = [*TINY, "--epochs=2", "--pos_offset=jitter"]
    main_pretrain.main([*flags, f"--output_dir={one}"])
    main_pretrain.main(
        [*flags, f"--output_dir={two}", "--num_workers=2", "--eval_every=1", "--picture_every=1",
         "--log_every=3", "--save_every=1"]
    )  # fmt: skip
    assert not different(weights(one), weights(two))


@pytest.mark.smoke
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    flags = [*TINY, "--epochs=4", "--save_every=1", f"--output_dir={tmp_path}"]
    main_pretrain.main(flags)
    whole = weights(tmp_path)
    for name in ("checkpoint-3.pth", "checkpoint-2.pth", "checkpoint-last.pth"):
        (tmp_path / name).unlink()
    main_pretrain.main(flags)
    assert not different(whole, weights(tmp_path))
    assert [r["step"] for r in records(tmp_path, "train")] == list(range(1, 21))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 21))


def train_steps(accum_iter: int, clip_grad: float | None = None) -> dict[str, torch.Tensor]:
    """Twenty float64 steps on one fixed global batch of 12."""
    torch.manual_seed(0)
    model = create_model("mae_vit_micro_patch4", img_size=16, depth=2).double()
    optimizer = create_adamw(parameter_groups(model, 0.05), 1e-3, (0.9, 0.95))
    step = OptimizerStep(
        model,
        optimizer,
        device=torch.device("cpu"),
        accum_iter=accum_iter,
        clip_grad=clip_grad,
    )
    images = torch.randn(12, 3, 16, 16, dtype=torch.float64)
    mask = torch.rand(12, 16).argsort(1) >= 4
    parts = list(zip(images.chunk(accum_iter), mask.chunk(accum_iter), strict=True))
    for _ in range(20):
        step(lambda part: model(part[0], part[1], 4)["loss"], parts, 1e-3)
    return model.state_dict()


@pytest.mark.parametrize("accum_iter", [2, 4])
def test_accumulation_changes_nothing_but_rounding(accum_iter: int) -> None:
    whole, parts = train_steps(1), train_steps(accum_iter)
    assert max((whole[k] - parts[k]).abs().max() for k in whole) < 1e-9


def test_clipping_bounds_the_update_and_not_the_reported_norm() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.AdamW([parameter], lr=1.0, betas=(0.0, 0.0), fused=True)
    model = torch.nn.Module()
    model.p = parameter
    step = OptimizerStep(model, optimizer, device=torch.device("cpu"), clip_grad=1.0)
    seen = []
    parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    result = step(lambda _: (parameter * 3.0).sum(), [None], 1e-3)
    assert result.grad_norm == pytest.approx(6.0)
    assert seen[0].norm() == pytest.approx(1.0, rel=1e-5)  # clipped in place, after the norm


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(what: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    model = torch.nn.Module()
    model.p = parameter
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    step = OptimizerStep(model, optimizer, device=torch.device("cpu"))
    step(lambda _: parameter.square().sum(), [None], 0.1)
    before = parameter.detach().clone()
    moments = {k: v.clone() for k, v in optimizer.state[parameter].items()}
    broken = {
        "loss": lambda _: parameter.sum() + torch.tensor(torch.inf),  # its gradient alone is finite
        "gradient": lambda _: (parameter - 1).abs().sum().sqrt() * 0 + (parameter - before).norm(),
    }
    if what == "gradient":
        parameter.register_hook(lambda g: g * torch.nan)
    assert step(broken[what], [None], 0.1).skipped == 1
    assert torch.equal(parameter, before)
    assert all(torch.equal(v, optimizer.state[parameter][k]) for k, v in moments.items())


def test_fp16_overflow_lowers_the_scale_and_is_no_fault() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    model = torch.nn.Module()
    model.p = parameter
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    step = OptimizerStep(model, optimizer, device=torch.device("cpu"), precision="fp16")

    def loss(_: object) -> torch.Tensor:
        return parameter.square().sum()

    fine = step(loss, [None], 0.1)
    assert (fine.skipped, fine.broken) == (0, 0)
    assert fine.grad_norm == pytest.approx(12**0.5)  # unscaled
    before, scale = parameter.detach().clone(), step.scaler.get_scale()
    step.scaler.load_state_dict(step.scaler.state_dict() | {"scale": 1e38})
    over = step(lambda _: 100 * loss(_), [None], 0.1)
    assert (over.skipped, over.broken) == (1, 0)
    assert torch.equal(parameter, before) and step.scaler.get_scale() == pytest.approx(5e37)
    step.scaler.load_state_dict(step.scaler.state_dict() | {"scale": scale})
    broken = step(lambda _: loss(_) * torch.nan, [None], 0.1)
    assert (broken.skipped, broken.broken) == (1, 1) and torch.equal(parameter, before)


@pytest.mark.dist
def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    flags = [*TINY, "--epochs=2", "--pos_offset=jitter", "--eval_every=2", "--eval_images=33"]
    main_pretrain.main([*flags, f"--output_dir={one}"])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = subprocess.run(
        [*launch, "main_pretrain.py", *flags, f"--output_dir={two}", "--batch_size=150"],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    losses = [[r["loss"] for r in records(f, "train")] for f in (one, two)]
    # Measured 2e-7 after 10 steps of lr up to 1.2e-3: float32 sums in another order.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    measured = [records(f, "eval")[0] for f in (one, two)]
    assert measured[0]["nearest_psnr"] == pytest.approx(measured[1]["nearest_psnr"], rel=1e-12)
    assert measured[0]["images"] == measured[1]["images"] == 33


BAD_FLAGS = {
    "unknown flag": (["--epoch=3"], "--epochs"),
    "abbreviation": (["--mask_rat=0.5"], "--mask_ratio"),
    "not a number": (["--blr=fast"], "fast"),
    "whole number": (["--batch_size=2.5"], "2.5"),
    "negative": (["--epochs=-1"], "--epochs"),
    "zero batch": (["--batch_size=0"], "--batch_size"),
    "nan": (["--weight_decay=nan"], "--weight_decay"),
    "mask ratio above 1": (["--mask_ratio=1.5"], "1.5"),
    "nothing visible": (["--mask_ratio=0.99"], "visible"),
    "unknown mask": (["--mask=checker"], "checker"),
    "unknown method": (["--method=beit"], "beit"),
    "unknown offset": (["--pos_offset=left"], "left"),
    "share above 1": (["--avg_share=1.2"], "1.2"),
    "lscale zero": (["--lscale_init=0"], "--lscale_init"),
    "unknown model": (["--model=mae_vit_bse_patch16"], "mae_vit_base_patch16"),
    "size and patch": (["--input_size=30"], "multiple"),
    "size text": (["--input_size=big"], "big"),
    "decoder heads": (["--decoder_embed_dim=100", "--decoder_num_heads=7"], "heads"),
    "unknown data set": (["--dataset=imagenet"], "imagefolder"),
    "no data path": (["--dataset=imagefolder"], "data_path"),
    "missing folder": (["--dataset=imagefolder", "--data_path=/nowhere/at/all"], "/nowhere/at/all"),
    "channels": (["--in_chans=7"], "channels"),
    "batch over set": (["--batch_size=5000"], "1500"),
    "crop order": (["--crop_scale", "0.9", "0.2"], "crop_scale"),
    "device": (["--device=tpu9"], "tpu9"),
    "no gpu": (["--device=cuda:63"], "cuda:63"),
    "resume path": (["--resume=/nowhere.pth"], "/nowhere.pth"),
    "mean of two": (["--mean", "0.1", "0.2"], "mean"),
    "zero deviation": (["--std", "0"], "std"),
    "seed too large": (["--seed=99999999999"], "--seed"),
    "nan policy": (["--nan_policy=hope"], "hope"),
    "keep": (["--keep=-2"], "--keep"),
    "log every": (["--log_every=0"], "--log_every"),
    "recipe path": (["--config=/nowhere.yaml"], "/nowhere.yaml"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_input_is_one_message_and_exit_code_2(case: str, tmp_path: Path, run_main) -> None:
    flags, named = BAD_FLAGS[case]
    folder = tmp_path / "run"
    code, _, err = run_main("main_pretrain", [*TINY, f"--output_dir={folder}", *flags])
    assert code == 2
    message = err.strip().splitlines()
    assert len(message) == 1 and message[0].startswith("error: ") and named in message[0]
    assert not folder.exists()


@pytest.fixture(scope="module")
def old_run(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old") / "run"
    return shutil.copytree(trained("main_pretrain", TINY), folder)


# The run folder's own checkpoint comes before --resume, which is then not looked at.
@pytest.mark.parametrize("case", [case for case in BAD_FLAGS if case != "resume path"])
def test_bad_input_leaves_an_old_run_as_it_was(case: str, old_run: Path, run_main) -> None:
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in old_run.iterdir()}
    code, _, _ = run_main("main_pretrain", [*TINY, f"--output_dir={old_run}", *BAD_FLAGS[case][0]])
    assert code == 2
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in old_run.iterdir()} == before


BAD_RECIPES = {
    "key": ("mask_ration: 0.5", "mask_ratio"),
    "value": ("epochs: many", "many"),
    "yaml": ("epochs: [1", "YAML"),
    "list": ("- epochs", "mapping"),
    "switch": ("norm_pix_loss: 3", "norm_pix_loss"),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_bad_recipe(case: str, tmp_path: Path, run_main) -> None:
    text, named = BAD_RECIPES[case]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    code, _, err = run_main("main_pretrain", ["--config", str(recipe), *TINY])
    assert code == 2 and named in err and "Traceback" not in err


def test_an_old_run_is_not_mixed_with_another(tmp_path: Path, run_main) -> None:
    flags = [*TINY, "--epochs=1", f"--output_dir={tmp_path}"]
    main_pretrain.main(flags)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    for other, named in ((["--seed=1"], "seed"), (["--resume=none"], "--resume none")):
        code, _, err = run_main("main_pretrain", [*flags, *other])
        assert code == 2 and named in err
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"])
def test_half_set_environment_is_refused(missing: str, monkeypatch, run_main) -> None:
    full = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost",
            "MASTER_PORT": "29500"}  # fmt: skip
    for name, value in full.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    code, _, err = run_main("main_pretrain", TINY)
    assert code == 2 and f"{missing} missing" in err


def test_list_models(run_main) -> None:
    code, out, _ = run_main("main_pretrain", ["--list_models"])
    assert code == 0 and "mae_vit_base_patch16" in out.split()
