"""Every flag of main_segment.py: another value changes what it should, and nothing else."""

from pathlib import Path
from typing import Any

import every_flag_training as alike
import pytest
from every_flag import Row, Table, Told, cases
from every_flag_files import write_encoders, write_pairs
from every_flag_training import Runner
from test_segment_data import write_ade20k

import build_segment
import main_segment

pytestmark = pytest.mark.smoke

# 12 pairs in batches of 2 are 6 steps an epoch.
BASE = [
    "--dataset=folder", "--model=vit_deep_patch4", "--input_size=16", "--resize", "48", "24",
    "--window=16", "--stride=12", "--channels=8", "--aux_channels=8", "--batch_size=2",
    "--iterations=4", "--warmup_iterations=2", "--lr=0.01", "--log_every=2", "--num_workers=0",
    "--device=cpu", "--eval_every=0", "--save_every=0", "--pictures=0",
]  # fmt: skip
MEASURED = "--eval_every=4"
START = "--finetune={pretrained}"

TABLE: Table = {
    # ---- Data
    "--dataset": Row("--dataset=ade20k", "source images which start weights", "--data_path={both}"),
    "--data_path": Row("--data_path={other}", "images weights", free=True),
    "--input_size": Row("--input_size=24", "images start weights"),
    "--mean": Row("--mean 0.1 0.2 0.3", "statistics weights"),
    "--std": Row("--std 0.1 0.2 0.3", "statistics weights"),
    "--max_pixels": Row(
        "--max_pixels=2200", "images files weights", "--iterations=6 --nb_classes=4"
    ),
    "--num_workers": Row("--num_workers=1", "loader"),
    "--prefetch_factor": Row("--prefetch_factor=5", "loader", "--num_workers=1"),
    "--no_pin_mem": Told("test_no_pin_mem"),
    "--val_fraction": Row(
        "--val_fraction=0.25", "source held images which measured weights", MEASURED
    ),
    "--val_seed": Row(
        "--val_seed=1", "source held images measured weights", f"--val_fraction=0.25 {MEASURED}"
    ),
    "--nb_classes": Row("--nb_classes=6", "start weights"),
    "--label_map": Row("--label_map 0:1 1:0 2:2 3:3 255:ignore", "images weights"),
    "--scene_size": Told("test_scene_size"),
    "--train_images": Row("--train_images=7", "source images which weights"),
    "--val_images": Row("--val_images=3", "measured held", MEASURED),
    "--check_data": Row("--check_data", says="checked 12 pairs of folder train"),
    # ---- The model
    "--model": Row("--model=vit_deeper_patch4", "start learns optimizer weights"),
    "--list_models": Told("test_list_models"),
    "--finetune": Row("--finetune={pretrained}", "start weights"),
    "--pos_resize": Row("--pos_resize=extend", "start weights", f"{START} --input_size=24"),
    "--num_heads": Row(
        "--num_heads=4", "weights", "--finetune={official} --num_heads=2", without="--model"
    ),
    "--weights_key": Row("--weights_key=b", "start weights", "--finetune={nested} --weights_key=a"),
    "--patch_size": Row("--patch_size=8", "start learns weights"),
    "--lscale_init": Row("--lscale_init=0.5", "start learns weights"),
    "--relative_bias": Row("--relative_bias", "start learns weights"),
    "--channels": Row("--channels=4", "start weights"),
    "--aux_channels": Row("--aux_channels=4", "start weights"),
    "--dropout": Row("--dropout=0.5", "weights"),
    "--drop_path": Row("--drop_path=0.5", "weights"),
    # ---- Augmentation
    "--resize": Row("--resize 32 16", "images measured weights", MEASURED),
    "--ratio_range": Row("--ratio_range 1 1", "images weights"),
    "--cat_max_ratio": Row("--cat_max_ratio=0.3", "images weights"),
    "--no_flip": Row("--no_flip", "images weights"),
    "--no_distortion": Row("--no_distortion", "images weights"),
    # ---- Optimisation
    "--batch_size": Row("--batch_size=3", "images which weights"),
    "--accum_iter": Row("--accum_iter=2", "images which weights"),
    "--iterations": Row("--iterations=2", "images which rates log saves weights"),
    "--warmup_iterations": Row("--warmup_iterations=1", "rates weights"),
    "--blr": Row("--blr=0.05", "rates weights", without="--lr"),
    "--lr": Row("--lr=0.02", "rates weights"),
    "--min_lr": Row("--min_lr=0.001", "rates weights"),
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
    "--aux_weight": Row("--aux_weight=0.1", "weights"),
    "--loss_mean": Row("--loss_mean=valid", "weights"),
    "--shard": Row("--shard", "shard"),
    # ---- The run
    "--output_dir": Row("--output_dir={root}/there", "files"),
    "--log_dir": Row("--log_dir={root}/events", "files"),
    "--device": Told("test_device"),
    "--seed": Row("--seed=1", "start draws images which weights"),
    "--log_every": Row("--log_every=1", "log"),
    "--save_every": Row("--save_every=2", "files saves"),
    "--save_minutes": Row("--save_minutes=1e-9", "saves"),
    "--keep": Row("--keep=1", "files", "--save_every=2"),
    "--max_bad_images": Told("test_bad_images"),
    "--resume": Told("test_resume"),
    "--allow_changes": Told("test_allow_changes"),
    "--eval_every": Row("--eval_every=2", "files held measured saves"),
    "--pictures": [
        Row("--pictures=2", "files held", MEASURED),
        Row("--pictures=3", "held", f"{MEASURED} --pictures=2"),
    ],
    # ---- Use of a segmenter
    "--eval": Told("test_eval"),
    "--predict": Told("test_predict"),
    "--inference": Row("--inference=whole", "measured", MEASURED),
    "--window": Row("--window=12", "measured", MEASURED),
    "--stride": Row("--stride=4", "measured", MEASURED),
    "--multi_scale": Row("--multi_scale", "measured", MEASURED),
    "--flip": Row("--flip", "measured", MEASURED),
    "--dry_run": Told("test_dry_run"),
    "--dry_run_measure": Told("test_dry_run_measure"),
    **alike.DRY_RUN,
}

# What a plan tells, of a run that is large enough.
SIZES = (
    "--model=vit_wide_patch4 --input_size=32 --batch_size=64 --dry_run_images=100000 "
    "--images_per_second=100 --iterations=20 --save_every=10"
)
PLANNED = """
    --accum_iter: batch in lr steps time warning
    --aux_channels: auxiliary parameters
    --batch_size: activations batch images in lr memory steps warning
    --blr: lr warning
    --channels: UPer activations disk parameters
    --dataset: UPer activations auxiliary data memory parameters segment
    --dry_run_images: data steps warning
    --dry_run_processes: batch in lr steps time warning
    --grad_checkpointing: FLOPs activations in memory
    --images_per_second: time
    --input_size: FLOPs activations encoder in memory parameters segment
    --iterations: disk in steps warning
    --keep: disk
    --layer_decay: warning
    --lr: lr warning
    --lscale_init: activations encoder memory parameters
    --min_lr: lr
    --model: AdamW FLOPs UPer activations auxiliary disk encoder gradients in memory
      + parameters segment weights
    --nb_classes: UPer activations auxiliary parameters segment
    --patch_size: AdamW FLOPs activations disk encoder gradients in memory neck parameters
      + segment weights
    --precision: activations half-precision memory
    --relative_bias: parameters relative
    --save_every: disk
    --shard: warning
    --train_images: data in steps warning
    --val_fraction: data steps
    --warmup_iterations: lr
"""


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    root = tmp_path_factory.mktemp("segment")
    places = {}
    for seed, name in enumerate(("data", "other", "both")):
        write_pairs(root / name, seed)
        places[name] = str(root / name)
    write_ade20k(root / "both", count=6)
    places |= write_encoders(root, "deep")
    base = [*BASE, f"--data_path={places['data']}"]
    metrics = "metrics-segment.jsonl"
    return Runner("main_segment", base, places, root, metrics=metrics)


class TestTraining(alike.TrainingFlags):
    main, model = main_segment, "vit_base_patch16"
    table, planned, sizes = TABLE, PLANNED, SIZES
    measured = "--eval_every=4"
    longer = "--iterations=6"
    blows_up = "--lr=1e6 --warmup_iterations=0 --iterations=8"
    spared = "--iterations=6 --nb_classes=4"


@cases(TABLE)
def test_another_value(row: Row, runner: Runner) -> None:
    runner.check(row)


def test_scene_size(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scenes are drawn of a set that has to be fetched: what it is asked for."""
    asked = []

    def build(*rest: Any, size: int, **more: Any) -> Any:
        asked.append(size)
        raise alike.Enough

    monkeypatch.setattr(build_segment, "build_segmentation_set", build)
    for flags in ("", "--scene_size=64"):
        with pytest.raises(alike.Enough):
            runner("--dataset=garments", flags)
    assert asked == [96, 64]


def test_eval(runner: Runner, tmp_path: Path) -> None:
    """It measures what is there, and trains nothing."""
    runner(MEASURED, folder=tmp_path)
    measured = runner("--eval", folder=tmp_path)
    assert measured["ends"] == 0 and "start" not in measured
    assert {"run/result-eval.json"} <= set(measured["files"]), measured["files"]


def test_predict(runner: Runner, tmp_path: Path) -> None:
    """The images that it names, each as a map; nothing is trained."""
    runner(folder=tmp_path)
    found = runner("--predict {data}/val/images", folder=tmp_path)
    assert found["ends"] == 0 and "start" not in found
    assert sum(name.endswith(".png") and "maps" in name for name in found["files"]) == 6
