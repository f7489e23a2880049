"""The study: its statistics against scipy, its choices by hand, its command on made-up results.

Runs are made up by writing what main_tables.py leaves in the folder of a cell.
"""

import importlib
import itertools
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from launch import PATIENCE
from scipy import stats

import lab.study.command as lab_study
from lab.study.analysis import measure_dynamics, read_study, read_training_curve, with_arms
from lab.study.effects import (
    contrast,
    contrast_signs,
    corrected,
    differences,
    estimate,
    holm,
    prediction,
)
from lab.study.rates import analyse
from lab.study.rates import markdown as rates_markdown
from lab.study.report import markdown
from models_mmae import METHODS
from util.errors import BadInput, RunFailed, Stopped
from util.runs import cell_runs
from util.runs.arms import read_arms
from util.runs.cell_runs import READERS
from util.runs.plan import list_cells, read_plan
from util.runs.tables import markdown as tables_markdown

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "lab.study.command"
STUDY = ROOT / "recipes/tables/study.yaml"
DOCS = ROOT / "docs"
TERMS = ("mask", "lscale", "offset")


# ---- Statistics --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 5, 12])
def test_estimates_are_scipys(n: int) -> None:
    values = np.random.default_rng(n).normal(0.4, 1.3, n)
    found, expected = estimate(list(values)), stats.ttest_1samp(values, 0)
    low, high = expected.confidence_interval(0.95)
    assert (found.mean, found.low, found.high, found.p, found.n) == pytest.approx(
        (values.mean(), low, high, expected.pvalue, n), rel=1e-9
    )


def test_paired_differences_are_scipys_paired_test() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=6), generator.normal(size=6)
    one, other = dict(enumerate(a)), dict(enumerate(b)) | {99: 7.0}
    found = estimate(list(differences(one, other).values()))
    assert found.p == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-9)


def test_estimates_of_few_or_equal_values() -> None:
    assert estimate([3.0]) == estimate([3.0]).__class__(3.0, None, None, None, 1)
    assert estimate([2.0, 2.0]).p == 0.0 and estimate([0.0, 0.0]).p == 1.0
    assert prediction([1.0]) is None
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_prediction_intervals_hold_one_more_value_as_often_as_they_say() -> None:
    generator = np.random.default_rng(1)
    inside = 0
    for _ in range(2000):
        *values, one_more = generator.normal(5, 2, 6).tolist()
        low, high = prediction(values)
        inside += low <= one_more <= high
    assert inside / 2000 == pytest.approx(0.95, abs=0.02)  # 4 standard errors of a share of 2000


def test_holm_is_by_hand() -> None:
    # Sorted .01 .02 .03 .04: times 4, 3, 2, 1, and never below one before.
    assert holm([0.04, 0.01, 0.03, None, 0.02]) == pytest.approx([0.06, 0.04, 0.06, None, 0.06])
    assert holm([0.9, 0.5]) == [1.0, 1.0]
    assert holm([]) == []
    rows = [{"family": f, "p": p} for f, p in (("a", 0.01), ("b", 0.02), ("a", 0.5))]
    assert [row["p_holm"] for row in corrected(rows)] == [0.02, 0.02, 0.5]


def test_contrasts_are_the_coefficients_of_least_squares() -> None:
    """In a full factorial the effects are twice the coefficients of +-1 columns."""
    generator = np.random.default_rng(2)
    factors = {name: {"off": {}, "on": {}} for name in TERMS}
    levels = read_arms({"f": {"factors": factors}}, Path("x"))["f"].levels
    values = {arm: {s: float(generator.normal()) for s in (3, 4)} for arm in levels}
    columns = {
        c: [math.prod(1 if levels[arm][f] == "on" else -1 for f in c) for arm in levels]
        for size in range(4)
        for c in itertools.combinations(TERMS, size)
    }
    design = np.array(list(columns.values()), dtype=float).T
    for seed in (3, 4):
        y = [values[arm][seed] for arm in levels]
        fitted = dict(zip(columns, np.linalg.lstsq(design, y, rcond=None)[0], strict=True))
        for term in [c for c in columns if c]:
            found = contrast(values, contrast_signs(levels, term))
            assert found[seed] == pytest.approx(2 * fitted[term], rel=1e-9)
    del values[next(iter(levels))][3]  # a seed that not all arms have is left out
    assert list(contrast(values, contrast_signs(levels, ("mask",)))) == [4]


def test_dynamics_are_by_hand(tmp_path: Path) -> None:
    records = [{"kind": "epoch", "step": 4, "loss": 9.0}]
    losses, norms = [4.0, 3.0, 2.0, 1.0], [100.0, 10.0, 1.0, math.e]
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        records.append({"kind": "train", "step": step, "loss": loss, "grad_norm": norm})
    records.append({"kind": "train", "step": 9, "loss": "nan", "grad_norm": "nan"})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    curve = read_training_curve(tmp_path)
    assert len(curve) == 4 and measure_dynamics(curve[:3]) == {}
    expected = (2.5, 1.0, 0.5 / math.log(10), 0.5, 100 / np.median([1, math.e]))
    assert tuple(measure_dynamics(curve).values()) == pytest.approx(expected)


# ---- Plans with arms ---------------------------------------------------------------------------


def test_the_study_is_what_the_issue_asks() -> None:
    plan = read_plan(STUDY, READERS)
    study = read_study(plan)
    factorial = plan.arms[study.factorial]
    assert len(factorial.arms) == 8 and len(factorial.seeds) >= 5
    on = factorial.arms["mask_on-lscale_on-offset_on"]
    off = factorial.arms["mask_off-lscale_off-offset_off"]
    for name in ("mask", "lscale_init", "pos_offset"):
        assert off[name] == (METHODS["mae"][name] or "none")
    settings = plan.arms[study.settings]
    assert on | {"method": "mmae"} == settings.arms["base"]
    assert settings.arms["base"].keys() == {"method", *METHODS["mmae"]}  # all of it is spelt out
    varied = list(settings.varied.values())
    values = {name: {value, *(v for n, v in varied if n == name)} for name, value in on.items()}
    assert values["lscale_init"] == {0.01, 0.1, 0.5, 1.0}
    # What --method mmae presets was measured, and has all three terms.
    for name, value in METHODS["mmae"].items():
        assert value in values[name]
    assert METHODS["mmae"]["mask"] == "mixed" and METHODS["mmae"]["lscale_init"]
    assert METHODS["mmae"]["pos_offset"] != "none"
    assert {name for name, _ in varied} == {
        "avg_share", "avg_order", "avg_temperature", "lscale_init", "pos_offset",
    }  # fmt: skip
    assert ("pos_offset", "jitter") in varied
    cells = list_cells(plan, plan.seeds, Path("out"))
    per_row = 5  # a pretraining and four measurements
    assert len(cells) == per_row * (8 * 5 + len(plan.arms[study.settings].arms))
    words = cells["seed-3/linear.mask_on-lscale_off-offset_on"].words(ROOT)
    parent = "out/seed-3/pretrain.mask_on-lscale_off-offset_on"
    assert f"--finetune={parent}/checkpoint-last.pth" in words
    # At a seed that the plan does not name every row is made.
    assert len(list_cells(plan, [7], Path("out"))) == per_row * (8 + len(varied) + 1)


@pytest.mark.parametrize("main", ["main_pretrain", "main_finetune", "main_knn", "main_visualize"])
def test_flags_of_the_study_are_known(main: str) -> None:
    """Every run's words parse, with the flags of its arm."""
    module = importlib.import_module(main)
    plan = read_plan(STUDY, READERS)
    for cell in list_cells(plan, [0], Path("out")).values():
        if cell.run.main == main:
            module.build_parser().parse(cell.words(ROOT)[1:])


def make_plan_file(tmp_path: Path, **changes: Any) -> Path:
    given = {
        "seeds": [0],
        "arms": {"a": {"seeds": [1, 2], "list": {"x": {"lr": 1}, "y": {"lr": 2}}}},
        "runs": {
            "p": {"main": "main_pretrain", "arms": "a", "flags": {"seed": "{seed}", "lr": 0}},
            "k": {"main": "main_knn", "of": "p", "flags": {"checkpoint": "{run:p}/c"}},
        },
        "tables": [{"title": "t", "rows": [["of {arm}", "k", "top1"]]}],
    }  # fmt: skip
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(given | changes, sort_keys=False))
    return path


def test_arms_make_runs_and_rows(tmp_path: Path) -> None:
    plan = read_plan(make_plan_file(tmp_path), READERS)
    assert list(plan.runs) == ["p.x", "p.y", "k.x", "k.y"] and plan.seeds == (0, 1, 2)
    assert plan.runs["p.y"].flags["lr"] == 2 and plan.runs["k.y"].needs == ("p.y",)
    assert [(row.label, row.run) for row in plan.tables[0].rows] == [
        ("of x", "k.x"),
        ("of y", "k.y"),
    ]
    assert len(list_cells(plan, plan.seeds, tmp_path)) == 8
    other = with_arms(plan, "z", [9], {"w": {"lr": 5}})
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other, sort_keys=False))
    again = read_plan(tmp_path / "other.yaml", READERS)
    assert list(again.runs) == ["p.w", "k.w"] and again.seeds == (9,)


BAD = {
    "no form": ({"arms": {"a": {"seeds": [1]}}}, "factors, or base and vary, or list"),
    "two forms": ({"arms": {"a": {"list": {"x": {}}, "factors": {}}}}, "factors, or base"),
    "unknown set": (
        {"runs": {"p": {"main": "main_knn", "arms": "aa", "flags": {"seed": "{seed}"}}}},
        "did you mean a?",
    ),
    "no parent": ({"runs": {"k": {"main": "main_knn", "of": "p"}}}, "unknown run with arms"),
    "name": ({"arms": {"a": {"list": {"x/y": {}}}}}, "letters"),
    "twice": ({"arms": {"a": {"list": {"x": {}}}, "b": {"list": {"x": {}}}}, "runs": {
        "p": {"main": "main_knn", "arms": ["a", "b"], "flags": {"seed": "{seed}"}}}}, "twice"),
    "seeds": ({"arms": {"a": {"seeds": [1, 1], "list": {"x": {}}}}}, "different whole numbers"),
    "vary": ({"arms": {"a": {"base": {}, "vary": {"lr": 3}}}}, "list of values"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arms_are_explained(case: str, tmp_path: Path) -> None:
    changes, message = BAD[case]
    with pytest.raises(BadInput, match=message.replace("?", r"\?")):
        read_plan(make_plan_file(tmp_path, **changes), READERS)


def test_a_run_needs_its_needs_at_its_seeds(tmp_path: Path) -> None:
    runs = yaml.safe_load(make_plan_file(tmp_path).read_text())["runs"]
    runs["all"] = {"main": "main_knn", "flags": {"seed": "{seed}"}, "after": ["p.x"]}
    with pytest.raises(BadInput, match=r"not run at its seeds 0"):
        read_plan(make_plan_file(tmp_path, runs=runs), READERS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factorial": "settings"}, "each off and on"),
        ({"pretrain": "pretrained"}, "did you mean pretrain?"),
        ({"outcomes": {"other": []}}, "accuracy"),
        ({"outcomes": {"accuracy": [["a", "knn"]]}}, "label, run, metric"),
        ({"confirm": {"seeds": [100, 101]}}, "needs new seeds"),
        ({"confirm": {"seeds": [7], "never": ["pos_offset_non"]}}, "did you mean pos_offset_none?"),
    ],
)
def test_bad_studies_are_explained(change: dict, message: str, tmp_path: Path) -> None:
    given = yaml.safe_load(STUDY.read_text())
    given["study"] |= change
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    with pytest.raises(BadInput, match=message.replace("?", r"\?")):
        read_study(read_plan(tmp_path / "plan.yaml", READERS))


# ---- The command -------------------------------------------------------------------------------

EFFECT = {"mask": -1.0, "lscale": 0.5, "offset": 0.0}


def truth(flags: list[str], seed: int, noise: np.random.Generator) -> dict[str, float]:
    """Made-up results: what each term and setting is worth, a seed's own part, a little noise."""
    given = dict(word[2:].split("=", 1) for word in flags if "=" in word)
    top1 = 80 + 3 * math.sin(seed) + noise.normal(0, 0.05)
    if given.get("mask", "mixed" if given.get("method") == "mmae" else "random") == "mixed":
        top1 += EFFECT["mask"]
    if given.get("lscale_init", "0.1" if given.get("method") == "mmae" else "none") != "none":
        top1 += EFFECT["lscale"]
    top1 += {"0.25": 1.0, "0.75": 0.4}.get(given.get("avg_share", ""), 0.0)
    top1 += {"jitter": 2.0}.get(given.get("pos_offset", ""), 0.0)
    if seed == 100 and given.get("pos_offset") == "none":  # best where settings are screened
        top1 += 5
    return {"top1": top1, "model_psnr": 15 + top1 / 100, "model_ssim": 0.5}


def made_up(path: Path, output: Path, jobs: int) -> None:
    """In the place of main_tables.py: a record for each cell, by the flags of its pretraining."""
    plan = read_plan(Path(path), READERS)
    cells = list_cells(plan, plan.seeds, Path(output))
    noise = np.random.default_rng(0)
    for cell in cells.values():
        parent = cells.get(f"seed-{cell.seed}/pretrain.{cell.run.copy.arm}", cell)
        metrics = truth(parent.words(ROOT), cell.seed, noise)
        record = {
            "id": "0", "cell": cell.spec(), "made_from": {}, "seconds": 36.0, "starts": 1,
            "cores": 2, "jobs": jobs, "versions": {"torch": "2"}, "machine": "made up",
            "commit": "abc", "finished": "2026-11-22", "metrics": metrics,
        }  # fmt: skip
        cell.folder.mkdir(parents=True)
        (cell.folder / "done.json").write_text(json.dumps(record))
        lines = [
            {"kind": "train", "step": 4 * i, "loss": 1 / (1 + i) + metrics["top1"] / 1000,
             "grad_norm": 2.0 + (i % 2)}
            for i in range(20)
        ]  # fmt: skip
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (cell.folder / "metrics.jsonl").write_text(text)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that is done, with results that are made up; `docs` and `out` in it."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab_study, "run_plan", made_up)
        lab_study.main([f"--plan={STUDY}", f"--output_dir={folder / 'out'}",
                         f"--docs={folder / 'docs'}"])  # fmt: skip
    return folder


def test_the_study_finds_what_was_put_in(done: Path) -> None:
    report = json.loads((done / "docs" / "study.json").read_text())
    assert report["done"] == report["cells"]
    mains = {
        (e["factors"][0], e["outcome"]): e for e in report["effects"] if len(e["factors"]) == 1
    }
    for term, size in EFFECT.items():
        for outcome in ("linear", "kNN", "fine-tuned"):
            effect = mains[term, outcome]
            assert effect["n"] == 5 and effect["mean"] == pytest.approx(size, abs=0.1)
            assert effect["low"] < effect["mean"] < effect["high"]
            # The seeds' own part, sin(seed) * 3, would drown all of it if it were not paired.
            assert effect["high"] - effect["low"] < 0.3
            assert (effect["p_holm"] < 0.05) == (size != 0)
            assert effect["p_holm"] >= effect["p"]
            by_seed = list(effect["by_seed"].values())
            assert effect["p"] == pytest.approx(stats.ttest_1samp(by_seed, 0).pvalue, rel=1e-6)
    interactions = [e for e in report["effects"] if len(e["factors"]) > 1]
    assert len(interactions) == 4 * 7 and all(abs(e["mean"]) < 0.2 for e in interactions)
    # Losses under different masks are not compared.
    factors = {tuple(e["factors"]) for e in report["training"]["effects"]}
    assert factors == {("lscale",), ("offset",)}
    assert len(report["training"]["curves"]) == 8
    loss = [e for e in report["training"]["effects"] if e["outcome"].startswith("loss, last")]
    assert next(e for e in loss if e["factors"] == ["lscale"])["mean"] > 0

    # The screening chooses the two that were made good; new seeds confirm the better one, and both.
    assert set(report["screening"]["best"].items()) >= {
        ("avg_share", "avg_share_0.25"), ("pos_offset", "pos_offset_jitter"),
    }  # fmt: skip
    plan = yaml.safe_load((done / "out" / "confirm.yaml").read_text())
    arms = plan["arms"]["confirm"]
    assert arms["seeds"] == [200, 201, 202, 203]
    assert report["screening"]["gains"]["pos_offset_none"] > 4  # and yet never to be chosen
    expected = {"mae", "base", "all_best", "pos_offset_jitter", "avg_share_0.25"}
    assert expected == set(arms["list"])
    assert (
        arms["list"]["all_best"] | {"avg_share": 0.25, "pos_offset": "jitter"}
        == (arms["list"]["all_best"])
    )
    gains = {(r["arm"], r["outcome"]): r for r in report["confirmed"]}
    assert gains["all_best", "linear"]["mean"] == pytest.approx(3.0, abs=0.3)
    assert gains["pos_offset_jitter", "kNN"]["p_holm"] < 0.05
    row = next(r for r in report["rows"] if r["row"] == "confirm/mae")
    values = list(row["outcomes"]["linear"]["values"].values())
    assert row["outcomes"]["linear"]["one_more"] == pytest.approx(prediction(values))


def test_the_document_shows_it_all(done: Path) -> None:
    text = (done / "docs" / "study.md").read_text()
    for title in ("In short", "The factorial", "Main effects", "Interactions", "Training dynamics",
                  "Settings, screened", "Settings, confirmed on new seeds"):  # fmt: skip
        assert f"## {title}" in text
    assert re.search(r"^\| mask \| linear \| -(1\.0|0\.9)\d+ \| .* \| lowers \|$", text, re.M)
    assert re.search(r"^\| offset \| kNN \| .* \| not shown \|$", text, re.M)
    short = text.split("## In short")[1].split("##")[0]
    assert re.search(r"\*\*mask\*\* lowers linear \(-[\d.]+\), kNN .*fine-tuned", short)
    assert re.search(r"\*\*lscale\*\* raises linear \(\+0\.[45]\d*\)", short)
    assert "**offset** brings nothing that could be shown here." in short
    assert re.search(r"`all_best`, against the base on new seeds, raises linear", short)
    for picture in re.findall(r"\]\((pictures/[\w-]+\.png)\)", text):
        assert (done / "docs" / picture).read_bytes().startswith(b"\x89PNG")
    assert text.count("](pictures/") == 2
    # What is written depends on what is done alone.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab_study, "run_plan", None)
        lab_study.main([f"--plan={STUDY}", f"--output_dir={done / 'out'}", "--report",
                         f"--docs={done / 'docs2'}"])  # fmt: skip
    assert (done / "docs2" / "study.md").read_text() == text


# ---- What docs/ holds --------------------------------------------------------------------------


def test_the_study_in_docs_follows_from_its_numbers(tmp_path: Path) -> None:
    """And says what was changed on the way; `--from_docs` writes the same."""
    report, text = json.loads((DOCS / "study.json").read_text()), (DOCS / "study.md").read_text()
    rates = DOCS / lab_study.RATES
    assert rates.is_file()
    remarks = list(read_study(read_plan(STUDY, lab_study.COMMANDS)).remarks)
    assert len(remarks) >= 5 and report["remarks"] == remarks
    assert markdown(report, "pictures", json.loads(rates.read_text())) == text
    assert "72.49" in text and round(report["screening"]["scores"]["pos_offset_none"], 2) == 72.49
    copy = tmp_path / "docs"
    copy.mkdir()
    for name in ("study.json", lab_study.RATES):
        if (DOCS / name).is_file():
            (copy / name).parent.mkdir(exist_ok=True)
            (copy / name).write_bytes((DOCS / name).read_bytes())
    lab_study.main(["--from_docs", f"--docs={copy}", f"--plan={STUDY}"])
    assert (copy / "study.md").read_text() == text


def test_tables_in_docs_follow_from_their_numbers() -> None:
    """Each printed number is a mean or a deviation of values that are kept by seed."""
    paths = sorted((DOCS / "results").glob("*.json"))
    # The numbers of the study and of the comparison are on pages of their own.
    plans = {path.stem for path in STUDY.parent.glob("*.yaml")} - {STUDY.stem, "comparison"}
    assert {path.stem for path in paths} == plans
    for path in paths:
        report = json.loads(path.read_text())
        assert path.with_suffix(".md").read_text() == tables_markdown(report)
        assert report["command"].startswith("python main_tables.py --plan recipes/tables/")
        assert report["commit"] and report["done"] == report["cells"]
        for row in (row for table in report["tables"] for row in table["rows"]):
            for metric in row["metrics"].values():
                values = list(metric["values"].values())
                assert metric["mean"] == pytest.approx(statistics.fmean(values))
                deviation = statistics.stdev(values) if len(values) > 1 else None
                assert metric["deviation"] == pytest.approx(deviation)


def printed(metric: dict[str, Any]) -> str:
    """Mean and deviation as the page prints them: 81.29 ± .57."""
    return f"{metric['mean']:.2f} ± {metric['deviation']:.2f}".replace("± 0.", "± .")


def rows_in(name: str) -> Iterator[dict[str, Any]]:
    """Rows of all tables of a finished plan."""
    for table in json.loads((DOCS / "results" / f"{name}.json").read_text())["tables"]:
        yield from table["rows"]


def test_the_page_of_results_prints_what_the_tables_hold() -> None:
    """Each row by its name, with the means and deviations of its values by seed."""
    page = (DOCS / "results.md").read_text().replace("*", "")
    for row in rows_in("garments"):
        values = [printed(row["metrics"][k]) for k in ("miou", "pixel_accuracy", "class_accuracy")]
        assert f"| {' | '.join(values)} |" in page, row["label"]
    by_blocks = []
    for row in rows_in("fashion_mnist"):
        value = printed(row["metrics"]["top1"])
        if row["label"].startswith("K = "):
            by_blocks.append(value)
        else:
            assert f"| {row['label']} | {value} |" in page
    assert len(by_blocks) == 6 and f"| top-1 | {' | '.join(by_blocks)} |" in page
    cross = {row["run"]: printed(row["metrics"]["top1"]) for row in rows_in("cross")}
    names = {"full": "MAE's decoder", "cross": "`--decoder cross --predict_ratio .34`"}
    for decoder, name in names.items():
        values = f"{cross[f'linear_{decoder}']} | {cross[f'knn_{decoder}']}"
        assert f"| {name} | {values} |" in page, name


def test_the_same_run_of_two_plans_gives_the_same_digits() -> None:
    """MAE's pretraining stands in both; each plan ran its own."""
    one, two = ({r["run"]: r["metrics"] for r in rows_in(n)} for n in ("fashion_mnist", "cross"))
    assert one["linear_mae"] == two["linear_full"] and one["knn_mae"] == two["knn_full"]


def made_up_rates(gains: dict[tuple[str, str], float]) -> dict:
    """Tables as main_tables.py writes them: 5 seeds, values 70 + a gain + something of the seed."""
    rates = ("3e-3", "1.2e-2")
    rows = []
    for run, metric in (("held_out", "top1"), ("test", "top1"), ("pretrain", "model_psnr")):
        for scale in ("none", "lscale", "control"):
            for rate in rates:
                # Test images would choose another rate.
                gain = gains[scale, rate] * (-1 if run == "test" and scale == "none" else 1)
                values = {
                    str(s): 70 + gain + math.sin(s) + 0.01 * ((3 * s + len(scale)) % 4)
                    for s in range(5)
                }
                name = f"{run}.scale_{scale}-blr_{rate}"
                rows.append({"run": name, "metrics": {metric: {"values": values}}})
    where = {"machine": ["m"], "commit": ["c"], "finished": "f", "plan": "lscale_lr.yaml"}
    return {"tables": [{"rows": rows}], "done": 90, "seconds": 9.0, "seeds": [*range(5)], **where}


def test_rates_are_chosen_on_held_out_images() -> None:
    gains = dict.fromkeys(itertools.product(("none", "lscale", "control"), ("3e-3", "1.2e-2")), 0.0)
    gains |= {("none", "3e-3"): 2.0, ("lscale", "1.2e-2"): 6.0, ("control", "1.2e-2"): 1.0}
    report = made_up_rates(gains)
    found = analyse(report)
    assert found["chosen"] == {"none": "3e-3", "lscale": "1.2e-2", "control": "1.2e-2"}
    own = {row["pair"]: row for row in found["own_rate"]}
    # The seeds' own part would drown it if it were not paired.
    assert own["lscale", "none"]["mean"] == pytest.approx(6 - -2, abs=0.02)
    assert own["lscale", "control"]["mean"] == pytest.approx(5, abs=0.02)
    at = {row["pair"]: row for row in found["study_rate"]}
    assert at["lscale", "none"]["mean"] == pytest.approx(6, abs=0.02)
    assert at["control", "none"]["mean"] == pytest.approx(1, abs=0.02)
    for rows in (found["own_rate"], found["study_rate"]):
        assert [r["p_holm"] for r in rows] == pytest.approx(holm([r["p"] for r in rows]))
    text = "\n".join(rates_markdown(report))
    assert "| MAE with LScale from .1 | " in text and "**76" in text
    assert "| each at its own rate | MAE with LScale from .1 − MAE | +" in text


def test_a_row_again_is_compared_with_its_interval(done: Path, run_main, monkeypatch) -> None:
    monkeypatch.setattr(lab_study, "run_plan", made_up)
    words = [f"--plan={STUDY}", f"--output_dir={done / 'out2'}", f"--docs={done / 'docs'}"]
    before = (done / "docs" / "study.json").read_bytes()
    code, out, err = run_main(COMMAND, [*words, "--only=confirm/all_best", "--seeds", "201"])
    assert code == 0, err
    assert re.search(r"^linear +seed 201: .*; one more run: .*, inside$", out, re.M)
    assert re.search(r"^\d of 7 inside their 95 % intervals", out, re.M)
    again = done / "out2" / "again" / "confirm" / "all_best"
    assert yaml.safe_load((again / "plan.yaml").read_text())["seeds"] == [201]
    assert (done / "docs" / "study.json").read_bytes() == before
    code, out, err = run_main(COMMAND, [*words, "--only=settings/avg_order_low"])
    assert code == 0 and "nothing to compare with" in out, err
    code, _, err = run_main(COMMAND, [*words, "--only=factorial/mask_on"])
    assert code == 2 and "is no row of the study" in err
    code, _, err = run_main(COMMAND, [*words, "--seeds", "3"])
    assert code == 2 and "--only" in err


def test_a_study_that_has_hardly_begun_is_reported(tmp_path: Path, run_main) -> None:
    words = [f"--plan={STUDY}", f"--output_dir={tmp_path / 'out'}", f"--docs={tmp_path / 'docs'}"]
    code, _, err = run_main(COMMAND, [*words, "--report"])
    assert code == 0, err
    assert "0 of " in (tmp_path / "docs" / "study.md").read_text()


def test_a_report_of_less_does_not_take_the_place_of_more(tmp_path: Path, run_main) -> None:
    """A fresh clone has the document and none of its runs."""
    docs = tmp_path / "docs"
    shutil.copytree(DOCS, docs)
    before = {path: path.read_bytes() for path in docs.rglob("*") if path.is_file()}
    words = [f"--plan={STUDY}", f"--output_dir={tmp_path / 'out'}", f"--docs={docs}", "--report"]
    code, _, err = run_main(COMMAND, words)
    assert code == 2 and "0 finished runs" in err and "is of 375" in err
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize(
    ("code", "error"), [(75, Stopped), (2, BadInput), (1, RunFailed), (-9, RunFailed)]
)
def test_how_the_runs_end_is_how_the_study_ends(
    code: int, error: type, tmp_path: Path, monkeypatch
) -> None:
    child = f"import os, sys\nos.kill(os.getpid(), 9) if {code} < 0 else sys.exit({code})\n"
    (tmp_path / "main_tables.py").write_text(child)
    monkeypatch.setattr(lab_study, "ROOT", tmp_path)
    with pytest.raises(error):
        lab_study.run_plan(tmp_path / "p.yaml", tmp_path / "out", 1)


@pytest.mark.smoke
def test_signals_reach_the_runs(tmp_path: Path) -> None:
    """SIGTERM to the study is SIGTERM to main_tables.py, and the study leaves as it does: 75."""
    (tmp_path / "main_tables.py").write_text(
        "import signal, sys, time\nfrom pathlib import Path\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        f"Path({str(tmp_path / 'up')!r}).touch()\ntime.sleep(900)\n"
    )
    program = (
        "import sys, threading, time, os, signal\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(ROOT)!r})\nimport lab.study.command as lab_study\n"
        f"lab_study.ROOT = Path({str(tmp_path)!r})\n"
        "def kill():\n"
        f"    while not Path({str(tmp_path / 'up')!r}).exists(): time.sleep(.05)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "threading.Thread(target=kill, daemon=True).start()\n"
        f"lab_study.main(['--plan={STUDY}', '--output_dir={tmp_path / 'out'}'])\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=PATIENCE)
    assert ended.returncode == 75, ended.stderr


class Called:
    """In the place of a process: the command's main is called; seven interpreters take 25 s.

    That processes are started, stopped and waited for is test_tables.py's matter, and above.
    """

    pid = -1

    def __init__(self, words: list[str], **rest: Any) -> None:
        program, *flags = words[1:]
        importlib.import_module(Path(program).stem).main(flags)
        self.returncode = 0

    def poll(self) -> int:
        return self.returncode

    def wait(self) -> int:
        return self.returncode


@pytest.mark.smoke
def test_a_tiny_row_runs_through(tmp_path: Path, run_main, monkeypatch) -> None:
    """Every command of a row, with its flags; numbers as small as they can be."""
    monkeypatch.chdir(ROOT)  # where commands are started
    monkeypatch.setattr(cell_runs.subprocess, "Popen", Called)
    monkeypatch.setattr(cell_runs, "commit", lambda: "unknown")  # needs processes of its own
    given = yaml.safe_load(STUDY.read_text())
    tiny = {
        "main_pretrain": {"dataset": "digits", "input_size": 16, "eval_images": 8,
                          "batch_size": 750, "decoder_depth": 1},
        "main_finetune": {"dataset": "digits", "train_images": 64},
        "main_knn": {"dataset": "digits", "train_images": 64, "k": 3},
        "main_visualize": {"dataset": "digits", "num_images": 8},
    }  # fmt: skip
    for main, flags in tiny.items():
        given["defaults"][main] |= flags
    for name in ("linear", "finetune"):
        given["runs"][name]["flags"] |= {"epochs": 1, "warmup_epochs": 0, "batch_size": 32}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    row = "factorial/mask_on-lscale_on-offset_on"
    code, out, err = run_main(COMMAND, [
        f"--plan={tmp_path / 'tiny.yaml'}", f"--output_dir={tmp_path / 'out'}", "--jobs=1",
        f"--docs={tmp_path / 'docs'}", f"--only={row}",
    ])  # fmt: skip
    assert code == 0, err + out
    for label in ("linear", "kNN", "fine-tuned", "PSNR garments", "SSIM photographs"):
        assert re.search(rf"^{label} +seed 0: \d", out, re.M), out
