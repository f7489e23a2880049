"""main_finetune.py as its users run it: small, on drawn images; its parts against timm's."""

import json
import math
import os
import random
import signal
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from launch import TINY, launch, wait, wait_for_step
from PIL import Image, ImageOps
from runs import different, metrics_file, of_training, records, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor
from torchvision import transforms as v1

import engine_finetune
import main_finetune
from engine_finetune import BatchAugmentation, FinetuneLoss
from engine_train import train_steps
from main_finetune import build_augmentation, build_parser, resolve_tune
from models_zoo import CLASSIFIERS, MODELS, create_model
from util.config.flags import collect_settings
from util.data.datasets import build_dataset
from util.data.randomness import evenly, seeded
from util.data.transforms import FinetuneTransform, normalize
from util.errors import EXIT_INTERRUPTED, EXIT_STOPPED, BadInput
from util.mask.pos_embed import sincos_2d
from util.measure.accuracy import Accuracy
from util.train import session
from util.train.agreement import Agreement, Wish
from util.train.checkpoint import BEST, LAST, load_file, save_checkpoint
from util.train.optim import create_adamw, layer_decay_groups
from util.train.step import OptimizerStep

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = ["gradient", "discs", "stripes"]
# 32 images in batches of 8 are 4 steps an epoch.
SMALL = [
    "--dataset=synthetic", "--train_images=32", "--batch_size=8", "--epochs=2", "--warmup_epochs=1",
    "--log_every=1", "--num_workers=0", "--device=cpu",
]  # fmt: skip
# The published command of fine-tuning, but for its size.
PUBLISHED = [
    "--blr=5e-4", "--layer_decay=0.65", "--weight_decay=0.05", "--drop_path=0.1", "--reprob=0.25",
    "--mixup=0.8", "--cutmix=1.0", "--dist_eval",
]  # fmt: skip
# All that is drawn at random while training.
RANDOM = ["--drop_path=0.3", "--reprob=0.5", "--mixup=0.8", "--cutmix=1", "--blr=0.05"]


def training(folder: Path) -> list[dict[str, Any]]:
    """All that a run says of its training."""
    return of_training(folder, "finetune", ("train", "epoch", "eval"))


def checkpoint(folder: Path, name: str, task: str, settings: dict[str, Any]) -> str:
    """A checkpoint of random weights, of a model small enough to train in milliseconds."""
    torch.manual_seed(0)
    size = {"img_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2} | settings
    if task == "pretrain":
        size |= {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
        size |= {"lscale_init": 0.5, "pos_offset": "learned"}
    model = create_model(name, **size)
    if task == "pretrain":
        torch.nn.init.normal_(model.pos_phase)
    arguments = {**MODELS, **CLASSIFIERS}[name][1] | size
    folder.mkdir(exist_ok=True)
    state = {
        "task": task, "step": 1, "model": model.state_dict(), "model_args": arguments,
        "model_name": name,
    }  # fmt: skip
    if task == "finetune":
        state["classes"] = CLASSES
    return str(save_checkpoint(folder, state))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a pretrained checkpoint: RGB, 16 x 16 pixels, LScale and learned positions."""
    return checkpoint(tmp_path_factory.mktemp("pretrained"), "mae_vit_micro_patch4", "pretrain", {})


def finetune(folder: Path, path: str, *flags: str) -> None:
    """Train in this process; any failure is an exception."""
    main_finetune.main([*SMALL, f"--finetune={path}", f"--output_dir={folder}", *flags])


# ---- Runs --------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_the_published_commands_share_a_folder(tmp_path: Path, run_main) -> None:
    first = [*TINY, "--batch_size=64", "--epochs=2", "--save_every=1", f"--output_dir={tmp_path}"]
    assert run_main("main_pretrain", first)[0] == 0
    whole = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    numbered = weights(tmp_path, "checkpoint-0.pth")
    second = [
        *SMALL, *PUBLISHED, "--model=vit_micro_patch4", "--epochs=1", "--save_every=1",
        f"--finetune={tmp_path}/checkpoint-0.pth", f"--output_dir={tmp_path}",
    ]  # fmt: skip
    code, out, err = run_main("main_finetune", second)
    assert code == 0, err
    for line in out.splitlines():
        name, _, path = line.partition("  ")
        if name in ("checkpoint", "metrics", "events"):
            assert Path(path.split("  (")[0].strip()).exists(), line
    assert [r["step"] for r in records(tmp_path, "train", "finetune")] == [1, 2, 3, 4]
    for kind in ("epoch", "eval"):
        assert len(records(tmp_path, kind, "finetune")) == 1
    events = EventAccumulator(str(tmp_path / "finetune")).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4]
    saved = yaml.safe_load((tmp_path / "config-finetune.yaml").read_text())
    assert (saved["mixup"], saved["layer_decay"], saved["tune"]) == (0.8, 0.65, "full")
    # Pretraining's own files are as they were, or renamed.
    renamed = {
        "checkpoint-0.pth": "checkpoint-0-pretrain.pth", LAST: "checkpoint-last-pretrain.pth",
    }  # fmt: skip
    for name, content in whole.items():
        if not name.startswith("log-"):
            assert (tmp_path / renamed.get(name, name)).read_bytes() == content, name
    assert load_file(tmp_path / "checkpoint-0.pth")["task"] == "finetune"
    assert not different(weights(tmp_path, "checkpoint-0-pretrain.pth"), numbered)

    # Pretraining goes on from its first epoch, to the weights that it had.
    expected = torch.load(tmp_path / "checkpoint-1.pth", weights_only=True)["model"]
    lines = metrics_file(tmp_path, "finetune").read_bytes()
    for name in ("checkpoint-1.pth", "checkpoint-last-pretrain.pth"):
        (tmp_path / name).unlink()
    code, out, err = run_main("main_pretrain", first)
    assert code == 0 and "4 steps done" in out, err
    assert not different(weights(tmp_path), expected)
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in steps if r["kind"] == "train"] == list(range(1, 9))
    # And fine-tuning knows that it is done.
    code, out, err = run_main("main_finetune", second)
    assert code == 0 and "4 steps done" in out, err
    assert metrics_file(tmp_path, "finetune").read_bytes() == lines


NEW = ["--model=vit_micro_patch4", "--input_size=16"]
SWITCHES = {
    "published": PUBLISHED,
    "class token": ["--cls_token"],
    "mean": ["--global_pool"],
    "mean by name": ["--global_pool=avg"],
    "linear of the mean": ["--tune=linear", "--global_pool"],
    "plain": ["--aa=none", "--reprob=0", "--smoothing=0"],
    "jitter": ["--aa=none", "--color_jitter=0.4"],
    "autoaugment": ["--aa=original-mstd0.5"],
    "pairs": ["--mixup=0.2", "--mixup_mode=pair"],
    "elements": ["--mixup=0.2", "--cutmix=1", "--mixup_mode=elem", "--mixup_prob=0.5"],
    "cutmix bounds": ["--cutmix_minmax", "0.2", "0.8"],
    "erasing": ["--reprob=1", "--remode=const", "--recount=2"],
    "accumulation": ["--accum_iter=2", "--clip_grad=1"],
    "bf16": ["--precision=bf16"],
    "fp16": ["--precision=fp16"],
    "less memory": ["--grad_checkpointing"],
    "averages": ["--ema_decay=0.9"],
    "another size": ["--input_size=24x16"],
    "extended": ["--input_size=24", "--pos_resize=extend"],
    "spare outputs": ["--nb_classes=5"],
    "no evaluation": ["--eval_every=0"],
    "crops": ["--crop_scale", "0.5", "1", "--no_flip"],
    "digits": ["--dataset=digits"],
    "scratch": [*NEW],
    "scratch with LScale": [*NEW, "--lscale_init=0.1", "--betas", "0.9", "0.95", "--cls_token"],
    "gray": [*NEW, "--in_chans=1"],
    "five channels": [*NEW, "--in_chans=5", "--aa=none"],
    "five channels, jitter of 0": [*NEW, "--in_chans=5", "--aa=none", "--color_jitter=0"],
    "linear from scratch": [*NEW, "--tune=linear"],
}


@pytest.mark.smoke
@pytest.mark.parametrize("case", SWITCHES)
def test_every_switch_trains(case: str, pretrained: str, tmp_path: Path) -> None:
    flags = [*SMALL, "--epochs=1", f"--output_dir={tmp_path}", *SWITCHES[case]]
    if NEW[0] not in flags:
        flags.append(f"--finetune={pretrained}")
    main_finetune.main(flags)
    train, measured = records(tmp_path, "train", "finetune"), records(tmp_path, "eval", "finetune")
    assert len(train) == (2 if case == "accumulation" else 4)
    assert all(math.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in train)
    if case == "no evaluation":
        assert not measured and not (tmp_path / "result.json").exists()
    else:
        assert measured[-1]["images"] == (297 if case == "digits" else 64)
        assert ("ema_top1" in measured[-1]) == (case == "averages")
    state = load_file(tmp_path / LAST)
    assert len(state["classes"]) == (10 if case == "digits" else 3)
    if case == "spare outputs":
        assert state["model"]["head.weight"].shape[0] == 5
    channels = {"gray": 1, "five channels": 5, "five channels, jitter of 0": 5}.get(case, 3)
    assert state["model"]["patch_embed.proj.weight"].shape[1] == channels


AFTER = ("head.", "fc_norm.")
LEARNS = {
    "full": ("",),
    "partial:2": ("",),  # as deep as the model is
    "partial:1": ("blocks.1.", *AFTER),
    "partial:0.5": ("blocks.1.norm2.", "blocks.1.mlp.", "blocks.1.ls2.", *AFTER),
    "partial:0": ("head.",),
    "linear": ("head.",),
}


@pytest.mark.smoke
@pytest.mark.parametrize("tune", LEARNS)
def test_only_what_is_tuned_changes(tune: str, pretrained: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    # Without a rate the weights stay where they started.
    finetune(one, pretrained, f"--tune={tune}", "--epochs=1", "--lr=0", "--min_lr=0")
    finetune(two, pretrained, f"--tune={tune}", "--epochs=1", "--blr=0.1")
    start, end, given = weights(one), weights(two), load_file(pretrained)["model"]
    statistics = {"head.0.running_mean", "head.0.running_var", "head.0.num_batches_tracked"}
    changed = {name for name in start if not torch.equal(start[name], end[name])} - statistics
    assert changed == {name for name in start if name.startswith(LEARNS[tune])} - statistics
    linear = tune in ("linear", "partial:0")
    assert (statistics <= start.keys()) == linear
    # Head and norm are fresh, the rest is the checkpoint's.
    head = start["head.1.weight" if linear else "head.weight"]
    assert head.std().item() == pytest.approx(0.01 if linear else 2e-5, rel=0.3)  # of 96 numbers
    assert head.abs().max() < 5 * (0.01 if linear else 2e-5)
    norm = "norm" if linear else "fc_norm"
    assert {f"{norm}.weight", f"{norm}.bias"} <= start.keys()
    fresh = (*AFTER, "pos_embed")
    for name, tensor in start.items():
        if not name.startswith(fresh):
            assert torch.equal(tensor, given[name]), name
    code = sincos_2d(32, (4, 4), "learned", phase=given["pos_phase"]).float()
    assert torch.equal(start["pos_embed"][0, 1:], code)
    assert torch.equal(start["pos_embed"][:, :1], given["pos_embed"][:, :1])
    assert load_file(two / LAST)["tune"] == ("linear" if linear else tune)


@pytest.mark.smoke
@pytest.mark.parametrize("flags", [[], ["--ema_decay=0.5"], ["--tune=linear"]])
def test_results_are_those_of_the_last_evaluation(
    flags: list[str], pretrained: str, tmp_path: Path, run_main
) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    finetune(run, pretrained, "--save_every=1", "--blr=0.1", *flags)
    result, last = (
        json.loads((run / "result.json").read_text()),
        records(run, "eval", "finetune")[-1],
    )
    names = [k for k in last if k not in ("kind", "step", "epoch")]
    assert {"top1", "top5", "loss", "images"} <= set(names)
    assert ("ema_loss" in names) == (flags == ["--ema_decay=0.5"])
    assert {k: result[k] for k in names} == {k: last[k] for k in names}
    assert (result["epoch"], result["dataset"]) == (1, "synthetic")
    own = [f"--resume={run / LAST}", f"--output_dir={again}", "--eval", *SMALL]
    code, _, err = run_main("main_finetune", own)
    assert code == 0, err
    measured = json.loads((again / "result-eval.json").read_text())
    assert {k: measured[k] for k in names} == {k: last[k] for k in names}
    assert measured["checkpoint"] == str(run / LAST)
    for name in ("confusion", "per_class"):
        assert (again / f"{name}-eval.csv").read_bytes() == (run / f"{name}.csv").read_bytes()
    # With no name it is the folder's best that is measured; what the run says of itself stays.
    best, before = load_file(run / BEST)["epoch"], (run / "result.json").read_bytes()
    code, text, err = run_main("main_finetune", ["--eval", f"--output_dir={run}", *SMALL])
    assert code == 0 and f"{run}/result-eval.json, confusion-eval.csv" in text, err
    measured = json.loads((run / "result-eval.json").read_text())
    expected = records(run, "eval", "finetune")[best]
    assert {k: measured[k] for k in names} == {k: expected[k] for k in names}
    assert (run / "result.json").read_bytes() == before
    # Another checkpoint's numbers are set aside, with their tables; the same measurement is not.
    other = [f"--resume={run}/checkpoint-0.pth", f"--output_dir={run}", "--eval", *SMALL]
    for _ in range(2):
        code, text, err = run_main("main_finetune", other)
        assert code == 0, err
    assert json.loads((run / "result-eval-1.json").read_text()) == measured
    assert {p.name for p in run.glob("*-eval*")} == {
        f"{name}-eval{n}.{ending}"
        for name, ending in (("result", "json"), ("confusion", "csv"), ("per_class", "csv"))
        for n in ("", "-1")
    }
    now = json.loads((run / "result-eval.json").read_text())
    assert now["checkpoint"].endswith("checkpoint-0.pth")
    assert (run / "result.json").read_bytes() == before


@pytest.mark.smoke
def test_evaluation_normalises_as_training_did(pretrained: str, tmp_path: Path) -> None:
    """The checkpoint knows the mean and deviation that it was trained with."""
    run, again = tmp_path / "run", tmp_path / "again"
    finetune(run, pretrained, "--epochs=1", "--blr=0.5", "--mean", "0.2", "--std", "0.4")
    main_finetune.main(["--eval", f"--resume={run / LAST}", f"--output_dir={again}", *SMALL])
    files = (run / "result.json", again / "result-eval.json")
    results = [json.loads(file.read_text()) for file in files]
    assert results[0]["loss"] == results[1]["loss"]


@pytest.mark.parametrize("flag", ["nb_classes", "in_chans"])
def test_evaluation_does_not_overrule_the_checkpoint(
    flag: str, pretrained: str, tmp_path: Path, run_main
) -> None:
    finetune(tmp_path, pretrained, "--epochs=1")
    argv = ["--eval", f"--resume={tmp_path / LAST}", f"--output_dir={tmp_path}", *SMALL]
    code, _, err = run_main("main_finetune", [*argv, f"--{flag}=2"])
    assert code == 2 and f"--{flag} 2, but" in err and "says 3" in err


def pretend(top1: Iterable[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations that find so many of the images right, in turn; `-1` is a run that is ended."""
    original, answers = engine_finetune.evaluate, iter(top1)

    def evaluate(*args: Any, **kwargs: Any) -> Accuracy:
        right = next(answers)
        if right < 0:
            raise KeyboardInterrupt
        confusion = torch.tensor([[right, 64 - right, 0], [0, 0, 0], [0, 0, 0]])
        return replace(original(*args, **kwargs), confusion=confusion)

    monkeypatch.setattr(engine_finetune, "evaluate", evaluate)


@pytest.mark.smoke
@pytest.mark.parametrize("top1", [(3, 9, 9, 5), (8, 2, 3, 8), (0, 0, 1, 2)])
def test_the_best_epoch_is_kept(
    top1: tuple[int, ...], pretrained: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    pretend(top1, monkeypatch)
    finetune(tmp_path, pretrained, "--epochs=4", "--save_every=1", "--blr=0.1")
    best = top1.index(max(top1))  # the first of equals
    state = load_file(tmp_path / BEST)
    assert state["epoch"] == best
    assert not different(state["model"], weights(tmp_path, f"checkpoint-{best}.pth"))
    assert state["classes"] == CLASSES
    known = {"top1": 100 * max(top1) / 64, "epoch": best}
    assert load_file(tmp_path / LAST)["best"] == known
    assert json.loads((tmp_path / "result.json").read_text())["best"] == known
    assert f"{BEST}" in capsys.readouterr().out
    assert [r["top1"] for r in records(tmp_path, "eval", "finetune")] == [
        100 * n / 64 for n in top1
    ]


@pytest.mark.smoke
@pytest.mark.parametrize("ended_at", [1, 3])
def test_ended_while_measuring(ended_at: int, pretrained: str, tmp_path: Path, monkeypatch) -> None:
    """The training of the epoch is not done again, its measurement is; the best stays known."""
    top1, flags = [3, 9, 5, 7], ["--epochs=4", "--save_every=0", "--blr=0.1", *RANDOM]
    one, two = tmp_path / "one", tmp_path / "two"
    with monkeypatch.context() as patch:
        pretend(top1, patch)
        finetune(one, pretrained, *flags)
    with monkeypatch.context() as patch:
        pretend([*top1[:ended_at], -1, *top1[ended_at:]], patch)
        with pytest.raises(SystemExit, match=str(EXIT_INTERRUPTED)):
            finetune(two, pretrained, *flags)
        assert load_file(two / LAST)["step"] == 4 * (ended_at + 1)
        finetune(two, pretrained, *flags)
    assert not different(load_file(one / LAST), load_file(two / LAST))
    assert not different(load_file(one / BEST), load_file(two / BEST))
    assert training(one) == training(two)
    assert (one / "result.json").read_bytes() == (two / "result.json").read_bytes()


@pytest.mark.smoke
@pytest.mark.parametrize("flags", [RANDOM, ["--tune=linear"]])
def test_workers_change_no_number(flags: list[str], pretrained: str, tmp_path: Path) -> None:
    """Erasing, mixup and drop path are drawn by step, RandAugment by image."""
    one, two = tmp_path / "one", tmp_path / "two"
    flags = [*flags, "--ema_decay=0.9", "--blr=0.1"]
    finetune(one, pretrained, *flags)
    finetune(two, pretrained, *flags, "--num_workers=2", "--log_every=3", "--save_every=1")
    for part in ("model", "ema", "optimizer"):
        assert not different(load_file(one / LAST)[part], load_file(two / LAST)[part], part)
    measured = [[r for r in training(f) if r["kind"] != "train"] for f in (one, two)]
    assert measured[0] == measured[1]


# ---- Learning rates ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "peak", "warmup", "decay"),
    [
        # 32 images: 4 steps of 8 in an epoch, of 3 epochs.
        (["--warmup_epochs=1", "--blr=0.01", "--layer_decay=0.65"], 0.01 * 8 / 256, 1, 0.65),
        (["--warmup_epochs=0.5", "--lr=0.02", "--layer_decay=0.75"], 0.02, 0.5, 0.75),
        (["--warmup_epochs=0", "--blr=0.01", "--layer_decay=1", "--batch_size=4", "--accum_iter=2"],
         0.01 * 8 / 256, 0, 1),
        (["--warmup_epochs=4", "--lr=0.01", "--tune=partial:1", "--layer_decay=0.5"], 0.01, 4, 0.5),
        (["--warmup_epochs=1", "--blr=0.1", "--tune=linear"], 0.1 * 8 / 256, 1, 1),
    ],
)  # fmt: skip
def test_rates_are_the_closed_form(
    flags: list[str], peak: float, warmup: float, decay: float, pretrained: str, tmp_path: Path,
    monkeypatch,
) -> None:  # fmt: skip
    used: list[list[dict[str, Any]]] = []
    original = OptimizerStep._update

    def update(self: OptimizerStep, loss: Tensor) -> Any:
        keys = ("lr", "lr_scale", "param_names")
        used.append([{k: group[k] for k in keys} for group in self.optimizer.param_groups])
        return original(self, loss)

    monkeypatch.setattr(OptimizerStep, "_update", update)
    finetune(tmp_path, pretrained, "--epochs=3", "--min_lr=1e-5", "--eval_every=0", *flags)
    train = records(tmp_path, "train", "finetune")
    assert len(train) == len(used) == 12
    for record, groups in zip(train, used, strict=True):
        epoch = (record["step"] - 1) / 4  # fractional, when the step starts
        if epoch < warmup:
            expected = peak * epoch / warmup
        else:
            share = (epoch - warmup) / (3 - warmup)
            expected = 1e-5 + (peak - 1e-5) * 0.5 * (1 + math.cos(math.pi * share))
        assert record["lr"] == pytest.approx(expected, rel=1e-12, abs=1e-18)
        for group in groups:
            for name in group["param_names"]:
                # The embeddings are layer 0, block i is i + 1, what comes after 3: of two blocks.
                layer = 3 if name.startswith(("norm.", "fc_norm.", "head.")) else 0
                if name.startswith("blocks."):
                    layer = int(name.split(".")[1]) + 1
                assert group["lr_scale"] == pytest.approx(decay ** (3 - layer), rel=1e-12), name
            assert group["lr"] == record["lr"] * group["lr_scale"]
    names = [name for group in used[0] for name in group["param_names"]]
    assert len(names) == len(set(names)) > 0


# ---- Augmentation of batches -------------------------------------------------------------------

MIXES = [
    *(
        (["--mixup=0.8", "--cutmix=1.0", f"--mixup_mode={mode}", *more], {"mode": mode, **settings})
        for mode in ("batch", "pair", "elem")
        for more, settings in (
            ([], {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}),
            (
                ["--mixup_prob=0.6", "--mixup_switch_prob=0.2", "--smoothing=0.3"],
                {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 0.6, "switch_prob": 0.2,
                 "label_smoothing": 0.3},
            ),
            (["--cutmix=0"], {"mixup_alpha": 0.8, "cutmix_alpha": 0.0}),
            (["--mixup=0"], {"mixup_alpha": 0.0, "cutmix_alpha": 1.0}),
        )
    ),
    (["--cutmix_minmax", "0.2", "0.7"], {"mixup_alpha": 0.0, "cutmix_minmax": [0.2, 0.7]}),
]  # fmt: skip


def augmentation_of(*flags: str) -> BatchAugmentation:
    args = build_parser().parse([*flags])
    resolve_tune(args)
    return build_augmentation(args, 10, torch.device("cpu"))


def batch_of(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images [8, 3, 24, 16], labels [8] and logits [8, 10]."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(8, 3, 24, 16, generator=generator)
    labels = torch.randint(10, (8,), generator=generator)
    return images, labels, 3 * torch.randn(8, 10, generator=generator)


@pytest.mark.parametrize("reprob", [0, 0.6])
@pytest.mark.parametrize(("flags", "settings"), MIXES)
def test_mixing_is_timms(flags: list[str], settings: dict[str, Any], reprob: float) -> None:
    ours = augmentation_of(f"--reprob={reprob}", *flags)
    erasing = RandomErasing(reprob, mode="pixel", max_count=1, device="cpu")
    mixup = Mixup(**({"label_smoothing": 0.1} | settings), num_classes=10)
    changed = 0
    for seed in range(12):
        images, labels, logits = batch_of(seed)
        with seeded(seed):
            x, target = ours(images.clone(), labels)
        with seeded(seed):
            expected = images.clone()
            expected = erasing(expected) if reprob else expected
            expected, expected_target = mixup(expected, labels)
        assert torch.equal(x, expected) and torch.equal(target, expected_target)
        changed += not torch.equal(x, images)
        loss = SoftTargetCrossEntropy()(logits, expected_target)
        assert ours.loss(logits, target) == pytest.approx(loss.item(), rel=1e-6)  # float32
    assert changed >= 4


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_erasing_and_smoothing_are_timms(mode: str, count: int, smoothing: float) -> None:
    flags = [f"--remode={mode}", f"--recount={count}", f"--smoothing={smoothing}", "--reprob=0.5"]
    ours = augmentation_of(*flags)
    erasing = RandomErasing(0.5, mode=mode, max_count=count, device="cpu")
    for seed in range(6):
        images, labels, logits = batch_of(seed)
        with seeded(seed):
            x, target = ours(images.clone(), labels)
        with seeded(seed):
            expected = erasing(images.clone())
        assert torch.equal(x, expected) and not torch.equal(x, images)
        assert torch.equal(target, labels)
        loss = LabelSmoothingCrossEntropy(smoothing)(logits, labels)
        assert ours.loss(logits, target) == pytest.approx(loss.item(), rel=1e-6)  # float32


def test_presets_of_augmentation() -> None:
    assert augmentation_of("--tune=linear") == BatchAugmentation(None, None, 0.0)
    full = augmentation_of("--tune=partial:1")
    assert full.mixup is None and full.smoothing == 0.1
    assert full.erasing is not None and full.erasing.probability == 0.25


def test_half_precision_logits_lose_nothing_in_the_loss() -> None:
    _, labels, logits = batch_of(0)
    half = logits.bfloat16()
    for augmentation, target in (
        (BatchAugmentation(smoothing=0.1), labels),
        (BatchAugmentation(), torch.nn.functional.one_hot(labels, 10).float()),
    ):
        loss = augmentation.loss(half, target)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, augmentation.loss(half.float(), target))


# ---- Augmentation of images --------------------------------------------------------------------


def picture(mode: str) -> Image.Image:
    """Waves and noise, 60 x 44 pixels."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:44, :60]
    planes = [127 + 90 * np.sin(x / 9 + c) * np.cos(y / 7 - c) for c in range(3)]
    noisy = np.stack(planes, axis=-1) + rng.normal(0, 8, (44, 60, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)


def keep_bits(image: Image.Image, bits: int) -> Image.Image:
    """Pillow's posterize before its version 13, which refuses the 0 bits that timm asks for."""
    levels = [level & ~(2 ** (8 - bits) - 1) for level in range(256)]
    return image.point(levels * len(image.getbands()))


@pytest.mark.parametrize(
    ("policy", "jitter", "flip"),
    [
        ("rand-m9-mstd0.5-inc1", None, True),
        ("rand-m9-mstd0.5-inc1", 0.4, False),  # a policy comes before jitter
        ("original-mstd0.5", None, True),
        (None, 0.4, True),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_augmentation_is_timms(
    mode: str, policy: str | None, jitter: float | None, flip: bool, monkeypatch
) -> None:
    mean, std = (MEAN, STD) if mode == "RGB" else ((0.45,), (0.225,))
    ours = FinetuneTransform(
        (24, 32), auto_augment=policy, color_jitter=jitter, crop_scale=(0.3, 0.9), flip=flip,
        mean=mean,
    )  # fmt: skip
    timms = create_transform(
        (len(mean), 24, 32), is_training=True, scale=(0.3, 0.9), hflip=0.5 * flip,
        color_jitter=jitter, auto_augment=policy, interpolation="bicubic", mean=mean, std=std,
    )  # fmt: skip
    monkeypatch.setattr(ImageOps, "posterize", keep_bits)
    image = picture(mode)
    shift, scale = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    views = []
    for seed in range(60):  # so that each operation has its turn
        with seeded(seed):
            view = ours(image)
        with seeded(seed):
            expected = (timms(image) * scale + shift) * 255
        assert view.dtype == torch.uint8 and view.shape == (len(mode), 24, 32)
        # Whole numbers, but for what normalising and back loses in float32.
        assert (view - expected).abs().max() < 1e-3, seed
        views.append(view)
    assert len({view.numpy().tobytes() for view in views}) > 55


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_without_a_policy_it_is_torchvisions(mode: str) -> None:
    """As MAE's linear probe has it."""
    channels = len(mode)
    ours = FinetuneTransform((24, 32), auto_augment=None, color_jitter=None, mean=(0.5,) * channels)
    official = v1.Compose([
        v1.RandomResizedCrop((24, 32), interpolation=v1.InterpolationMode.BICUBIC),
        v1.RandomHorizontalFlip(),
        v1.PILToTensor(),
    ])  # fmt: skip
    for seed in range(10):
        with seeded(seed):
            view = ours(picture(mode))
        with seeded(seed):
            assert torch.equal(view, official(picture(mode))), seed


def test_images_of_many_channels_are_cropped_and_flipped_alone() -> None:
    settings: dict[str, Any] = {"color_jitter": None, "mean": (0.5,) * 5}
    image = torch.arange(5 * 40 * 40).reshape(5, 40, 40).to(torch.uint8)
    view = FinetuneTransform((16, 16), auto_augment=None, **settings)(image)
    assert view.shape == (5, 16, 16) and view.dtype == torch.uint8
    with pytest.raises(BadInput, match="--aa none"):
        FinetuneTransform((16, 16), auto_augment="rand-m9-mstd0.5-inc1", **settings)


# ---- The epoch ---------------------------------------------------------------------------------


class Recorder(torch.nn.Module):
    """Remembers what it was shown and what randomness it found."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(1, 10)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append((images.clone(), torch.rand(3)))
        assert self.training
        return self.linear(images.mean((1, 2, 3)).unsqueeze(1))


def find_epoch(batches: int, **settings: Any) -> tuple[list[tuple[Tensor, Tensor]], list[Any]]:
    """What the model of an epoch of uint8 batches sees, and the reports of its steps."""
    generator = torch.Generator().manual_seed(4)
    loader = [
        {
            "x": torch.randint(256, (8, 3, 8, 8), generator=generator).to(torch.uint8),
            "y": torch.arange(8),
            "index": torch.arange(8) + 8 * i,
            "bad": torch.tensor([[-1] * 4] * 7 + [[i, 90, -1, -1]]),
        }
        for i in range(batches)
    ]
    model, reports = Recorder(), []
    accum_iter, first = settings.pop("accum_iter", 1), settings.pop("first_step", 0)
    optimizer = create_adamw([{"params": list(model.parameters())}], 0.1, (0.9, 0.999))
    step = OptimizerStep(model, optimizer, device=torch.device("cpu"), accum_iter=accum_iter)
    augmentation = settings.pop("augmentation", augmentation_of("--mixup=0.8", "--cutmix=1"))
    stop_at = settings.pop("stop_at", None)

    def after_step(report: Any) -> bool:
        reports.append(report)
        return report.step == stop_at

    loss = FinetuneLoss(augmentation, MEAN, STD, step.device, **({"seed": 0, "rank": 0} | settings))
    done = train_steps(
        model, loader[first * accum_iter :], step, loss, lambda s: 0.01 * s, first_step=first,
        after_step=after_step,
    )  # fmt: skip
    assert done == first + len(reports)
    if augmentation == BatchAugmentation():
        for batch, (images, _) in zip(loader, model.seen, strict=True):
            assert torch.equal(images, normalize(batch["x"], MEAN, STD))
    return model.seen, reports


def same(a: Sequence[tuple[Tensor, Tensor]], b: Sequence[tuple[Tensor, Tensor]]) -> list[bool]:
    return [torch.equal(p[0], q[0]) and torch.equal(p[1], q[1]) for p, q in zip(a, b, strict=True)]


def test_steps_are_reported_and_can_be_left() -> None:
    _, reports = find_epoch(6, augmentation=BatchAugmentation(), accum_iter=2)
    assert [r.step for r in reports] == [1, 2, 3]
    assert [r.lr for r in reports] == [0.0, 0.01, 0.02]
    assert [[i.tolist()[0] for i in r.indices] for r in reports] == [[0, 8], [16, 24], [32, 40]]
    assert [r.bad for r in reports] == [[0, 90, 1, 90], [2, 90, 3, 90], [4, 90, 5, 90]]
    assert [r.step for r in find_epoch(6, stop_at=4)[1]] == [1, 2, 3, 4]


def test_draws_are_those_of_seed_step_micro_step_and_rank() -> None:
    seen = find_epoch(6)[0]
    draws = {tuple(noise.tolist()) for _, noise in seen}
    assert len(draws) == 6
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    assert all(same(find_epoch(6)[0], seen))
    assert all(same(find_epoch(6, first_step=2)[0], seen[2:]))
    for other in ({"seed": 1}, {"rank": 1}):
        assert not any(same(find_epoch(6, **other)[0], seen))
    # The first micro-step of a step is drawn as the whole step is, the second is not.
    parts = find_epoch(6, accum_iter=2)[0]
    assert len({tuple(noise.tolist()) for _, noise in parts}) == 6
    assert [torch.equal(parts[2 * i][1], seen[i][1]) for i in range(3)] == [True] * 3


@pytest.mark.parametrize("tune", ["full", "linear"])
def test_averaged_weights_are_those_averaged_by_hand(
    tune: str, pretrained: str, tmp_path: Path, monkeypatch
) -> None:
    """Of the weights after each step, beginning with those before the first; buffers as well."""
    seen: list[dict[str, Tensor]] = []

    class Spy(OptimizerStep):
        def __call__(self, *args: Any) -> Any:
            if not seen:
                self.copy()
            result = super().__call__(*args)
            self.copy()
            return result

        def copy(self) -> None:
            seen.append({k: v.double().clone() for k, v in self.model.state_dict().items()})

    monkeypatch.setattr(session, "OptimizerStep", Spy)
    finetune(tmp_path, pretrained, f"--tune={tune}", "--ema_decay=0.7", "--blr=0.5", *RANDOM[:4])
    assert len(seen) == 9
    state = load_file(tmp_path / LAST)
    assert state["ema"].keys() == seen[0].keys()
    far = 0.0
    for name, averaged in state["ema"].items():
        if not averaged.is_floating_point():
            assert averaged == seen[-1][name]
            continue
        expected = seen[0][name]
        for after in seen[1:]:
            expected = 0.7 * expected + 0.3 * after[name]
        # 8 steps in float32
        torch.testing.assert_close(averaged.double(), expected, rtol=1e-6, atol=1e-6)
        far = max(far, (expected - seen[-1][name]).abs().max().item())
    assert far > 1e-4, "the weights were to move, or anything is their average"


def test_averages_follow_each_step_of_an_epoch() -> None:
    """`after_update` comes once a step, with the new weights, and before `after_step`."""
    model = create_model(
        "vit_micro_patch4", img_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=10
    )
    groups = layer_decay_groups(model, 0.05, 0.65)
    step = OptimizerStep(model, create_adamw(groups, 0.1, (0.9, 0.999)), device=torch.device("cpu"))
    before = model.patch_embed.proj.weight.detach().clone()
    order: list[str] = []
    batch = {
        "x": torch.full((4, 3, 8, 8), 7, dtype=torch.uint8), "y": torch.arange(4),
        "index": torch.arange(4), "bad": torch.full((4, 4), -1),
    }  # fmt: skip

    def after_update() -> None:
        assert not torch.equal(model.patch_embed.proj.weight, before)
        order.append("update")

    train_steps(
        model, [batch] * 3, step, FinetuneLoss(BatchAugmentation(), MEAN, STD, step.device, 0, 0),
        lambda s: 0.1, first_step=0, after_update=after_update,
        after_step=lambda report: order.append("step") or False,
    )  # fmt: skip
    assert order == ["update", "step"] * 3


# ---- Stopping and going on ---------------------------------------------------------------------

# 160 images in batches of 8 are 20 steps an epoch, 60 in all.
LONG = ["--train_images=160", "--epochs=3", "--save_minutes=0", "--ema_decay=0.9", *RANDOM]


@pytest.mark.dist
@pytest.mark.parametrize(("tune", "world"), [("full", 1), ("linear", 1), ("full", 2)])
def test_stopped_in_an_epoch_it_ends_in_the_same_bits(
    tune: str, world: int, pretrained: str, tmp_path: Path, run_main
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    flags = [
        *SMALL, *LONG, f"--finetune={pretrained}", f"--tune={tune}", f"--batch_size={8 // world}",
    ]  # fmt: skip

    def start(folder: Path) -> list[BaseProcess]:
        folder.mkdir(exist_ok=True)
        argv = [*flags, f"--output_dir={folder}"]
        return launch(argv, folder / "out", world, module="main_finetune")

    def run(folder: Path) -> None:
        if world == 1:  # no process needed
            main_finetune.main([*flags, f"--output_dir={folder}"])
        else:
            assert wait(start(folder)) == [0] * world, (folder / "out").read_text()

    children = start(two)
    wait_for_step(two, 7, children, "finetune")
    os.kill(children[-1].pid, signal.SIGTERM)
    assert wait(children) == [EXIT_STOPPED] * world, (two / "out").read_text()
    stopped = load_file(two / LAST)
    assert 7 <= stopped["step"] < 60 and stopped["stage"] == "training"
    assert "ema" in stopped and stopped["optimizer"]["state"]
    if world == 2:  # with another number of processes other numbers would be drawn
        more = [*flags, f"--output_dir={two}", "--batch_size=8"]
        code, _, err = run_main("main_finetune", more)
        assert code == 2 and "processes: was 2, is 1" in err, err
        assert not different(load_file(two / LAST), stopped)
    run(two)
    run(one)
    assert not different(load_file(one / LAST), load_file(two / LAST))
    assert not different(load_file(one / BEST), load_file(two / BEST))
    assert training(one) == training(two)
    assert [r["step"] for r in records(two, "train", "finetune")] == list(range(1, 61))
    assert (one / "result.json").read_bytes() == (two / "result.json").read_bytes()
    if world == 2:  # TensorBoard orders by second and process number: both starts are to be new
        events = EventAccumulator(str(two / "finetune")).Reload()
        assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 61))
    # The parts that were to be compared were there, and learnt.
    state = load_file(one / LAST)
    assert different(state["model"], state["ema"]) and different(state["model"], stopped["model"])
    if tune == "linear":
        assert state["model"]["head.0.num_batches_tracked"] == 60
        assert state["model"]["head.0.running_mean"].any()


@pytest.mark.parametrize("stop_at", [4, 5, 8])
def test_stopped_at_the_end_of_an_epoch(
    stop_at: int, pretrained: str, tmp_path: Path, monkeypatch
) -> None:
    """What is due after an epoch is done once, whichever side of it the stop falls on."""
    flags = ["--save_every=1", "--log_every=3", "--ema_decay=0.9", *RANDOM]
    one, two = tmp_path / "one", tmp_path / "two"
    finetune(one, pretrained, *flags)
    original, steps = Agreement.after_step, [0]

    def after_step(self: Agreement) -> Wish:
        steps[0] += 1
        return Wish(stop=signal.SIGTERM) if steps[0] == stop_at else original(self)

    monkeypatch.setattr(Agreement, "after_step", after_step)
    with pytest.raises(SystemExit, match=str(EXIT_STOPPED)):
        finetune(two, pretrained, *flags)
    finetune(two, pretrained, *flags)
    names = [{p.name for p in folder.glob("checkpoint-*")} for folder in (one, two)]
    assert names[0] == names[1]
    for name in names[0]:
        assert not different(load_file(one / name), load_file(two / name)), name
    assert training(one) == training(two)


# ---- Bad input ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, pretrained: str) -> dict[str, str]:
    """Checkpoints to name on the command line."""
    root = tmp_path_factory.mktemp("files")
    tuned = checkpoint(root / "tuned", "vit_micro_patch4", "finetune", {"num_classes": 3})
    content = Path(tuned).read_bytes()
    foreign = root / "foreign.pth"
    torch.save({"model": load_file(tuned)["model"]}, foreign)
    for name, data in (
        ("cut.pth", content[:-2000]),
        ("bit.pth", content[:9000] + bytes([content[9000] ^ 1]) + content[9001:]),
        ("foreign-cut.pth", foreign.read_bytes()[:-2000]),
        ("text.pth", b"no weights"),
        ("empty.pth", b""),
    ):
        (root / name).write_bytes(data)
    torch.save({"model": {"layer1.weight": torch.zeros(3)}}, root / "resnet.pth")
    (root / "nothing").mkdir()
    return {"pretrained": pretrained, "tuned": tuned, "root": str(root)}


# Leaves --finetune, which the others are given, out.
ALONE = "alone"
EVAL = [ALONE, "--eval"]
BAD_INPUT = {
    "another architecture": (["--model=vit_tiny_patch4"], "a different architecture"),
    "another patch": (["--model=vit_micro_patch8"], "patch_size"),
    "unknown model": (["--model=vit_micro_patch5"], "vit_micro_patch4"),
    "no classifier": ([ALONE, "--model=mae_vit_micro_patch4"], "is not a classifier"),
    "nothing to start from": ([ALONE], "--model NAME"),
    "missing file": (["--finetune={root}/none.pth"], "does not exist"),
    "a folder": (["--finetune={root}"], "holds no weights"),
    "cut": (["--finetune={root}/cut.pth"], "is not readable"),
    "one bit": (["--finetune={root}/bit.pth"], "checksum"),
    "cut, of another program": (["--finetune={root}/foreign-cut.pth"], "is not readable"),
    "text": (["--finetune={root}/text.pth"], "is not readable"),
    "empty": (["--finetune={root}/empty.pth"], "is not readable"),
    "another kind of net": (["--finetune={root}/resnet.pth"], "no encoder"),
    "not https": (["--finetune=http://localhost/x.pth"], "https"),
    "resume of pretraining": (["--resume={pretrained}"], "not finetune"),
    "resume path": (["--resume=/nowhere.pth"], "/nowhere.pth"),
    "eval of nothing": ([*EVAL], "no fine-tuned checkpoint"),
    "eval of a missing file": ([*EVAL, "--resume={root}/none.pth"], "does not exist"),
    "eval without a head": ([*EVAL, "--resume={pretrained}"], "no classification head"),
    "eval with other classes": ([*EVAL, "--resume={tuned}", "--dataset=digits"], "3 classes"),
    "eval with unknown classes": (
        [*EVAL, "--resume={root}/foreign.pth", "--dataset=digits"], "3 outputs",
    ),
    "eval without labels": ([*EVAL, "--resume={tuned}", "--dataset=photos"], "no labels"),
    "eval of another architecture": (
        [*EVAL, "--resume={tuned}", "--model=vit_tiny_patch4"], "a different architecture",
    ),
    "too few outputs": (["--nb_classes=2"], "--nb_classes 2"),
    "no labels": (["--dataset=photos"], "no labels"),
    "odd batch": (["--batch_size=7", "--mixup=0.8"], "even"),
    "odd batch, cutmix": (["--batch_size=5", "--cutmix_minmax", "0.2", "0.8"], "even"),
    "batch over set": (["--batch_size=64"], "32 images"),
    "more blocks than there are": (["--tune=partial:9"], "partial:9"),
    "part of a block": (["--tune=partial:0.7"], "partial:0.7"),
    "negative blocks": (["--tune=partial:-1"], "partial:-1"),
    "nan blocks": (["--tune=partial:nan"], "partial:nan"),
    "unknown part": (["--tune=head"], "linear"),
    "unknown policy": (["--aa=wild"], "wild"),
    "unknown section": (["--aa=rand-q9"], "rand-q9"),
    "policy without a number": (["--aa=rand-mx9"], "rand-mx9"),
    "policy for many channels": ([*NEW, ALONE, "--in_chans=5"], "--aa none"),
    "channels": ([*NEW, ALONE, "--dataset=digits", "--in_chans=5"], "channels"),
    "size and patch": (["--input_size=18"], "multiple"),
    "pool": (["--global_pool=max"], "max"),
    "drop path": (["--drop_path=1.5"], "--drop_path"),
    "layer decay": (["--layer_decay=0"], "--layer_decay"),
    "averages": (["--ema_decay=2"], "--ema_decay"),
    "smoothing": (["--smoothing=-0.1"], "--smoothing"),
    "erasing mode": (["--remode=blur"], "blur"),
    "mixup mode": (["--mixup_mode=all"], "all"),
    "crop order": (["--crop_scale", "0.9", "0.2"], "crop_scale"),
    "abbreviation": (["--layer_dec=0.5"], "--layer_decay"),
    "flag of pretraining": (["--mask_ratio=0.75"], "--mask_ratio"),
    "missing folder": (["--dataset=imagefolder", "--data_path=/nowhere/at/all"], "/nowhere/at/all"),
    "no gpu": (["--device=cuda:63"], "cuda:63"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_message_and_exit_code_2(
    case: str, files: dict[str, str], tmp_path: Path, run_main
) -> None:
    flags, named = BAD_INPUT[case]
    folder = tmp_path / "run"
    argv = [*SMALL, f"--output_dir={folder}"]
    if ALONE not in flags:
        argv.append(f"--finetune={files['pretrained']}")
    argv += [flag.format(**files) for flag in flags if flag != ALONE]
    code, _, err = run_main("main_finetune", argv)
    assert code == 2, err
    message = err.strip().splitlines()
    assert len(message) == 1 and message[0].startswith("error: ") and named in message[0]
    assert not folder.exists()


def test_an_old_run_is_not_mixed_with_another(pretrained: str, tmp_path: Path, run_main) -> None:
    finetune(tmp_path, pretrained, "--epochs=1")
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    argv = [*SMALL, "--epochs=1", f"--finetune={pretrained}", f"--output_dir={tmp_path}"]
    for other, named in (
        (["--seed=1"], "seed"),
        (["--mixup=0.8"], "mixup: was 0.0, is 0.8"),
        (["--batch_size=4"], "global_batch: was 8, is 4"),
        (["--batch_size=4", "--accum_iter=2"], "micro_steps: was 1, is 2"),
        (["--tune=linear"], "tune: was full, is linear"),
        (["--train_images=40"], "train_images"),
        (["--dataset=digits"], "classes"),
        (["--resume=none"], "--resume none"),
    ):
        code, _, err = run_main("main_finetune", [*argv, *other])
        assert code == 2 and named in err, err
        assert len(err.strip().splitlines()) == 1
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_measuring_on_some_images(run_main, tmp_path: Path) -> None:
    """Evenly spaced ones: those of `evenly`, whose labels are what is counted."""
    argv = [
        *SMALL,
        "--model=vit_micro_patch4",
        "--epochs=1",
        "--val_images=5",
        f"--output_dir={tmp_path}",
    ]
    assert run_main("main_finetune", argv)[0] == 0
    result = json.loads((tmp_path / "result.json").read_text())
    source = build_dataset("synthetic", "val")
    assert result["images"] == 5 < len(source)
    rows = (tmp_path / "per_class.csv").read_text().splitlines()[1:]
    shown = Counter(source[i][1] for i in evenly(len(source), 5))
    counted = [int(row.split(",")[1]) for row in rows]
    assert counted == [shown[i] for i in range(len(rows))]


@pytest.mark.parametrize("flags", [[], ["--cls_token"], ["--global_pool"], ["--tune=linear"]])
def test_saved_settings_are_a_recipe(flags: list[str], tmp_path: Path) -> None:
    first = build_parser().parse(["--finetune=some.pth", *flags])
    resolve_tune(first)
    saved = tmp_path / "config.yaml"
    saved.write_text(yaml.safe_dump(collect_settings(first)))
    again = build_parser().parse([f"--config={saved}"])
    resolve_tune(again)
    assert vars(again) == vars(first) | {"config": str(saved)}


def test_list_models(run_main) -> None:
    code, out, _ = run_main("main_finetune", ["--list_models"])
    assert code == 0 and out.split() == list(CLASSIFIERS)
