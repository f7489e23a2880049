"""--dry_run: the plan is what the run then does, costs nothing, and warns of what looks wrong."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import main_finetune
import main_knn
import main_pretrain
import main_segment
from models_zoo import create_model, create_segmenter
from util.dry_run.report import describe, list_warnings

TINY = [
    "--dataset=digits", "--input_size=16", "--batch_size=12", "--warmup_epochs=1.5", "--epochs=4",
    "--num_workers=0", "--device=cpu", "--log_every=1", "--save_every=0",
]  # fmt: skip
PRETRAIN = [*TINY, "--model=mae_vit_micro_patch4", "--picture_every=0"]
FINETUNE = [*TINY, "--model=vit_micro_patch4", "--eval_every=0"]


def pretrain_plan(flags: list[str], processes: int = 1) -> Any:
    args = main_pretrain.build_parser().parse(flags)
    return main_pretrain.plan_run(args, processes)


def finetune_plan(flags: list[str], processes: int = 1) -> Any:
    args = main_finetune.build_parser().parse(flags)
    main_finetune.resolve_tune(args)
    return main_finetune.plan_run(args, processes)


def segment_plan(flags: list[str], processes: int = 1) -> Any:
    return main_segment.plan_run(main_segment.build_parser().parse(flags), processes)


def check_against_log(plan: Any, path: Path) -> None:
    """Number of steps, and the learning rate of each, warm-up included."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    logged = [r for r in lines if r["kind"] == "train"]
    assert [r["step"] for r in logged] == list(range(1, plan.steps + 1))
    for record in logged:
        if record["step"] - 1 < plan.warmup_steps:  # straight from 0 to the peak
            expected = plan.lr * (record["step"] - 1) / plan.warmup_steps
            assert record["lr"] == pytest.approx(expected, rel=1e-12)
        else:
            assert plan.min_lr < record["lr"] <= plan.lr
    falling = [r["lr"] for r in logged if r["step"] - 1 >= plan.warmup_steps]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "flags",
    [["--lr=0.01"], ["--accum_iter=2", "--decoder=cross", "--predict_ratio=0.34"]],
)
def test_plan_of_pretraining_is_the_log(flags: list[str], tmp_path: Path, few) -> None:
    flags = [*PRETRAIN, *flags, f"--output_dir={tmp_path}"]
    main_pretrain.main(flags)
    check_against_log(pretrain_plan(flags), tmp_path / "metrics.jsonl")


@pytest.mark.smoke
@pytest.mark.parametrize("flags", [["--tune=partial:1"], ["--train_images=31"]])
def test_plan_of_fine_tuning_is_the_log(flags: list[str], tmp_path: Path, few) -> None:
    flags = [*FINETUNE, "--batch_size=6", *flags, f"--output_dir={tmp_path}"]
    main_finetune.main(flags)
    plan = finetune_plan(flags)
    check_against_log(plan, tmp_path / "metrics-finetune.jsonl")


SEGMENT = [
    "--dataset=garments", "--train_images=5", "--model=vit_micro_patch8", "--input_size=32",
    "--resize", "48", "32", "--window=32", "--stride=24", "--channels=8", "--aux_channels=8",
    "--batch_size=2", "--iterations=4", "--warmup_iterations=2", "--eval_every=0",
    "--save_every=3", "--log_every=1", "--num_workers=0", "--device=cpu", "--lr=1e-3",
]  # fmt: skip


@pytest.mark.smoke
def test_plan_of_segmentation_is_the_log(tmp_path: Path, run_main) -> None:
    """Five images are two steps; four iterations are two epochs, and one file after the third."""
    flags = [*SEGMENT, "--relative_bias", "--lscale_init=1", f"--output_dir={tmp_path}"]
    code, out, err = run_main("main_segment", flags)
    assert code == 0, err
    plan = segment_plan(flags)
    assert (plan.data.images, plan.steps_per_epoch, plan.steps, plan.warmup_steps) == (5, 2, 4, 2)
    lines = [json.loads(line) for line in (tmp_path / "metrics-segment.jsonl").open()]
    rates = [r["lr"] for r in lines if r["kind"] == "train"]
    # A straight line from a millionth to the peak, and one to 0 at the end.
    assert rates == pytest.approx([plan.lr * x for x in (1e-6, 0.5 * (1 + 1e-6), 1, 0.5)])
    assert f"UPerNet, {plan.weights:,} parameters" in out
    sizes = {path.stat().st_ino: path.stat().st_size for path in tmp_path.glob("*.pth")}
    assert len(sizes) == 2 and plan.disk == 3 * plan.checkpoint
    for size in sizes.values():  # names, buffers, settings and checksums come on top
        assert plan.checkpoint <= size <= plan.checkpoint + 250_000


def test_plan_of_ade20k_on_8_gpus(run_main) -> None:
    recipe = Path(__file__).parent.parent / "recipes" / "ade20k.yaml"
    flags = [f"--config={recipe}", "--model=vit_base_patch16", "--finetune=nowhere.pth"]
    plan = segment_plan(flags, 8)
    assert (plan.global_batch, plan.steps, plan.warmup_steps) == (16, 160_000, 1500)
    assert plan.lr == 1e-4 and plan.images == 2_560_000 and plan.data.images == 20_210
    with torch.device("meta"):
        model = create_segmenter(
            "vit_base_patch16", 150, img_size=512, relative_bias=True, lscale_init=1.0
        )
    assert plan.weights == plan.learning == sum(p.numel() for p in model.parameters())
    heads = sum(p.numel() for p in model.auxiliary_head.parameters())
    assert plan.parameters["auxiliary head"] == (heads, heads)
    assert sum(total for _, total in plan.parameters.values()) == plan.weights
    text = describe(plan)
    for part in ("16 = 2 x 8 processes", "160,000, 126.7 epochs of 1,263", "warm-up 1,500 steps",
                 "linear to 0", "shared by all images"):  # fmt: skip
        assert part in text
    assert not [w for w in list_warnings(plan) if not w.startswith("checkpoints need")]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--iterations=1500"], "warm-up of 1,500 iterations is as long as training"),
        (["--lr=1e-2"], "100 x the published recipe's 0.0016 (that of ViT-B on ADE20K)"),
        (["--dry_run_images=10"], "is larger than the data, 10 images"),
        (["--batch_size=2"], "far below the published recipe's 16"),
    ],
)
def test_what_looks_wrong_in_segmentation_is_said(flags: list[str], expected: str) -> None:
    count = 1 if "recipe's 16" in expected else 8
    warnings = list_warnings(segment_plan(["--model=vit_base_patch16", *flags], count))
    assert any(expected in text for text in warnings), warnings


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--finetune=nowhere.pth"], "--model NAME"),
        (["--model=vit_base_patch16", "--batch_size=1"], "two images at once"),
        (["--model=vit_base_patch16", "--eval"], "--dry_run plans a training"),
        ([], "give --finetune CHECKPOINT, or --model"),
    ],
)
def test_segmentation_that_cannot_be_planned(flags: list[str], expected: str, run_main) -> None:
    code, _, err = run_main("main_segment", ["--dry_run", *flags])
    assert code == 2 and expected in err


def test_learned_parameters_are_those_the_run_names(tmp_path: Path, few, run_main) -> None:
    main_pretrain.main([*PRETRAIN, "--epochs=1", "--warmup_epochs=0", f"--output_dir={tmp_path}"])
    start = [f"--finetune={tmp_path}/checkpoint-last.pth", "--epochs=1", "--warmup_epochs=0"]
    for tune in ("full", "linear", "partial:0.5"):
        flags = [*FINETUNE, *start, f"--tune={tune}", "--blr=1e-4"]
        code, out, err = run_main("main_finetune", [*flags, f"--output_dir={tmp_path / tune}"])
        assert code == 0, err
        said = re.search(r"([\d,]+) of ([\d,]+) parameters learn", out)
        plan = finetune_plan(flags)
        assert said is not None
        assert said.groups() == (f"{plan.learning:,}", f"{plan.weights:,}")


# ---- What a plan says of the published recipes -------------------------------------------------

BASE = ["--method=mae", "--norm_pix_loss", "--batch_size=64", "--accum_iter=8"]


def test_plan_of_vit_base_on_8_gpus() -> None:
    plan = pretrain_plan([*BASE, "--images_per_second=1000", "--epochs=800"], 8)
    assert (plan.global_batch, plan.steps_per_epoch) == (4096, 312)
    assert (plan.steps, plan.warmup_steps) == (249_600, 12_480)
    assert plan.lr == pytest.approx(2.4e-3)
    assert plan.weights == 111_907_840  # the official model's
    with torch.device("meta"):
        model = create_model("mae_vit_base_patch16")
    assert plan.learning == sum(p.numel() for p in model.parameters() if p.requires_grad)
    encoder = sum(p.numel() for name, p in model.named_parameters() if name.startswith("blocks."))
    assert plan.parameters["encoder blocks"] == (encoder, encoder)
    assert plan.hours == pytest.approx(249_600 * 4096 / 1000 / 3600)
    text = describe(plan)
    for part in (
        "57.50 G an image",
        "1,281,167 images",
        "4,096 = 64 x 8 processes x 8",
        "283.99 h",
    ):
        assert part in text
    # The disk is this machine's business; nothing else looks wrong.
    assert not [w for w in list_warnings(plan) if not w.startswith("checkpoints need")]


def test_a_huge_model_takes_no_memory() -> None:
    with torch.device("meta"):
        model = create_model("mae_vit_huge_patch14")
    plan = pretrain_plan(["--model=mae_vit_huge_patch14", "--method=mae"])
    assert plan.weights == 657_074_508 == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--blr=1.5e-3"], "10 x the published recipe's 0.00015"),
        (["--blr=1.4e-3"], None),
        (["--lr=1e-6"], "of the published recipe's"),
        (["--lr=0"], "the peak lr is 0: nothing learns"),
        (["--epochs=40"], "warm-up of 40 epochs is as long as training"),
        (["--epochs=30"], "or longer"),
        (["--dry_run_images=4000"], "global batch 4,096 is larger than the data, 4,000 images"),
        (["--dry_run_images=8000"], "3,904 of 8,000 images (49%) fill no step"),
        (["--min_lr=1"], "--min_lr 1 is above the peak"),
        (["--accum_iter=1"], "far below the published recipe's 4,096"),
        (["--output_dir=/proc/nowhere"], "checkpoints need"),
    ],
)
def test_what_looks_wrong_is_said(flags: list[str], expected: str | None) -> None:
    warnings = list_warnings(pretrain_plan([*BASE, *flags], 8))
    if expected is None:
        assert not [w for w in warnings if "recipe" in w]
    else:
        assert any(expected in w for w in warnings), warnings


def test_linear_and_scratch_are_held_to_their_own_recipes() -> None:
    assert finetune_plan(["--model=vit_base_patch16", "--tune=linear"]).published.blr == 0.1
    scratch = finetune_plan(["--model=vit_base_patch16", "--layer_decay=1"])
    assert scratch.published.blr == 1e-4 and not scratch.warnings
    tuned = finetune_plan(["--model=vit_base_patch16", "--finetune=nowhere.pth"])
    assert tuned.published.blr == 1e-3 and tuned.optimizer == "adamw" and not tuned.warnings
    # Fine-tuning's settings on random weights: said once, and not held to another recipe.
    mixed = finetune_plan(["--model=vit_base_patch16"], 16)
    assert mixed.published.blr == 1e-3
    assert [w for w in list_warnings(mixed) if "checkpoints need" not in w] == list(mixed.warnings)
    assert "there is no --finetune" in mixed.warnings[0]


# ---- Nothing is written, nothing has to be there -----------------------------------------------

ABSENT = {
    "main_pretrain": ["--data_path=nowhere"],
    "main_finetune": ["--finetune=nowhere.pth", "--model=vit_base_patch16", "--data_path=nowhere"],
    "main_segment": ["--finetune=nowhere.pth", "--model=vit_base_patch16", "--data_path=nowhere"],
    "main_knn": ["--checkpoint=nowhere.pth", "--model=vit_base_patch16", "--data_path=nowhere"],
}


@pytest.mark.smoke
@pytest.mark.parametrize("module", ABSENT)
@pytest.mark.parametrize("processes", [1, 8])
def test_neither_data_nor_checkpoint_nor_traces(
    module: str, processes: int, tmp_path: Path, run_main, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [*ABSENT[module], "--dry_run", f"--dry_run_processes={processes}"]
    code, out, err = run_main(module, flags)
    assert code == 0, err
    known = "20,210 images of ade20k" if module == "main_segment" else "ImageNet-1K's"
    assert known in out and (module == "main_segment" or "1,281,167" in out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", [name for name in ABSENT if name != "main_knn"])
def test_memory_is_said_to_be_of_this_precision(module: str, run_main) -> None:
    for flags, expected in (
        (["--precision=fp32"], "fp32"),
        (["--precision=bf16"], "bf16"),
        (["--precision=fp16", "--grad_checkpointing"], "fp16, blocks computed again"),
    ):
        code, out, err = run_main(module, [*ABSENT[module], "--dry_run", *flags])
        assert code == 0 and f" GB a device, {expected}\n" in out, out + err


def test_a_folder_that_is_not_there_is_named() -> None:
    assert pretrain_plan(["--data_path=nowhere"]).data.note == "ImageNet-1K's: nowhere is not there"
    assert "no --data_path" in pretrain_plan([]).data.note


def test_data_that_is_there_is_counted(tmp_path: Path, run_main) -> None:
    from PIL import Image

    for name in ("a", "b", "c"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name / "x.png")
    plan = pretrain_plan([f"--data_path={tmp_path}"])
    assert (plan.data.images, plan.data.note) == (3, "counted")
    (tmp_path / "other/train").mkdir(parents=True)
    code, _, err = run_main("main_pretrain", ["--dry_run", f"--data_path={tmp_path / 'other'}"])
    assert code == 2 and "train" in err  # a folder without images is a fault, not ImageNet


def test_a_checkpoint_that_is_not_there_needs_a_name(run_main) -> None:
    for module, flag in (("main_finetune", "--finetune"), ("main_knn", "--checkpoint")):
        code, _, err = run_main(module, ["--dry_run", f"{flag}=nowhere.pth"])
        assert code == 2 and "--model NAME" in err


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("module", "flags"),
    [("main_pretrain", PRETRAIN), ("main_finetune", FINETUNE), ("main_segment", SEGMENT)],
)
def test_rate_is_measured(module: str, flags: list[str], tmp_path: Path, run_main) -> None:
    words = [*flags, "--dry_run", "--dry_run_measure=1", "--batch_size=4", "--dry_run_processes=3"]
    code, out, err = run_main(module, [*words, f"--output_dir={tmp_path / 'run'}"])
    assert code == 0, err
    found = re.search(r"h at ([\d,.]+) images/s \(([\d,.]+) images/s of one process.*, x 3\)", out)
    assert found is not None
    all_, one = (float(text.replace(",", "")) for text in found.groups())
    assert all_ == pytest.approx(3 * one, rel=0.01)
    assert not (tmp_path / "run").exists()


def test_knn_counts_its_features() -> None:
    args = main_knn.build_parser().parse(
        ["--checkpoint=x", "--model=vit_base_patch16", "--features=both", "--train_images=1000"]
    )
    text = main_knn.plan_run(args, 2)
    assert f"{4 * 2 * 768 * 1000 / 2 / 1e9:.3f} GB of features" in text
    assert "85,798,656, none learns" in text


@pytest.mark.parametrize(
    ("task", "recipe", "more", "batch"),
    [
        ("pretrain", "mae/pretrain_vit_base_800.yaml", ["--accum_iter=2"],
         "4,096 = 64 x 32 processes x 2 micro-steps"),
        ("segment", "ade20k.yaml", ["--model=vit_base_patch16"],
         "64 = 2 x 32 processes x 1 micro-step"),
    ],
)  # fmt: skip
def test_submitted_dry_run_says_the_run_and_the_job(
    task: str,
    recipe: str,
    more: list[str],
    batch: str,
    tmp_path: Path,
    run_main,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm
    path = Path(__file__).parent.parent / "recipes" / recipe
    flags = [f"--config={path}", "--nodes=4", *more, "--job_dir=JOB", "--dry_run"]
    code, out, err = run_main(f"submitit_{task}", flags)
    assert code == 0, err
    run, _, job = out.partition("dry run: nothing is submitted")
    assert batch in run
    assert "#SBATCH --nodes=4" in job
    assert list(tmp_path.iterdir()) == []
