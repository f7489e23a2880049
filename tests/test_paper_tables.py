"""The papers' tables with our column, and curves compared with references."""

import csv
import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

import main_finetune
import main_pretrain
import main_segment
from util.config.recipes import read_recipe
from util.errors import BadInput
from util.runs.curves import Curve, compare, draw_curves, read_curve
from util.runs.paper_tables import commands, differences, find_runs, read_paper

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
PAPERS = sorted((RECIPES / "papers").glob("*.yaml"))


def tables() -> list[Any]:
    return [table for path in PAPERS for table in read_paper(path, RECIPES)]


# ---- The papers --------------------------------------------------------------------------------

# The papers' numbers, once more: (table's title begins, row begins, number).
PRINTED = [
    ("Fine-tuned", "ViT-B", 83.6), ("Fine-tuned", "ViT-L", 85.9), ("Fine-tuned", "ViT-H", 86.9),
    ("Linear", "ViT-B", 68.0), ("Linear", "ViT-L", 75.8), ("Linear", "ViT-H", 76.6),
    ("Shorter", "300 epochs, fine", 83.1), ("Shorter", "400 epochs, fine", 83.3),
    ("Shorter", "800 epochs, fine", 83.3), ("Shorter", "300 epochs, lin", 60.8),
    ("Shorter", "400 epochs, lin", 62.5), ("Shorter", "800 epochs, lin", 65.1),
    ("UPerNet", "ViT-B", 48.1), ("UPerNet", "ViT-L", 53.6), ("UPerNet", "ViT-B, single", 48.13),
    ("UPerNet", "ViT-B, multi", 48.70), ("Places365, 1600", "ViT-B", 57.9),
    ("Places365, 1600", "ViT-L", 59.4),
    ("Places365, 1600", "ViT-H", 59.8), ("Partial", "0 blocks", 73.5), ("Partial", "0.5", 79.1),
    ("Partial", "1", 81.0), ("ImageNet-1K", "M-MAE, 800", 84.5), ("ImageNet-1K", "MAE", 84.4),
    ("ImageNet-1K", "ViT", 79.9), ("ImageNet-1K", "BEiT", 83.2), ("ImageNet-1K", "CAE", 83.6),
    ("ImageNet-1K", "SimMIM", 83.8), ("ImageNet-1K", "LocalMIM-HOG", 83.3),
    ("ImageNet-1K", "GreenMIM", 83.8), ("ImageNet-1K", "DMAE", 84.0), ("ImageNet-1K", "MRA", 78.4),
    ("ImageNet-1K", "SparseMAE", 83.2), ("ImageNet-1K", "CIM", 83.3),
    ("ImageNet-1K", "CrossMAE", 83.5), ("ImageNet-1K", "DailyMAE", 83.3),
    ("ImageNet-1K", "ColorMAE", 83.8), ("Places365", "M-MAE", 58.2), ("Places365", "MAE", 57.9),
    ("Places365", "AlexNet", 53.3), ("Places365", "VGG", 55.2), ("Places365", "Deep-Narrow", 55.9),
    ("Places365", "ResNet", 54.7), ("Places365", "AMAT", 57.8), ("Places365", "KAMIM", 53.0),
    ("ADE20K", "M-MAE", 49.4), ("ADE20K", "MoCo v3", 47.3), ("ADE20K", "BEiT", 47.1),
    ("ADE20K", "MAE, 1600", 48.1), ("ADE20K", "CAE", 48.8), ("ADE20K", "CIM", 43.5),
    ("ADE20K", "ColorMAE", 49.3), ("ADE20K", "MIMIC", 46.1),
]  # fmt: skip
ABLATIONS = {
    "Ablation, decoder depth": {
        "1": (84.8, 65.5), "2": (84.9, 70.0), "4": (84.9, 71.9), "8": (84.9, 73.5),
        "12": (84.4, 73.3),
    },
    "Ablation, decoder width": {
        "128": (84.9, 69.1), "256": (84.8, 71.3), "512": (84.9, 73.5), "768": (84.4, 73.1),
        "1024": (84.3, 73.1),
    },
    "Ablation, mask tokens": {"with": (84.2, 59.6), "without": (84.9, 73.5)},
    "Ablation, target": {
        "pixels": (84.9, 73.5), "normalised pixels": (85.4, 73.9),
        "PCA, 96 coefficients": (84.6, 72.3), "dVAE tokens (no system of ours)": (85.3, 71.6),
    },
    "Ablation, augmentation": {
        "none": (84.0, 65.7), "fixed crop": (84.7, 73.1), "random crop": (84.9, 73.5),
        "crop and jitter": (84.3, 71.9),
    },
    "Ablation, masks;": {
        "random 75 %": (84.9, 73.5), "block 50 %": (83.9, 72.3), "block 75 %": (82.8, 63.9),
        "grid 75 %": (84.0, 66.0),
    },
}  # fmt: skip


def test_published_numbers_are_fields() -> None:
    found = {(t.title, r.name): r.paper for t in tables() for r in t.rows}
    for title, name, number in PRINTED:
        exact = [v for (t, n), v in found.items() if t.startswith(title) and n == name]
        near = [v for (t, n), v in found.items() if t.startswith(title) and n.startswith(name)]
        assert (exact or near)[0] == number, (title, name)
    for title, rows in ABLATIONS.items():
        got = {n: v for (t, n), v in found.items() if t.startswith(title)}
        expected = {
            f"{name}, {kind}": value
            for name, pair in rows.items()
            for kind, value in zip(("fine-tuned", "linear"), pair, strict=True)
        }
        assert got == expected


def test_every_recipe_has_a_row_and_every_row_a_recipe() -> None:
    rows = [row for table in tables() for row in table.rows]
    named = {name for row in rows for name in (row.pretrain, row.run) if name}
    assert {name for name in named if not (RECIPES / name).exists()} == set()
    files = {
        path.relative_to(RECIPES).as_posix()
        for folder in ("mae", "mmae")
        for path in (RECIPES / folder).rglob("*.yaml")
    }
    # Without a published number, and so in no table.
    unlisted = {
        *(f"{m}/pretrain_vit_{s}_400.yaml" for m in ("mae", "mmae") for s in ("large", "huge")),
        "mae/pretrain_vit_large_800.yaml", "mae/pretrain_vit_huge_800.yaml",
        "mmae/pretrain_vit_base_400.yaml",
        *(f"mmae/{k}_vit_{s}.yaml" for k in ("finetune", "linear") for s in ("large", "huge")),
        *(f"mmae/pretrain_vit_{s}_{e}.yaml" for s in ("large", "huge") for e in (800, 1600)),
        "mmae/linear_vit_base.yaml",
    }  # fmt: skip
    assert files - named == unlisted


def test_commands_of_all_rows_are_understood() -> None:
    mains = {f"{m.__name__}.py": m for m in (main_pretrain, main_finetune, main_segment)}
    seen = set()
    for table in tables():
        for row in table.rows:
            lines = commands(row, table.metric, RECIPES)
            assert bool(lines) == (row.folder is not None)
            for line in lines:
                words = shlex.split(line)[3:]
                recipe = words[words.index("--config") + 1].removeprefix("recipes/")
                words[words.index("--config") + 1] = str(RECIPES / recipe)
                line = shlex.join(words)
                if line not in seen:  # many rows share a pretraining
                    mains[words[0]].build_parser(words[1:]).parse(words[1:])
                seen.add(line)
    assert {line.split()[0] for line in seen} == set(mains) and len(seen) > 100


# ---- Our column --------------------------------------------------------------------------------


def put_run(folder: Path, task: str, recipe: str, evals: list[dict], **changed: Any) -> None:
    """A run folder as a main leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    tail = "" if task == "pretrain" else f"-{task}"
    (folder / f"config{tail}.yaml").write_text(
        yaml.safe_dump(read_recipe(RECIPES / recipe) | changed)
    )
    lines = [{"kind": "train", "step": s, "loss": 1 / s, "lr": 0.1} for s in (1, 2, 3)]
    (folder / f"metrics{tail}.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [*lines, *evals])
    )


def evaluated(epoch: int, top1: float) -> dict:
    return {"kind": "eval", "step": 9, "epoch": epoch, "top1": top1, "loss": 1.0}


def our_rows(tmp_path: Path, run_main, *papers: str) -> dict[str, dict[str, str]]:
    files = [str(RECIPES / "papers" / f"{name}.yaml") for name in papers or ("mae", "mmae")]
    words = ["--papers", *files, "--runs", str(tmp_path), f"--output_dir={tmp_path / 'out'}"]
    code, out, err = run_main("main_tables", words)
    assert code == 0, err
    assert (tmp_path / "out" / "papers.md").read_text() in out
    with (tmp_path / "out" / "papers.csv").open() as file:
        return {f"{r['table']} / {r['row']}": r for r in csv.DictReader(file)}


@pytest.mark.smoke
def test_nothing_run_yet(tmp_path: Path, run_main) -> None:
    rows = our_rows(tmp_path, run_main)
    assert {r["state"] for r in rows.values()} == {"not run", "other method"}
    assert all(r["ours"] == "" for r in rows.values())
    assert not (tmp_path / "out" / "curves.png").exists()


@pytest.mark.smoke
def test_finished_running_and_departing_runs(tmp_path: Path, run_main) -> None:
    base = tmp_path / "mae" / "pretrain_vit_base_1600"
    pretrained = {"kind": "epoch", "step": 3, "epoch": 1599, "loss": 0.4}
    put_run(base, "pretrain", "mae/pretrain_vit_base_1600.yaml", [pretrained])
    evals = [evaluated(98, 84.9), evaluated(99, 83.55)]  # the last epoch counts, not the best
    put_run(base / "finetune", "finetune", "mae/finetune_vit_base.yaml", evals)
    put_run(base / "linear", "finetune", "mae/linear_vit_base.yaml", [evaluated(30, 50.0)])
    large = tmp_path / "mae" / "pretrain_vit_large_1600"
    put_run(large, "pretrain", "mae/pretrain_vit_large_1600.yaml", [pretrained | {"epoch": 9}])
    scratch = tmp_path / "mae" / "scratch_vit_large"
    evals = [evaluated(199, 80.0) | {"ema_top1": 82.5}]
    put_run(scratch, "finetune", "mae/scratch_vit_large.yaml", evals, weight_decay=0.05)
    rows = our_rows(tmp_path, run_main, "mae")
    table = "Fine-tuned on ImageNet-1K, 1600 epochs"
    done = rows[f"{table} / ViT-B"]
    assert (done["state"], done["ours"], done["note"]) == ("done", "83.55", "")
    assert done["folder"] == str(base / "finetune")
    linear = rows["Linear probe on ImageNet-1K, 1600 epochs / ViT-B"]
    assert (linear["state"], linear["note"]) == ("running", "epoch 31 of 90")
    waiting = rows[f"{table} / ViT-L"]
    assert (waiting["state"], waiting["note"]) == ("not run", "pretraining did 10 epochs")
    departs = rows[f"{table} / ViT-L, from scratch"]
    assert (departs["ours"], departs["state"]) == ("82.5", "done")
    assert departs["note"] == "weight_decay 0.05, the recipe has 0.3"
    text = (tmp_path / "out" / "papers.md").read_text()
    assert "| ViT-B | 83.6 | **83.5** |  |" in text or "| ViT-B | 83.6 | **83.6** |  |" in text
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_another_pretraining_is_said(tmp_path: Path, run_main) -> None:
    base = tmp_path / "mae" / "pretrain_vit_base_1600"
    put_run(base, "pretrain", "mae/pretrain_vit_base_1600.yaml", [], mask_ratio=0.6)
    put_run(base / "finetune", "finetune", "mae/finetune_vit_base.yaml", [evaluated(99, 80.0)])
    rows = our_rows(tmp_path, run_main, "mae")
    note = rows["Fine-tuned on ImageNet-1K, 1600 epochs / ViT-B"]["note"]
    assert note == "pretraining: mask_ratio 0.6, the recipe has 0.75"


def test_a_real_run_is_found_and_departs(tmp_path: Path, few: int, run_main) -> None:
    """What the mains write is what the tables read."""
    folder = tmp_path / "mae" / "scratch_vit_base"
    flags = [
        f"--config={RECIPES / 'mae' / 'scratch_vit_base.yaml'}", "--model=vit_micro_patch4",
        "--dataset=digits", "--input_size=16", "--batch_size=30", "--accum_iter=1", "--epochs=2",
        "--warmup_epochs=1", "--num_workers=0", "--device=cpu", f"--output_dir={folder}",
    ]  # fmt: skip
    main_finetune.main(flags)
    row = our_rows(tmp_path, run_main, "mae")[
        "Fine-tuned on ImageNet-1K, 1600 epochs / ViT-B, from scratch"
    ]
    result = json.loads((folder / "result.json").read_text())
    assert row["state"] == "done" and float(row["ours"]) == result["ema_top1"]
    assert "epochs 2, the recipe has 300" in row["note"]


@pytest.mark.smoke
def test_a_real_segmentation_fills_its_rows(tmp_path: Path, run_main) -> None:
    """The file and the names of main_segment.py; half-way through it is still running."""
    folder = tmp_path / "mae" / "pretrain_vit_base_1600" / "ade20k"
    main_segment.main([
        f"--config={RECIPES / 'ade20k.yaml'}", "--model=vit_micro_patch8", "--dataset=garments",
        "--train_images=4", "--val_images=2", "--input_size=32", "--resize", "48", "32",
        "--window=32", "--stride=24", "--channels=8", "--aux_channels=8", "--iterations=2",
        "--warmup_iterations=1", "--eval_every=1", "--save_every=0", "--num_workers=0",
        "--device=cpu", "--precision=fp32", "--pictures=0", f"--output_dir={folder}",
    ])  # fmt: skip
    found = our_rows(tmp_path, run_main)
    row = found["UPerNet on ADE20K, 1600 epochs, mIoU / ViT-B"]
    result = json.loads((folder / "result.json").read_text())
    assert (row["state"], float(row["ours"])) == ("done", result["miou"])
    assert "iterations 2, the recipe has 160000" in row["note"]
    assert found["ADE20K, mIoU / MAE, 1600 epochs"]["ours"] == row["ours"]
    config = folder / "config-segment.yaml"
    config.write_text(config.read_text().replace("iterations: 2\n", "iterations: 9\n", 1))
    row = our_rows(tmp_path, run_main)["UPerNet on ADE20K, 1600 epochs, mIoU / ViT-B"]
    assert (row["state"], row["note"], row["ours"]) == ("running", "iteration 2 of 9", "")


def test_values_are_compared_as_values() -> None:
    recipe = {"blr": "5.0e-4", "betas": [0.9, 0.999], "aa": "none", "epochs": 5, "keep": 9}
    settings = {"blr": 5e-4, "betas": (0.9, 0.999), "aa": None, "epochs": 5.0, "keep": 1}
    assert differences(recipe, settings) == []
    sizes = {"input_size": 64, "patch_size": "8x16"}
    assert differences(sizes, {"input_size": "64x64", "patch_size": "8x16"}) == []
    assert differences(sizes, {"input_size": "64x32", "patch_size": "16x16"}) == [
        "input_size 64x32, the recipe has 64",
        "patch_size 16x16, the recipe has 8x16",
    ]
    assert differences({"epochs": 5}, {"epochs": 6}) == ["epochs 6, the recipe has 5"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--papers", "nowhere.yaml"], "cannot read nowhere.yaml"),
        (["--papers", str(RECIPES / "demo.yaml")], "holds no tables"),
        (["--papers", str(PAPERS[0]), "--runs", "/nowhere"], "no folder /nowhere"),
        (["--papers", str(PAPERS[0]), "--compare", "a", "b"], "give one of --plan"),
        ([], "give one of --plan"),
        (["--compare", "nowhere", str(ROOT / "docs/curves/demo.json")], "cannot read nowhere"),
        (["--compare", str(RECIPES), str(ROOT / "docs/curves/demo.json")], "name a run folder"),
    ],
)
def test_bad_input(words: list[str], expected: str, run_main) -> None:
    code, _, err = run_main("main_tables", words)
    assert code == 2 and expected in err
    assert "Traceback" not in err


def test_find_runs_below_a_root(tmp_path: Path) -> None:
    put_run(tmp_path / "a" / "b", "pretrain", "demo.yaml", [])
    put_run(tmp_path / "c", "finetune", "demo.yaml", [])
    assert sorted(find_runs([tmp_path])) == [tmp_path / "a" / "b", tmp_path / "c"]


# ---- Curves ------------------------------------------------------------------------------------


def curve(losses: list[float], every: int = 1, **settings: Any) -> Curve:
    """A run of these losses by step, logged every so many steps as their mean."""
    ends = range(every, len(losses) + 1, every)
    means = [math.fsum(losses[end - every : end]) / every for end in ends]
    return Curve("run", list(ends), means, settings, {})


LOSSES = [2 / math.sqrt(1 + step) for step in range(96)]


@pytest.mark.parametrize("every", [1, 4, 12, 48])
def test_log_intervals_do_not_matter(every: int) -> None:
    found = compare(curve(LOSSES, every), curve(LOSSES))
    assert found.same and found.largest < 1e-12
    assert found.stretches[-1][1] == 96


def test_where_curves_part() -> None:
    other = [loss * (1 if step < 50 else 1.1) for step, loss in enumerate(LOSSES)]
    found = compare(curve(other), curve(LOSSES), tolerance=0.02, window=10)
    assert found.parted == (50, 60) and not found.same
    assert found.largest == pytest.approx(0.1)
    # Nine whole stretches of ten: five alike, four a tenth apart.
    assert found.mean == pytest.approx(0.4 / 9)
    assert compare(curve(other), curve(LOSSES), tolerance=0.11).same


def test_a_loss_that_is_no_number_is_not_the_same() -> None:
    broken = [*LOSSES[:40], math.nan, *LOSSES[41:]]
    assert not compare(curve(broken), curve(LOSSES)).same


def test_settings_that_differ_are_named() -> None:
    found = compare(curve(LOSSES, seed=1, output_dir="a"), curve(LOSSES, seed=0, output_dir="b"))
    assert found.changed == ["seed: 1 here, 0 there"]


def test_no_step_in_common() -> None:
    with pytest.raises(BadInput, match="log_every"):
        compare(curve(LOSSES[:8], 5), curve(LOSSES[:8], 4))


@pytest.mark.smoke
def test_a_run_is_kept_and_compared(tmp_path: Path, few: int, run_main) -> None:
    flags = [
        "--dataset=digits", "--model=mae_vit_micro_patch4", "--input_size=16", "--batch_size=10",
        "--epochs=3", "--warmup_epochs=1", "--num_workers=0", "--device=cpu", "--picture_every=0",
        "--blr=0.05", "--decoder_depth=1",
    ]  # fmt: skip
    main_pretrain.main([*flags, "--log_every=1", f"--output_dir={tmp_path / 'one'}"])
    main_pretrain.main([*flags, "--log_every=3", f"--output_dir={tmp_path / 'two'}"])
    main_pretrain.main([*flags, "--seed=1", f"--output_dir={tmp_path / 'other'}"])
    reference = tmp_path / "curves" / "one.json"
    code, _, err = run_main("main_tables", ["--save_curve", str(tmp_path / "one"), str(reference)])
    assert code == 0, err
    kept = json.loads(reference.read_text())
    assert kept["seed"] == 0 and kept["steps"] == list(range(1, 19))
    assert {"machine", "versions", "commit", "settings"} <= kept.keys()
    words = ["--compare", str(tmp_path / "two"), str(reference), "--tolerance=1e-5", "--window=3"]
    code, out, err = run_main("main_tables", words)
    assert code == 0, err
    assert "the same within" in out and "steps 1 to 18" in out
    words[1] = str(tmp_path / "other")
    code, out, err = run_main("main_tables", words)
    assert code == 1
    assert "they part" in out and "seed: 1 here, 0 there" in out


@pytest.mark.parametrize("name", ["demo", "fashion_mnist"])
def test_references_are_of_the_recipes(name: str) -> None:
    reference = read_curve(ROOT / "docs" / "curves" / f"{name}.json")
    changed = differences(read_recipe(RECIPES / f"{name}.yaml"), reference.settings)
    assert [text.split()[0] for text in changed] == ["log_every"]
    assert reference.steps == list(range(1, len(reference.steps) + 1))
    assert reference.losses[-1] < 0.8 * reference.losses[0]
    assert reference.origin["seed"] == 0 and "torch" in reference.origin["versions"]


def test_curves_are_drawn(tmp_path: Path) -> None:
    draw_curves([("one", curve(LOSSES)), ("two", curve(LOSSES, 4))], tmp_path / "x.svg")
    assert "<svg" in (tmp_path / "x.svg").read_text()
