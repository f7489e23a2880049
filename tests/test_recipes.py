"""recipes/*.yaml: they say what FIELD says, one of each kind runs, and what is wrong is named.

All are resolved, which is cheap; two steps are taken by one recipe of each kind.
"""

import argparse
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launch import OF_DIGITS
from trained import Trained

import main_finetune
import main_pretrain
import main_segment
from util.config.flags import FlagParser, collect_settings
from util.config.recipes import read_layers, read_recipe, write_recipe
from util.config.segment_flags import SCALES
from util.data.datasets import build_dataset
from util.dry_run.report import list_warnings, machine_warnings
from util.errors import BadInput
from util.runs.cell_runs import READERS
from util.runs.paper_tables import differences
from util.runs.plan import read_plan
from util.train.advice import warn_of_flags
from util.train.schedule import PolySchedule

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
ROWS = sorted(
    path.relative_to(RECIPES).as_posix()
    for folder in ("mae", "mmae", "pixio", "simmim", "small")
    for path in (RECIPES / folder).rglob("*.yaml")
    if not path.name.startswith("ade20k")
)
SEGMENTERS = ("ade20k.yaml", "garments.yaml", "simmim/ade20k_swin_base.yaml")
PRETRAINED = ("mae_", "simmim_", "pixio_")  # what models begin with that are pretrained
MAINS: dict[str, Any] = {
    "pretrain": main_pretrain, "finetune": main_finetune, "segment": main_segment,
}  # fmt: skip


@cache
def task_of(name: str) -> str:
    if name in SEGMENTERS:
        return "segment"
    own = read_recipe(RECIPES / name)
    return "pretrain" if own.get("model", "").startswith(PRETRAINED) else "finetune"


@cache
def parser_for(task: str, *words: str) -> FlagParser:
    return MAINS[task].build_parser(list(words))


def parser_of(name: str) -> FlagParser:
    """The parser as the recipe's own method makes it."""
    others = name.startswith(("simmim/pretrain", "pixio/pretrain"))
    own = [f"--config={RECIPES / name}"] if others else []
    return parser_for(task_of(name), *own)


@cache  # nobody changes what it gives
def resolved(name: str, *more: str) -> argparse.Namespace:
    """All flags of a recipe as its main sees them."""
    found = parser_of(name).parse([f"--config={RECIPES / name}", *more])
    if task_of(name) == "finetune":
        main_finetune.resolve_tune(found)
    return found


def numbers(name: str) -> dict[str, Any]:
    """What a table of recipes states, on the 8 GPUs of the headers."""
    found = vars(resolved(name))
    batch = found["batch_size"] * 8 * found["accum_iter"]
    names = (
        "epochs", "warmup_epochs", "weight_decay", "min_lr", "model", "norm_pix_loss", "mask_ratio",
        "mask", "method", "layer_decay", "drop_path", "tune", "mixup", "cutmix", "smoothing",
        "reprob", "aa", "betas", "ema_decay", "global_pool", "clip_grad", "crop_scale", "dataset",
        "decoder_depth", "decoder_embed_dim", "no_flip", "lscale_init", "pos_offset", "target",
        "pca_components", "augment", "encoder_mask_tokens", "mask_cell", "interpolation",
        "schedule", "decay_epochs", "decay_rate", "lr_batch", "warmup_lr", "input_size",
        "probe_block",
    )  # fmt: skip
    values = {k: found[k] for k in names if k in found}
    per = found.get("lr_batch") or 256
    return values | {"batch": batch, "lr": round(found["blr"] * batch / per, 12)}


# ---- The numbers of the papers and their code, written down here once more ---------------------

PATCH = {"base": 16, "large": 16, "huge": 14}
PRETRAIN = {
    "batch": 4096, "lr": 2.4e-3, "warmup_epochs": 40, "weight_decay": 0.05, "min_lr": 0,
    "mask_ratio": 0.75, "clip_grad": None, "crop_scale": [0.2, 1.0], "no_flip": False,
    "norm_pix_loss": True, "target": "norm_pixels", "dataset": "imagefolder",
    "decoder_depth": None, "augment": "random_crop", "encoder_mask_tokens": False,
}  # fmt: skip
TERMS = {
    "mae": {"method": "mae", "mask": "random", "lscale_init": None, "pos_offset": "none"},
    "mmae": {"method": "mmae", "mask": "mixed"},
}
TUNED = {
    "batch": 1024, "warmup_epochs": 5, "weight_decay": 0.05, "min_lr": 1e-6, "mixup": 0.8,
    "cutmix": 1.0, "smoothing": 0.1, "reprob": 0.25, "aa": "rand-m9-mstd0.5-inc1", "tune": "full",
    "betas": [0.9, 0.999], "global_pool": "avg", "ema_decay": None, "clip_grad": None,
}  # fmt: skip
SIZES = {
    "base": {"epochs": 100, "lr": 2e-3, "layer_decay": 0.65, "drop_path": 0.1},
    "large": {"epochs": 50, "lr": 4e-3, "layer_decay": 0.75, "drop_path": 0.2},
    "huge": {"epochs": 50, "lr": 4e-3, "layer_decay": 0.75, "drop_path": 0.3},
}
LINEAR = {
    "batch": 16384, "lr": 6.4, "epochs": 90, "warmup_epochs": 10, "weight_decay": 0, "min_lr": 0,
    "mixup": 0, "cutmix": 0, "smoothing": 0, "reprob": 0, "aa": None, "drop_path": 0,
    "tune": "linear", "global_pool": "cls", "crop_scale": [0.08, 1.0], "layer_decay": 1,
}  # fmt: skip
SCRATCH = {
    "batch": 4096, "lr": 1.6e-3, "warmup_epochs": 20, "weight_decay": 0.3, "betas": [0.9, 0.95],
    "reprob": 0, "ema_decay": 0.9999, "mixup": 0.8, "cutmix": 1, "smoothing": 0.1,
    "layer_decay": 1, "aa": "rand-m9-mstd0.5-inc1",
}  # fmt: skip
BASELINE = {"epochs": 800, "model": "mae_vit_large_patch16"} | {
    "norm_pix_loss": False, "target": "pixels",
}  # fmt: skip
ABLATIONS: dict[str, dict[str, Any]] = {
    "baseline": {},
    **{f"decoder_depth_{n}": {"decoder_depth": n} for n in (1, 2, 4, 12)},
    **{f"decoder_width_{n}": {"decoder_embed_dim": n} for n in (128, 256, 768, 1024)},
    "encoder_mask_tokens": {"encoder_mask_tokens": True},
    "target_norm_pixels": {"norm_pix_loss": True, "target": "norm_pixels"},
    "target_pca": {"target": "pca", "pca_components": 96},
    "augment_none": {"augment": "none", "no_flip": True},
    "augment_fixed_crop": {"augment": "fixed_crop"},
    "augment_crop_jitter": {"augment": "crop_jitter"},
    "mask_block_50": {"mask": "block", "mask_ratio": 0.5},
    "mask_block_75": {"mask": "block"},
    "mask_grid_75": {"mask": "grid"},
    **{f"ratio_{n}0": {"mask_ratio": n / 10} for n in range(1, 10)},
    **{f"schedule_{n}": {"epochs": n} for n in (100, 200, 400, 1600)},
}
PARTIAL = ("0.5", "1", "2", "4", "6", "12", "18")


def expected() -> dict[str, dict[str, Any]]:
    """Every row of the papers' systems with its numbers."""
    rows: dict[str, dict[str, Any]] = {}
    for size, patch in PATCH.items():
        encoder = {"model": f"vit_{size}_patch{patch}"}
        tuned = TUNED | SIZES[size] | encoder
        for method, terms in TERMS.items():
            lengths = (
                (300, 400, 800, 1600) if (method, size) == ("mae", "base") else (400, 800, 1600)
            )
            for epochs in lengths:
                own = {"epochs": epochs, "model": f"mae_vit_{size}_patch{patch}"}
                rows[f"{method}/pretrain_vit_{size}_{epochs}.yaml"] = PRETRAIN | terms | own
            rows[f"{method}/finetune_vit_{size}.yaml"] = tuned
            rows[f"{method}/linear_vit_{size}.yaml"] = LINEAR | encoder
        rows[f"mae/places365_vit_{size}.yaml"] = tuned | {"dataset": "places365"}
        long, drop = (300, 0.1) if size == "base" else (200, 0.2)
        rows[f"mae/scratch_vit_{size}.yaml"] = (
            SCRATCH | encoder | {"epochs": long, "drop_path": drop}
        )
    rows["mmae/places365_vit_base.yaml"] = rows["mae/places365_vit_base.yaml"]
    large = TUNED | SIZES["large"] | {"model": "vit_large_patch16"}
    for blocks in PARTIAL:
        rows[f"mae/partial/vit_large_{blocks}.yaml"] = large | {"tune": f"partial:{blocks}"}
    for name, own in ABLATIONS.items():
        rows[f"mae/ablations/{name}.yaml"] = PRETRAIN | TERMS["mae"] | BASELINE | own
    return rows


# SimMIM's, from its configuration files; rates are for 512 images, as `lr_batch` says.
SIMMIM = {
    "batch": 2048, "warmup_epochs": 10, "weight_decay": 0.05, "mask": "random", "mask_ratio": 0.6,
    "clip_grad": 5.0, "betas": [0.9, 0.999], "crop_scale": [0.67, 1.0], "lr_batch": 512,
    "interpolation": "bilinear", "method": "simmim",
}  # fmt: skip
SHORT = {
    "epochs": 100,
    "lr": 8e-4,
    "warmup_lr": 1e-6,
    "min_lr": 1e-5,
    "schedule": "full_cosine",
}
LONG = {
    "epochs": 800, "lr": 4e-4, "warmup_lr": 5e-7, "schedule": "steps", "decay_epochs": [700],
    "decay_rate": 0.1,
}  # fmt: skip
SIMMIM_TUNED = {
    "batch": 2048, "lr": 5e-3, "epochs": 100, "warmup_epochs": 20, "warmup_lr": 2.5e-7,
    "min_lr": 2.5e-7, "lr_batch": 512, "schedule": "full_cosine", "weight_decay": 0.05,
    "clip_grad": 5.0, "betas": [0.9, 0.999], "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1,
    "reprob": 0.25, "aa": "rand-m9-mstd0.5-inc1", "global_pool": "avg", "tune": "full",
    "drop_path": 0.1, "crop_scale": [0.08, 1.0],
}  # fmt: skip
SIMMIM_ROWS: dict[str, dict[str, Any]] = {
    "pretrain_swin_base_100": SIMMIM | SHORT | {
        "model": "simmim_swin_base_patch4_window6", "mask_cell": [8]},
    "pretrain_swin_base_800": SIMMIM | LONG | {
        "model": "simmim_swin_base_patch4_window6", "mask_cell": [8]},
    "pretrain_swin_large_800": SIMMIM | LONG | {
        "model": "simmim_swin_large_patch4_window12", "mask_cell": [8]},
    "pretrain_vit_base_800": SIMMIM | LONG | {
        "model": "simmim_vit_base_patch16", "mask_cell": [2]},
    "finetune_swin_base_192": SIMMIM_TUNED | {
        "model": "swin_base_patch4_window6", "layer_decay": 0.9, "input_size": (192, 192)},
    "finetune_swin_base_224": SIMMIM_TUNED | {
        "model": "swin_base_patch4_window7", "layer_decay": 0.9, "input_size": (224, 224)},
    "finetune_swin_base_224_800": SIMMIM_TUNED | {
        "model": "swin_base_patch4_window7", "layer_decay": 0.8, "input_size": (224, 224)},
    "finetune_swin_large_224": SIMMIM_TUNED | {
        "model": "swin_large_patch4_window14", "layer_decay": 0.7, "drop_path": 0.2,
        "input_size": (224, 224)},
    "finetune_vit_base": SIMMIM_TUNED | {
        "model": "vit_relative_base_patch16", "layer_decay": 0.65},
    "linear_vit_base": LINEAR | {
        "model": "vit_relative_base_patch16", "probe_block": 8, "global_pool": "avg"},
}  # fmt: skip


# Pixio's, from its published settings: 1,605 steps of 8192 images are an epoch of ImageNet-21K.
PIXIO = PRETRAIN | TERMS["mae"] | {
    "method": "pixio", "model": "pixio_vit_huge_patch16", "batch": 8192, "lr": 8e-4,
    "mask_cell": [4], "drop_path": 0.4,
}  # fmt: skip
PIXIO_ROWS: dict[str, dict[str, Any]] = {
    "pretrain_vit_huge_21k": PIXIO | {"epochs": 13_151_276 // 8192 * 400 // 1605},
    "pretrain_vit_huge_1k": PIXIO | {
        "epochs": 1605 * 400 // (1_281_167 // 8192), "warmup_epochs": 411.5},
    "linear_vit_huge": LINEAR | {"model": "vit_huge_patch16_cls8", "input_size": (256, 256)},
}  # fmt: skip


EXPECTED = expected() | {
    f"{folder}/{name}.yaml": row
    for folder, rows in {"simmim": SIMMIM_ROWS, "pixio": PIXIO_ROWS}.items()
    for name, row in rows.items()
}
PUBLISHED = {
    "mmae/published_pretrain.yaml": """--batch_size 100 --model mae_vit_base_patch16
        --norm_pix_loss --mask_ratio 0.75 --epochs 400 --warmup_epochs 40 --blr 1.5e-4
        --weight_decay 0.05""",
    "mmae/published_finetune.yaml": """--batch_size 64 --model vit_base_patch16 --epochs 100
        --blr 5e-4 --layer_decay 0.65 --weight_decay 0.05 --drop_path 0.1 --reprob 0.25
        --mixup 0.8 --cutmix 1.0 --dist_eval""",
}


def test_every_row_is_there() -> None:
    small = {name for name in ROWS if name.startswith("small/")}
    assert set(ROWS) - small == EXPECTED.keys() | PUBLISHED.keys()
    sets = ("cifar10", "cifar100", "stl10")
    tasks = ("pretrain", "finetune", "linear")
    assert small == {f"small/{name}_{task}.yaml" for name in sets for task in tasks}


@pytest.mark.parametrize("name", EXPECTED)
def test_recipe_is_the_papers(name: str) -> None:
    found = numbers(name)
    assert {k: found[k] for k in EXPECTED[name]} == EXPECTED[name]


# MAE's setting for UPerNet. Blocks are counted from 0; the crop's grid is 32 x 32.
ADE20K = {
    "dataset": "ade20k", "iterations": 160_000, "batch_size": 2, "accum_iter": 1,
    "input_size": (512, 512), "lr": 1e-4, "betas": [0.9, 0.999], "weight_decay": 0.05,
    "layer_decay": 0.65, "drop_path": 0.1, "warmup_iterations": 1500, "min_lr": 0,
    "clip_grad": None, "precision": "fp16", "channels": 768, "aux_channels": 256,
    "dropout": 0.1, "aux_weight": 0.4, "relative_bias": True, "lscale_init": 1.0,
    "resize": [2048, 512], "ratio_range": [0.5, 2.0], "cat_max_ratio": 0.75, "no_flip": False,
    "no_distortion": False, "inference": "slide", "window": (512, 512), "stride": (341, 341),
    "multi_scale": False, "flip": False,
}  # fmt: skip


def test_ade20k_is_the_published_run() -> None:
    found = vars(resolved("ade20k.yaml", "--model=vit_base_patch16"))
    assert {k: found[k] for k in ADE20K} == ADE20K
    assert SCALES == (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    schedule = PolySchedule(1e-4, 1500, 160_000, found["min_lr"])
    assert schedule(0) == pytest.approx(1e-10) and schedule(80_750) == pytest.approx(5e-5)
    with torch.device("meta"):
        args = argparse.Namespace(**found)
        model, _ = main_segment.new_model(args, 150)
    assert model.taps == (3, 5, 7, 11) and model.grid == (32, 32) and model.aux_tap == 2
    assert model.neck.factors == [4, 2, 1, 0.5]
    assert model.decode_head.pool_scales == (1, 2, 3, 6)
    assert model.encoder.blocks[0].norm1.eps == 1e-6
    assert {tuple(bias.table.shape) for bias in model.relative} == {(63 * 63 + 3, 12)}


def test_garments_is_whole() -> None:
    """All that the made scenes need is in the recipe; evaluation sees the images as they are."""
    found = resolved("garments.yaml")
    size = (found.scene_size,) * 2
    assert found.input_size == size == tuple(found.resize) and found.inference == "whole"
    assert found.dataset == "garments" and found.iterations % found.eval_every == 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_commands_are_recipes(name: str) -> None:
    recipe, words = collect_settings(resolved(name)), PUBLISHED[name].split()
    command = parser_of(name).parse(words)
    if task_of(name) == "finetune":
        main_finetune.resolve_tune(command)
    given = collect_settings(command)
    different = {key for key in recipe if recipe[key] != given[key]}
    assert different == {"output_dir", "precision"}  # the official code's precision is autocast's


@pytest.mark.parametrize("name", ROWS)
def test_header_says_row_cost_and_expectation(name: str) -> None:
    text = (RECIPES / name).read_text()
    head = [line for line in text.splitlines() if line.startswith("#")]
    joined = " ".join(line.lstrip("# ") for line in head)
    assert "Expected" in joined and "Cost: " in joined
    assert f"--config recipes/{name}" in text or "Then" in joined
    if name not in PUBLISHED and not name.startswith("small/"):
        assert "(estimate)" in joined or "(published)" in joined


COST = re.compile(
    r"(?P<gpus>\d+) (A100|V100), (?P<hours>[\d.]+) h \((estimate|published)\): "
    r"(?P<images>[\d,]+) x (?P<epochs>\d+) / \((?P<by>\d+) x (?P<rate>[\d,]+)\) / 3600 s"
)
SCALED = re.compile(r"s; (?P<known>[\d,]+) images/s x (?P<its>[\d.]+) / (?P<own>[\d.]+) GFLOPs")
SET_SIZES = {"imagefolder": 1_281_167, "places365": 1_803_460}
IMAGENET_21K = 13_151_276


def header_of(path: Path) -> str:
    lines = [line for line in path.read_text().splitlines() if line.startswith("#")]
    return " ".join(" ".join(line.strip("# ") for line in lines).split())


def plain(text: str) -> float:
    return float(text.replace(",", ""))


@pytest.mark.parametrize("name", [name for name in ROWS if not name.startswith("small/")])
def test_the_header_is_true_of_its_recipe(name: str) -> None:
    """Epochs, images, hours, rate, size and batch: what is written is what the settings give."""
    header, found = header_of(RECIPES / name), numbers(name)
    cost = COST.search(header)
    images = IMAGENET_21K if "ImageNet-21K" in header else SET_SIZES[found["dataset"]]
    assert cost and plain(cost["images"]) == images
    assert int(cost["epochs"]) == found["epochs"] and cost["by"] == cost["gpus"]
    hours = plain(cost["images"]) * found["epochs"] / int(cost["gpus"]) / plain(cost["rate"]) / 3600
    rounded = 0.051 + hours * 0.5 / plain(cost["rate"])  # hours to a tenth, rates to an image
    assert abs(plain(cost["hours"]) - hours) <= rounded
    if scaled := SCALED.search(header):
        rate = plain(scaled["known"]) * plain(scaled["its"]) / plain(scaled["own"])
        assert plain(cost["rate"]) == pytest.approx(rate, abs=0.5, rel=2e-3)
    family, letter = re.findall(r"(ViT|Swin)-([BLH])", header.partition("Expected")[0])[0]
    size = {"B": "base", "L": "large", "H": "huge"}[letter]
    assert re.search(rf"{family.lower()}_(relative_)?{size}_", found["model"])
    if batch := re.search(r"Global batch (\d+) x 8 GPUs = (\d+)", header):
        assert int(batch[1]) * 8 == int(batch[2]) == found["batch"]
    if "as it stands" in header:
        assert name in PUBLISHED and "but for precision" in header and "bf16 is ours" in header
    for following in re.findall(r"Then (.*?yaml)\.", header):
        for other in re.findall(r"[\w./]+\.yaml", following):
            assert (RECIPES / name).parent.joinpath(other).is_file()


@pytest.mark.parametrize("name", ["pretrain", "finetune", "linear", "scratch"])
def test_the_base_recipes_say_their_batch(name: str) -> None:
    path = RECIPES / "base" / f"{name}.yaml"
    found = re.search(r"Global batch (\d+) = (\d+) x 8 GPUs(?: x (\d+) micro)?", header_of(path))
    recipe = read_recipe(path)
    assert found and int(found[2]) == recipe["batch_size"]
    assert int(found[3] or 1) == recipe["accum_iter"]
    assert int(found[1]) == recipe["batch_size"] * 8 * recipe["accum_iter"]


def test_the_study_says_how_many_photographs_there_are() -> None:
    header = header_of(RECIPES / "tables" / "study.yaml")
    count = re.search(r"the (\d+) held-out crops of the bundled photographs", header)
    assert count and int(count[1]) == len(build_dataset("photos", "val"))


def test_run_folders_are_apart() -> None:
    """No two recipes write into one folder, but for the published commands, which do so."""
    folders = [read_recipe(RECIPES / name)["output_dir"] for name in ROWS]
    twice = {folder for folder in folders if folders.count(folder) > 1}
    assert twice == {"output_dir/mmae/published"}


# ---- What a dry run says of them ---------------------------------------------------------------


def warned(name: str, *more: str) -> list[str]:
    """Its warnings where it is meant to run, but for those of this machine."""
    found = argparse.Namespace(**vars(resolved(name, *more)))
    count = 8 if name.startswith(("mae/", "mmae/", "pixio/", "simmim/", "ade20k")) else 1
    plan = MAINS[task_of(name)].plan_run(found, count)
    return [w for w in list_warnings(plan) if w not in machine_warnings(plan)]


@pytest.mark.parametrize("name", [*ROWS, *SEGMENTERS, "demo.yaml", "fashion_mnist.yaml"])
def test_no_recipe_is_warned_of(name: str) -> None:
    """Nor those that start from a checkpoint where none is named; that alone is said then."""
    if task_of(name) == "pretrain" or "scratch" in name:
        assert warned(name) == []
        return
    usual = "swin_base_patch4_window7" if "swin" in name else "vit_base_patch16"
    model = [] if "model" in read_recipe(RECIPES / name) else [f"--model={usual}"]
    assert warned(name, *model, "--finetune=nowhere.pth") == []
    # Swin's own recipe for ADE20K has one rate for all blocks, which random weights can have too.
    silent = "finetune" in read_recipe(RECIPES / name) or name == "simmim/ade20k_swin_base.yaml"
    alone = [] if silent else ["there is no --finetune"]
    assert [text[:22] for text in warned(name, *model)] == alone


PLANS = [
    "comparison",
    "fashion_mnist",
    "garments",
    "cross",
    "lscale_lr",
    "simmim",
    "simmim_rate",
    "study",
]


def test_every_plan_is_checked() -> None:
    assert {path.stem for path in (RECIPES / "tables").glob("*.yaml")} == set(PLANS)


@pytest.mark.parametrize("name", PLANS)
def test_no_run_of_a_plan_is_warned_of(name: str) -> None:
    """Flags that do nothing, and rates or batches far off, in any of the plans' trainings."""
    plan = read_plan(RECIPES / "tables" / f"{name}.yaml", READERS)
    for run in plan.runs.values():
        task = run.main.removeprefix("main_")
        if task not in MAINS:
            continue
        words = run.words("0", lambda other: f"nowhere/{other}")[1:]
        parser = MAINS[task].build_parser(words)
        found = parser.parse(words)
        if task == "finetune":
            main_finetune.resolve_tune(found)
        if found.model is None:
            found.model = "vit_tiny_patch4"
        planned = MAINS[task].plan_run(found, 1, warn_of_flags(vars(found), parser.given))
        said = [w for w in list_warnings(planned) if w not in machine_warnings(planned)]
        # An encoder's first weights, as a pretraining saves them.
        arm = run.copy.arm or run.name
        untrained = run.main == "main_pretrain" and arm.startswith("untrained")
        assert said == (["the peak lr is 0: nothing learns"] if untrained else []), run.name


# ---- Two steps of each -------------------------------------------------------------------------

TINY = [
    "--dataset=digits", "--batch_size=30", "--accum_iter=1", "--epochs=1", "--warmup_epochs=0",
    "--precision=fp32", "--num_workers=0", "--device=cpu", "--save_every=0", "--log_every=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def start(trained: Trained) -> Path:
    """A pretrained checkpoint of the tiny model."""
    return trained("main_pretrain", OF_DIGITS) / "checkpoint-last.pth"


def name_kind(name: str) -> tuple[Any, ...]:
    """What makes a recipe another path through the code; a new kind is run unasked."""
    found, task = vars(resolved(name)), task_of(name)
    if task == "segment":
        return (task, found["dataset"], found["inference"], found["relative_bias"])
    size = next((size for size in PATCH if f"_{size}_" in found["model"]), "small")
    if name.startswith("simmim/"):
        own = ("method", "schedule", "probe_block", "tune")
        return (task, "swin" in found["model"], *(found.get(k) for k in own))
    if task == "pretrain":
        # Ratio, depth, width and length are numbers, which the two steps do not tell apart.
        own = ("method", "mask", "decoder", "target", "augment", "encoder_mask_tokens")
        resized = found["decoder_depth"] is not None or found["decoder_embed_dim"] is not None
        return (task, size, resized, *(found[k] for k in own))
    tune = found["tune"].partition(":")[0] + (":0.5" if found["tune"] == "partial:0.5" else "")
    own = ("aa", "global_pool")
    parts = (*(found[k] for k in own), *(bool(found[k]) for k in ("mixup", "ema_decay", "reprob")))
    return (task, size, tune, *parts)


# One recipe of each kind, the first by name.
KINDS = {name_kind(name): name for name in reversed([*ROWS, *SEGMENTERS])}


def test_the_kinds_are_those_we_know() -> None:
    """So that a default that swallows a flag does not quietly merge two kinds."""
    run = set(KINDS.values())
    alone = ("baseline", "encoder_mask_tokens", "target_pca", "mask_block_50", "mask_grid_75",
             "augment_none", "augment_fixed_crop", "augment_crop_jitter")  # fmt: skip
    assert run >= {f"mae/ablations/{name}.yaml" for name in alone}
    assert set(SEGMENTERS) < run and {task_of(name) for name in run} == set(MAINS)


def segments_two_steps(name: str, folder: Path) -> None:
    """The recipe on two made scenes, a small encoder and thin heads."""
    recipe = read_recipe(RECIPES / name)
    flags = [
        f"--config={RECIPES / name}",
        f"--model={'swin_micro_patch2_window4' if 'swin' in name else 'vit_micro_patch8'}",
        "--dataset=garments",
        "--train_images=4", "--val_images=1", "--input_size=32", "--resize", "48", "32",
        "--window=32", "--stride=24", "--channels=8", "--aux_channels=8", "--batch_size=2",
        "--iterations=2", "--warmup_iterations=1", "--eval_every=2", "--save_every=0",
        "--log_every=1", "--pictures=0", "--num_workers=0", "--device=cpu", "--precision=fp32",
        f"--output_dir={folder}",
    ]  # fmt: skip
    main_segment.main(flags)
    check_run(recipe, flags, folder, "-segment", steps=2)


def check_run(
    recipe: dict[str, Any], flags: list[str], folder: Path, task: str, steps: int
) -> None:
    """The resolved set is saved, and it is the recipe's; the log has so many steps."""
    saved = yaml.safe_load((folder / f"config{task}.yaml").read_text())
    given = {flag[2:].split("=")[0] for flag in flags}
    assert not differences({k: v for k, v in recipe.items() if k not in given}, saved)
    lines = (folder / f"metrics{task}.jsonl").read_text().splitlines()
    assert sum('"kind": "train"' in line for line in lines) == steps


def at_small_size(name: str, recipe: dict[str, Any], start: Path) -> list[str]:
    """The flags that make a training of digits of a recipe; what they change is not compared."""
    simmim, swin = name.startswith("simmim/"), "swin" in name
    if task_of(name) == "pretrain" and simmim:
        model = "simmim_swin_micro_patch2_window4" if swin else "simmim_vit_micro_patch4"
        flags = [f"--model={model}", "--mask_cell=4", "--picture_every=0"]
        return [*flags, *(["--decay_epochs=0.5"] if "800" in name else [])]
    if task_of(name) == "pretrain" and name.startswith("pixio/"):
        return ["--model=pixio_vit_micro_patch4", "--mask_cell=2", "--picture_every=0"]
    if task_of(name) == "pretrain":
        flags = ["--model=mae_vit_micro_patch4", "--input_size=16", "--picture_every=0"]
        # A patch of 4 x 4 has 16 values.
        return [*flags, *(["--pca_components=8"] if "pca_components" in recipe else [])]
    if simmim and "probe_block" not in recipe:
        model = "swin_micro_patch2_window4" if swin else "vit_relative_micro_patch4"
        return [f"--model={model}", "--input_size=32", "--eval_every=0"]
    flags = ["--model=vit_micro_patch4", "--eval_every=0"]
    flags.append("--input_size=16" if "scratch" in name else f"--finetune={start}")
    if recipe.get("tune", "").startswith("partial:") and float(recipe["tune"][8:]) > 4:
        flags.append("--tune=partial:3")  # of 4 blocks
    return [*flags, *(["--probe_block=2"] if "probe_block" in recipe else [])]


@pytest.mark.smoke
@pytest.mark.parametrize("name", KINDS.values())
def test_one_of_each_kind_trains_two_steps(
    name: str, start: Path, few: int, tmp_path: Path
) -> None:
    task, recipe = task_of(name), read_recipe(RECIPES / name)
    if task == "segment":
        segments_two_steps(name, tmp_path)
        return
    flags = [f"--config={RECIPES / name}", *TINY, f"--output_dir={tmp_path}"]
    flags += at_small_size(name, recipe, start)
    MAINS[task].main(flags)
    check_run(recipe, flags, tmp_path, "" if task == "pretrain" else "-finetune", few // 30)


# ---- Recipes that extend others ----------------------------------------------------------------


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(files))}.yaml"


def parse(path: Path, *more: str) -> argparse.Namespace:
    return main_pretrain.build_parser().parse([f"--config={path}", *more])


def test_the_extending_recipe_wins_and_the_command_line_over_both(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        child="extends: middle.yaml\nblr: 2e-3\ndecoder_depth: null\n",
        middle="extends: base.yaml\nmask_ratio: 0.6\nno_flip: false\ndecoder_depth: 3\n",
        base="blr: 1e-3\nepochs: 7\nmask_ratio: 0.5\nno_flip: true\n",
    )
    found = parse(path, "--epochs=9")
    assert (found.blr, found.mask_ratio, found.epochs) == (2e-3, 0.6, 9)
    assert (found.no_flip, found.decoder_depth) == (False, None)
    assert [file.stem for file, _ in read_layers(path)] == ["base", "middle", "child"]


def test_a_recipe_written_out_is_the_same_elsewhere(tmp_path: Path) -> None:
    path = RECIPES / "mmae" / "pretrain_vit_huge_800.yaml"
    copy = tmp_path / "alone.yaml"
    copy.write_bytes(write_recipe(read_recipe(path)))
    assert collect_settings(parse(copy)) == collect_settings(parse(path))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a": "extends: b.yaml\n", "b": "extends: a.yaml\n"}, "extend each other"),
        ({"a": "extends: a.yaml\n"}, "extend each other"),
        ({"a": "extends: nowhere.yaml\n"}, "nowhere.yaml, which "),
        ({"a": "extends: [b.yaml]\n"}, "must name one file"),
        ({"a": "extends: b.yaml\n", "b": "blrr: 1\n"}, r"b\.yaml \(did you mean blr"),
        ({"a": "blr: 1\nblr: 2\n"}, "'blr' stands twice"),
        ({"a": "mask: randon\n"}, r"did you mean random\?"),
        ({"a": "dataset: cifar-10\n"}, r"did you mean cifar10\?"),
        ({"a": "precision: bf61\n"}, r"did you mean bf16\?"),
        ({"a": "method: maee\n"}, r"did you mean mae\?"),
        ({"a": "pos_offset: centre\n"}, r"did you mean center\?"),
        ({"a": "mask_ratios: 0.5\n"}, r"did you mean mask_ratio\?"),
        ({"a": "blr: fast\n"}, "'fast' is not a number"),
        ({"a": "mask_ratio: 1.5\n"}, "1.5 is not above 0 and at most 1"),
        ({"a": "norm_pix_loss: 1\n"}, "switch: true or false"),
    ],
)
def test_what_is_wrong_is_named_with_the_nearest(
    files: dict, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=expected):
        parse(write(tmp_path, **files))


def test_a_wrong_model_is_named_with_the_nearest(tmp_path: Path, run_main) -> None:
    path = write(tmp_path, a="model: mae_vit_bse_patch16\n")
    code, _, err = run_main("main_pretrain", [f"--config={path}", "--dry_run"])
    assert code == 2 and "did you mean mae_vit_base_patch16?" in err
