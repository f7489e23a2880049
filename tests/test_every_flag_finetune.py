"""Every flag of main_finetune.py: another value changes what it should, and nothing else."""

from pathlib import Path

import every_flag_training as alike
import pytest
from every_flag import Row, Table, Told, cases
from every_flag_files import write_encoders, write_images
from every_flag_training import Runner

import main_finetune

pytestmark = pytest.mark.smoke

# 12 images in batches of 4 are 3 steps an epoch, 6 in all.
BASE = [
    "--dataset=imagefolder", "--batch_size=4", "--epochs=2", "--warmup_epochs=1", "--lr=0.01",
    "--log_every=2", "--num_workers=0", "--device=cpu", "--eval_every=0", "--save_every=0",
    "--input_size=16", "--model=vit_nano_patch4", "--aa=none", "--reprob=0",
]  # fmt: skip
LENGTH = "images which rates log saves weights"
MEASURED = "--eval_every=2"
START = "--finetune={pretrained}"
ERASED = "--reprob=0.5"
MIXED = "--mixup=0.8 --cutmix=1"

TABLE: Table = {
    # ---- What is trained
    "--tune": [
        Row("--tune=partial:1", "learns optimizer weights"),
        Row("--tune=linear", "start learns optimizer rates weights"),
    ],
    "--model": Row("--model=vit_pico_patch4", "start learns optimizer weights"),
    "--list_models": Told("test_list_models"),
    "--finetune": Row("--finetune={pretrained}", "start weights"),
    "--pos_resize": Row("--pos_resize=extend", "start weights", f"{START} --input_size=24"),
    "--nb_classes": Row("--nb_classes=5", "start weights"),
    "--in_chans": Row("--in_chans=1", "images start statistics weights"),
    "--num_heads": Row(
        "--num_heads=4", "weights", "--finetune={official} --num_heads=2", without="--model"
    ),
    "--weights_key": Row("--weights_key=b", "start weights", "--finetune={nested} --weights_key=a"),
    "--patch_size": Row("--patch_size=8", "start weights"),
    "--lscale_init": Row("--lscale_init=0.5", "start learns weights"),
    "--global_pool": Row("--global_pool=cls", "start learns weights"),
    "--cls_token": Row("--cls_token", "start learns weights"),
    "--probe_block": Row("--probe_block=1", "start weights", f"{START} --tune=linear"),
    "--drop_path": Row("--drop_path=0.5", "weights"),
    # ---- Data
    "--dataset": Row(
        "--dataset=synthetic", "source images statistics weights", "--train_images=12"
    ),
    "--data_path": Row("--data_path={other}", "images weights", free=True),
    "--input_size": Row("--input_size=24", "images start weights"),
    "--mean": [
        Row("--mean 0.1 0.2 0.3", "statistics weights"),
        # What augmentation moves out of the image is filled with it.
        Row("--mean 0.1 0.2 0.3", "images statistics weights", "--aa=rand-m9-mstd0.5-inc1"),
    ],
    "--std": Row("--std 0.1 0.2 0.3", "statistics weights"),
    "--max_pixels": Row("--max_pixels=2200", "images files weights"),
    "--num_workers": Row("--num_workers=1", "loader"),
    "--prefetch_factor": Row("--prefetch_factor=5", "loader", "--num_workers=1"),
    "--no_pin_mem": Told("test_no_pin_mem"),
    "--train_images": Row("--train_images=8", f"source {LENGTH}"),
    "--val_images": Row("--val_images=3", "measured held", MEASURED),
    "--val_fraction": Row("--val_fraction=0.25", f"source held measured {LENGTH}", MEASURED),
    "--val_seed": Row(
        "--val_seed=1", "source held images measured weights", f"--val_fraction=0.25 {MEASURED}"
    ),
    # ---- Augmentation
    "--aa": Row("--aa=rand-m9-mstd0.5-inc1", "images weights"),
    "--color_jitter": Row("--color_jitter=0.4", "images weights"),
    "--crop_scale": Row("--crop_scale 1 1", "images weights"),
    "--no_flip": Row("--no_flip", "images weights"),
    "--smoothing": [
        Row("--smoothing=0.4", "weights"),
        Row("--smoothing=0.4", "weights", MIXED),
    ],
    "--reprob": Row("--reprob=0.9", "weights"),
    "--remode": [Row(f"--remode={m}", "weights", ERASED) for m in ("rand", "const")],
    "--recount": Row("--recount=3", "weights", ERASED),
    "--mixup": Row("--mixup=0.8", "weights"),
    "--cutmix": Row("--cutmix=1", "weights"),
    "--cutmix_minmax": Row("--cutmix_minmax 0.2 0.8", "weights"),
    "--mixup_prob": Row("--mixup_prob=0.1", "weights", MIXED),
    "--mixup_switch_prob": Row("--mixup_switch_prob=0", "weights", MIXED),
    "--mixup_mode": [Row(f"--mixup_mode={m}", "weights", MIXED) for m in ("pair", "elem")],
    "--ema_decay": [
        Row("--ema_decay=0.9", "averages"),
        Row("--ema_decay=0.5", "averages", "--ema_decay=0.9"),
    ],
    # ---- Optimisation
    "--batch_size": Row("--batch_size=6", LENGTH),
    "--accum_iter": Row("--accum_iter=3", "rates log saves weights"),
    "--epochs": Row("--epochs=1", LENGTH),
    "--warmup_epochs": Row("--warmup_epochs=0.5", "rates weights"),
    "--blr": Row("--blr=0.05", "rates weights", without="--lr"),
    "--lr": Row("--lr=0.02", "rates weights"),
    "--min_lr": Row("--min_lr=0.001", "rates weights"),
    **alike.SCHEDULE,
    "--weight_decay": Row("--weight_decay=0.5", "optimizer weights"),
    "--clip_grad": Row("--clip_grad=0.01", "weights"),
    "--precision": [Row(f"--precision={p}", "precision weights") for p in ("bf16", "fp16")],
    "--grad_checkpointing": Row("--grad_checkpointing", "recomputes"),
    "--nan_policy": Told("test_nan_policy"),
    "--tf32": Row("--tf32", "tf32"),
    "--compile": Row("--compile", "compiled"),
    "--no-compile": Row("--no-compile", "compiled", "--compile"),
    "--layer_decay": Row("--layer_decay=0.5", "optimizer weights"),
    "--betas": [
        Row("--betas 0.5 0.999", "optimizer weights"),
        Row("--betas 0.9 0.5", "optimizer weights"),
    ],
    "--shard": Row("--shard", "shard"),
    # ---- The run
    "--output_dir": Row("--output_dir={root}/there", "files"),
    "--log_dir": Row("--log_dir={root}/events", "files"),
    "--device": Told("test_device"),
    "--seed": [
        Row("--seed=1", "start draws images which weights"),
        # What is drawn for a step alone: nothing of a sample or of the start reaches it.
        Row("--seed=1", "start draws images which weights", f"{MIXED} {ERASED} --drop_path=0.5"),
    ],
    "--log_every": Row("--log_every=1", "log"),
    "--save_every": Row("--save_every=1", "files saves"),
    "--save_minutes": Row("--save_minutes=1e-9", "saves"),
    "--keep": Row("--keep=1", "files", "--save_every=1"),
    "--max_bad_images": Told("test_bad_images"),
    "--resume": Told("test_resume"),
    "--allow_changes": Told("test_allow_changes"),
    "--eval_every": Row("--eval_every=1", "files held measured saves"),
    "--eval": Told("test_eval"),
    "--dist_eval": Row("--dist_eval"),
    "--dry_run": Told("test_dry_run"),
    "--dry_run_measure": Told("test_dry_run_measure"),
    **alike.DRY_RUN,
}

# What a plan tells, of a run that is large enough.
SIZES = (
    "--model=vit_wide_patch4 --input_size=32 --batch_size=64 --dry_run_images=100000 "
    "--images_per_second=100 --epochs=20 --save_every=5"
)
PLANNED = """
    --accum_iter: batch in lr steps
    --batch_size: activations batch images lr memory steps time
    --blr: lr
    --cls_token: activations encoder head memory
    --dataset: data warning
    --decay_epochs: lr
    --decay_rate: lr
    --dry_run_images: data in lr steps time
    --dry_run_processes: batch lr steps
    --ema_decay: averaged disk memory
    --epochs: disk in steps time warning
    --global_pool: activations encoder head memory
    --grad_checkpointing: FLOPs activations in memory
    --images_per_second: time
    --in_chans: FLOPs activations encoder finetune images in memory parameters
    --input_size: FLOPs activations encoder finetune in memory parameters
    --keep: disk
    --layer_decay: warning
    --lr: lr
    --lr_batch: lr
    --lscale_init: activations encoder finetune memory parameters
    --min_lr: lr
    --model: AdamW FLOPs activations disk encoder finetune gradients head in memory parameters
      + weights
    --nb_classes: finetune head parameters
    --patch_size: FLOPs activations encoder finetune in memory parameters
    --precision: activations half-precision memory
    --save_every: disk
    --schedule: lr
    --shard: warning
    --train_images: data in lr steps time warning
    --tune: AdamW FLOPs LARS activations disk encoder finetune gradients head in lr memory
      + parameters warning
    --val_fraction: data in lr note steps time
    --warmup_epochs: lr
"""


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    root = tmp_path_factory.mktemp("finetune")
    places = {}
    for seed, name in enumerate(("data", "other")):
        write_images(root / name, seed)
        places[name] = str(root / name)
    places |= write_encoders(root)
    base = [*BASE, f"--data_path={places['data']}"]
    metrics = "metrics-finetune.jsonl"
    return Runner("main_finetune", base, places, root, metrics=metrics)


class TestTraining(alike.TrainingFlags):
    main, model = main_finetune, "vit_base_patch16"
    table, planned, sizes = TABLE, PLANNED, SIZES
    measured = MEASURED


@cases(TABLE)
def test_another_value(row: Row, runner: Runner) -> None:
    runner.check(row)


def test_eval(runner: Runner, tmp_path: Path) -> None:
    """It measures what is there, and trains nothing."""
    runner(MEASURED, folder=tmp_path)
    measured = runner("--eval", folder=tmp_path)
    assert measured["ends"] == 0 and "start" not in measured
    assert {"run/result-eval.json"} <= set(measured["files"]), measured["files"]
