"""Every flag of main_pretrain.py: another value changes what it should, and nothing else."""

import every_flag_training as alike
import pytest
from every_flag import Row, Table, Told, cases
from every_flag_files import write_images
from every_flag_training import Runner

import main_pretrain

pytestmark = pytest.mark.smoke

# 12 images in batches of 4 are 3 steps an epoch, 6 in all.
BASE = [
    "--dataset=imagefolder", "--model=mae_vit_nano_patch4", "--input_size=16",
    "--batch_size=4", "--epochs=2", "--warmup_epochs=1", "--blr=0.05", "--log_every=2",
    "--num_workers=0", "--device=cpu", "--picture_every=0", "--save_every=0",
]  # fmt: skip
PCA = "--target=pca --pca_components=8 --pca_patches=64"
HELD_OUT = "--eval_every=2 --eval_images=3"
LENGTH = "images which masks rates log saves weights"

TABLE: Table = {
    # ---- The method
    "--method": Row("--method=mae", "start learns masks weights"),
    "--mask": [Row(f"--mask={m}", "masks weights") for m in ("random", "block", "average")],
    "--avg_share": Row("--avg_share=0.9", "masks weights"),
    "--avg_order": Row("--avg_order=low", "masks weights"),
    "--avg_temperature": Row("--avg_temperature=0", "masks weights"),
    "--lscale_init": Row("--lscale_init=0.5", "start weights"),
    "--branch_init": Row("--branch_init=0.5", "start weights"),
    "--pos_offset": [
        Row("--pos_offset=none", "start learns weights"),
        Row("--pos_offset=jitter", "weights", "--pos_offset=center"),
    ],
    # ---- Data
    "--dataset": Row(
        "--dataset=synthetic", "source images statistics masks weights", "--train_images=12"
    ),
    "--data_path": Row("--data_path={other}", "images masks weights", free=True),
    "--input_size": Row("--input_size=24", "images start masks weights"),
    "--mean": Row("--mean 0.1 0.2 0.3", "statistics weights"),
    "--std": Row("--std 0.1 0.2 0.3", "statistics weights"),
    "--max_pixels": Row("--max_pixels=2200", "images files weights"),
    "--num_workers": Row("--num_workers=1", "loader"),
    "--prefetch_factor": Row("--prefetch_factor=5", "loader", "--num_workers=1"),
    "--no_pin_mem": Told("test_no_pin_mem"),
    "--train_images": Row("--train_images=8", f"source {LENGTH}"),
    "--crop_scale": Row("--crop_scale 1 1", "images masks weights"),
    "--interpolation": Row("--interpolation=bilinear", "images masks weights"),
    "--no_flip": Row("--no_flip", "images masks weights"),
    "--decode": Row("--decode=pil", "images weights"),
    "--crops_per_decode": Row("--crops_per_decode=2", "images which masks weights"),
    "--augment": [
        Row(f"--augment={a}", "images masks weights") for a in ("none", "fixed_crop", "crop_jitter")
    ],
    "--val_fraction": Row("--val_fraction=0.25", f"source held measured {LENGTH}", HELD_OUT),
    "--val_seed": Row(
        "--val_seed=1",
        "source held images masks measured weights",
        f"--val_fraction=0.25 {HELD_OUT}",
    ),
    # ---- The model
    "--model": Row("--model=mae_vit_pico_patch4", "start learns weights"),
    "--list_models": Told("test_list_models"),
    "--patch_size": Row("--patch_size=8", "start masks weights"),
    "--in_chans": Row("--in_chans=1", "images start statistics masks weights"),
    "--decoder": [
        Row("--decoder=cross", "start learns weights"),
        Row("--decoder=partial", "start learns weights", "--predict_ratio=0.5 --decoder=cross"),
    ],
    "--predict_ratio": [
        Row("--predict_ratio=0.5", "rates weights", f"--decoder={decoder}")
        for decoder in ("partial", "cross")
    ],
    "--decoder_depth": Row("--decoder_depth=2", "start learns weights"),
    "--decoder_embed_dim": Row("--decoder_embed_dim=16", "start weights"),
    "--decoder_num_heads": Row("--decoder_num_heads=4", "weights"),
    "--mask_ratio": Row("--mask_ratio=0.5", "masks weights"),
    "--mask_cell": Row("--mask_cell=2", "masks weights"),
    "--encoder_mask_tokens": Row("--encoder_mask_tokens", "start learns weights"),
    "--cls_tokens": Row("--cls_tokens=3", "start weights"),
    "--positions": Row("--positions=learned", "start learns weights", "--pos_offset=none"),
    "--drop_path": Row("--drop_path=0.5", "weights"),
    "--target": [
        Row("--target=norm_pixels", "weights"),
        Row(PCA, "start weights"),
    ],
    "--norm_pix_loss": Row("--norm_pix_loss", "weights"),
    "--pca_components": Row("--pca_components=4", "start weights", PCA),
    "--pca_patches": Row("--pca_patches=32", "start weights", PCA),
    # ---- Optimisation
    "--batch_size": Row("--batch_size=6", LENGTH),
    "--accum_iter": Row("--accum_iter=3", "rates log saves weights"),
    "--epochs": Row("--epochs=1", LENGTH),
    "--warmup_epochs": Row("--warmup_epochs=0.5", "rates weights"),
    "--blr": Row("--blr=0.01", "rates weights"),
    "--lr": Row("--lr=0.01", "rates weights"),
    "--min_lr": Row("--min_lr=0.0001", "rates weights"),
    **alike.SCHEDULE,
    "--weight_decay": Row("--weight_decay=0.5", "optimizer weights"),
    "--betas": [
        Row("--betas 0.5 0.95", "optimizer weights"),
        Row("--betas 0.9 0.5", "optimizer weights"),
    ],
    "--clip_grad": Row("--clip_grad=0.01", "weights"),
    "--precision": [Row(f"--precision={p}", "precision weights") for p in ("bf16", "fp16")],
    "--grad_checkpointing": Row("--grad_checkpointing", "recomputes"),
    "--nan_policy": Told("test_nan_policy"),
    "--tf32": Row("--tf32", "tf32"),
    "--compile": Row("--compile", "compiled"),
    "--no-compile": Row("--no-compile", "compiled", "--compile"),
    "--shard": Row("--shard", "shard"),
    # ---- The run
    "--output_dir": Row("--output_dir={root}/there", "files"),
    "--log_dir": Row("--log_dir={root}/events", "files"),
    "--device": Told("test_device"),
    "--seed": Row("--seed=1", "start images which masks weights"),
    "--log_every": Row("--log_every=1", "log"),
    "--save_every": Row("--save_every=1", "files saves"),
    "--save_minutes": Row("--save_minutes=1e-9", "saves"),
    "--keep": Row("--keep=1", "files", "--save_every=1"),
    "--max_bad_images": Told("test_bad_images"),
    "--resume": Told("test_resume"),
    "--allow_changes": Told("test_allow_changes"),
    "--picture_every": Row("--picture_every=1", "files saves held"),
    "--eval_every": Row("--eval_every=1", "measured saves held"),
    "--eval_images": Row("--eval_images=2", "measured held", HELD_OUT),
    "--dry_run": Told("test_dry_run"),
    "--dry_run_measure": Told("test_dry_run_measure"),
    **alike.DRY_RUN,
}

# What a plan tells, of a run that is large enough.
SIZES = (
    "--model=mae_vit_wide_patch4 --input_size=32 --batch_size=64 --dry_run_images=100000 "
    "--images_per_second=100 --epochs=20 --save_every=5"
)
PLANNED = """
    --accum_iter: batch lr steps
    --batch_size: activations batch images lr memory shared steps time
    --blr: lr
    --cls_tokens: FLOPs activations decoder encoder in memory parameters shared
    --dataset: data warning
    --decay_epochs: lr
    --decay_rate: lr
    --decoder: activations decoder memory parameters
    --decoder_depth: FLOPs activations decoder in memory parameters
    --decoder_embed_dim: FLOPs activations decoder in parameters
    --dry_run_images: data in lr steps time
    --dry_run_processes: batch lr steps
    --encoder_mask_tokens: FLOPs activations decoder encoder in memory parameters shared
    --epochs: disk in steps time warning
    --grad_checkpointing: FLOPs activations in memory shared
    --images_per_second: time
    --in_chans: FLOPs activations decoder encoder images parameters pretrain
    --input_size: FLOPs activations decoder encoder in memory parameters pretrain shared
    --keep: disk
    --lr: lr
    --lr_batch: lr
    --mask: pretrain
    --mask_cell: pretrain
    --mask_ratio: FLOPs activations in memory pretrain shared
    --method: activations decoder encoder parameters pretrain shared
    --min_lr: lr
    --model: AdamW FLOPs activations decoder disk encoder gradients in memory parameters
      + pretrain shared weights
    --patch_size: AdamW FLOPs activations decoder disk encoder in memory parameters pretrain
      + shared
    --pca_components: decoder parameters
    --pos_offset: decoder encoder parameters
    --positions: decoder encoder parameters
    --precision: activations half-precision memory shared
    --predict_ratio: FLOPs activations lr pretrain
    --save_every: disk
    --schedule: lr
    --shard: warning
    --target: activations decoder parameters
    --train_images: data in lr steps time warning
    --val_fraction: data in lr note steps time
    --warmup_epochs: lr
"""


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    root = tmp_path_factory.mktemp("pretrain")
    places = {}
    for seed, name in enumerate(("data", "other")):
        write_images(root / name, seed)
        places[name] = str(root / name)
    base = [*BASE, f"--data_path={places['data']}"]
    return Runner("main_pretrain", base, places, root)


class TestTraining(alike.TrainingFlags):
    main, model = main_pretrain, "mae_vit_base_patch16"
    table, planned, sizes = TABLE, PLANNED, SIZES
    measured, limit = "--eval_every=2", "--eval_images={}"


@cases(TABLE)
def test_another_value(row: Row, runner: Runner) -> None:
    runner.check(row)
