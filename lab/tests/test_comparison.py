"""The comparison: stages, choice of rates and differences, by hand and on made-up results."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy import stats

import lab.comparison.command as lab_comparison
from lab.comparison.analysis import (
    STEPS,
    TIME,
    best_rate,
    compare,
    equal_images,
    list_detectable,
    make_stage,
    measure_speed,
    next_rates,
    read_comparison,
    with_rates,
)
from lab.comparison.report import PLOT, markdown
from lab.study.analysis import Finished
from lab.study.command import COMMANDS
from lab.study.effects import detectable
from util.errors import BadInput
from util.runs.plan import DONE, OF_THE_LAB, Plan, list_cells, read_plan
from util.runs.tables import show

ROOT = Path(__file__).resolve().parents[2]
PLAN = ROOT / "recipes/tables/comparison.yaml"
METHODS = ("mae", "pixio", "simmim_swin")


def small_plan(folder: Path, **changes: Any) -> Path:
    """The plan with three methods, two seeds, and other changes of its `comparison`."""
    given = yaml.safe_load(PLAN.read_text())
    arms = given["arms"]["methods"]["list"]
    wanted = [*METHODS, "untrained_vit", "untrained_pixio", "untrained_swin"]
    given["arms"]["methods"]["list"] = {arm: arms[arm] for arm in wanted}
    given["seeds"] = [700, 701, 702]
    own = given["comparison"]
    own["untrained"] = {
        f"untrained_{kind}": [method]
        for kind, method in zip(("vit", "pixio", "swin"), METHODS, strict=True)
    }
    own["pairs"] = [["pixio", "simmim_swin"]]
    own["names"] = {arm: own["names"][arm] for arm in wanted}
    own |= changes
    path = folder / "comparison.yaml"
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    return path


def plan_of(path: Path = PLAN) -> Plan:
    return read_plan(path, COMMANDS)


# ---- What is asked -----------------------------------------------------------------------------


def test_the_plan_is_what_the_issue_asks() -> None:
    plan = plan_of()
    comparison = read_comparison(plan)
    assert len(plan.seeds) == 5 and len(comparison.rates) == 5
    assert {"mae", "mmae", "mae_lscale", "simmim_vit", "simmim_swin", "pixio", "pixio_partial",
            "pixio_cross", "mae_cross"} <= comparison.methods.keys()  # fmt: skip
    assert [outcome.label for outcome in comparison.outcomes] == [
        "kNN", "linear", "fine-tuned", "PSNR",
    ]  # fmt: skip
    assert comparison.first_of("pixio_cross") == "untrained_pixio"
    # Rates are chosen on images that no pretraining has seen, and no seed serves twice.
    assert plan.given["runs"]["held_out"]["flags"]["val_fraction"] == 0.1
    assert not {comparison.rate_seed, *comparison.speed_seeds} & set(plan.seeds)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"untrained": {"untrained_vit": ["mae"]}}, "must name each method once"),
        ({"names": {"mae": "MAE"}}, "names of .* lack"),
        ({"reference": "beit"}, "unknown arm"),
        ({"speed": {"images": 8, "seeds": [700], "most": 9, "alike": 0}}, "needs fresh seeds"),
        ({"beside": ["fill", "pictures", "x"]}, "unknown run of outcome"),
        ({"outcomes": [["kNN", "knn"]]}, "expected .label, run, metric."),
        ({"steps": 3}, "unknown key"),
    ],
)
def test_bad_comparisons_are_explained(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=message):
        read_comparison(plan_of(small_plan(tmp_path, **changes)))


def test_a_stage_is_a_plan_of_its_own(tmp_path: Path) -> None:
    """With other arms, some of the runs, and what these arms have of their own."""
    plan = plan_of()
    arms = {"mae": {"method": "mae"}, "b": {"method": "pixio"}}
    given = make_stage(plan, "steps", [1, 2], arms, ["pretrain", "garments"])
    assert not given.keys() & set(OF_THE_LAB)
    path = tmp_path / "steps.yaml"
    path.write_text(yaml.safe_dump(given))
    made = plan_of(path)
    names = {f"{run}.{arm}" for run in ("pretrain", "garments") for arm in arms}
    assert set(made.runs) == names and made.seeds == (1, 2)
    swin = make_stage(
        plan, "x", [1], {"simmim_swin": {"method": "simmim"}}, ["pretrain", "garments"]
    )
    path.write_text(yaml.safe_dump(swin))
    assert plan_of(path).runs["garments.simmim_swin"].flags["mask_cell"] == 4
    assert made.runs["garments.mae"].flags["mask_cell"] == 2


# ---- Rates and time ----------------------------------------------------------------------------


def test_rates_go_on_until_the_best_lies_inside() -> None:
    tried = {"a": {1e-3: 5.0, 2e-3: 7.0, 4e-3: 6.0}, "b": {1e-3: 5.0, 2e-3: 7.0, 4e-3: 8.0},
             "c": {1e-3: 9.0, 2e-3: 7.0, 4e-3: 9.0}}  # fmt: skip
    assert [best_rate(own) for own in tried.values()] == [2e-3, 4e-3, 1e-3]
    assert next_rates(tried, 2.0) == {"b": [8e-3], "c": [5e-4]}
    many = {"a": {float(2**i): float(i) for i in range(12)}}
    with pytest.raises(BadInput, match="best rate of a lies beyond 2048"):
        next_rates(many, 2.0)


def test_each_method_gets_its_rate() -> None:
    comparison = read_comparison(plan_of())
    arms = with_rates(comparison, {"mae": [1e-3, 2e-3]})
    assert {name: flags["lr"] for name, flags in arms.items()} == {
        "mae-0.001": 1e-3, "mae-0.002": 2e-3,
    }  # fmt: skip
    assert all(flags["method"] == "mae" for flags in arms.values())


def test_equal_time_is_by_images_a_second(tmp_path: Path) -> None:
    """The median of the log lines but the first; images in whole batches."""
    lines = [{"kind": "train", "images_per_s": v} for v in (10.0, 90.0, 100.0, 140.0)]
    lines.append({"kind": "epoch", "loss": 1.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    key = ("pretrain", "mae", 3)
    found = measure_speed(Finished({key: {}}, {key: tmp_path}), "pretrain")
    assert found == {"mae": {3: 100.0}}
    assert equal_images(4800, 16, 50.0, 100.0, 10**6) == 2400
    assert equal_images(4800, 16, 33.4, 100.0, 10**6) == 1600  # 1603 in batches of 16
    assert equal_images(4800, 16, 1e9, 100.0, 54000) == 54000
    assert equal_images(4800, 16, 1e-9, 100.0, 54000) == 16


# ---- What is compared --------------------------------------------------------------------------


def test_differences_are_scipys_paired_tests() -> None:
    comparison = read_comparison(plan_of())
    values = {
        "kNN": {
            "mae": {1: 60.0, 2: 62.0, 3: 61.0},
            "pixio": {1: 63.0, 2: 64.0, 3: 65.5},
            "pixio_partial": {1: 63.5, 2: 64.5, 3: 64.5},
            "untrained_vit": {1: 50.0, 2: 51.0, 3: 52.0},
        },
        "PSNR": {"mae": {1: 16.0, 2: 17.0}, "untrained_vit": {1: 9.0, 2: 9.5}},
    }
    rows = compare(comparison, STEPS, values)
    by_pair = {(row["outcome"], *row["pair"]): row for row in rows}
    assert set(by_pair) == {
        ("kNN", "pixio", "mae"), ("kNN", "pixio_partial", "mae"), ("kNN", "pixio_partial", "pixio"),
        ("kNN", "mae", "untrained_vit"),
    }  # fmt: skip
    row = by_pair["kNN", "pixio", "mae"]
    expected = stats.ttest_rel([63.0, 64.0, 65.5], [60.0, 62.0, 61.0])
    assert row["p"] == pytest.approx(expected.pvalue) and row["mean"] == pytest.approx(9.5 / 3)
    low, high = expected.confidence_interval()
    assert (row["low"], row["high"]) == pytest.approx((low, high))
    # Two of a family: the smaller p counts twice. A pair of another kind is another family.
    p = sorted(by_pair["kNN", one, "mae"]["p"] for one in ("pixio", "pixio_partial"))
    held = sorted(by_pair["kNN", one, "mae"]["p_holm"] for one in ("pixio", "pixio_partial"))
    assert held == pytest.approx([2 * p[0], max(2 * p[0], p[1])])
    pair = by_pair["kNN", "pixio_partial", "pixio"]
    assert pair["p_holm"] == pair["p"]
    # Untrained encoders have no equal time.
    kinds = {row["kind"] for row in compare(comparison, TIME, values)}
    assert kinds == {"with MAE", "in pairs"}


def test_what_could_have_been_seen_is_found_so_often() -> None:
    """Differences of that size pass a t-test in four of five samples."""
    import numpy as np

    samples = np.random.default_rng(0).normal(0, 2.0, (4000, 5))
    size = detectable(list(map(list, samples)))
    assert size is not None
    found = stats.ttest_1samp(samples + size, 0, axis=1).pvalue < 0.05
    # By t and not by the noncentral t: a little off with five values.
    assert 0.7 < found.mean() < 0.85
    rows = [{"outcome": "kNN", "by_seed": {"1": 1.0, "2": 3.0, "3": 2.0}}]
    expected = (stats.t.ppf(0.975, 2) + stats.t.ppf(0.8, 2)) * 1.0 / 3**0.5
    assert list_detectable(rows) == {"kNN": pytest.approx(expected)}


# ---- The whole, on made-up results -------------------------------------------------------------

GAINS = {"mae": 5.0, "pixio": 9.0, "simmim_swin": 2.0}
BEST = {"mae": 1.5e-3, "pixio": 6.0e-3, "simmim_swin": 3.75e-4}
SPEEDS = {"mae": 100.0, "pixio": 50.0, "simmim_swin": 98.0}


def make_up(path: Path, output: Path, jobs: int) -> None:
    """Stands for main_tables.py: what it leaves in the folder of each cell that is not done."""
    plan = plan_of(path)
    for cell in list_cells(plan, plan.seeds, output).values():
        if (cell.folder / DONE).is_file():
            continue
        cell.folder.mkdir(parents=True)
        arm, flags = str(cell.run.copy.arm), cell.run.flags
        method = arm.partition("-")[0]
        pretrain = next(r.flags for n, r in plan.runs.items() if n == f"pretrain.{arm}")
        rate = pretrain.get("lr", 1.5e-3)
        far = abs(rate - BEST.get(method, 0)) * 1e3
        share = pretrain.get("train_images", 1) / 11200
        gain = GAINS.get(method, 0.0) * share - far + (cell.seed % 5) * 0.3
        metrics = {"top1": 60 + gain, "model_psnr": 15 + gain / 10, "mean_psnr": 14.0, "loss": 1.0}
        if cell.run.main == "main_pretrain":
            line = {"kind": "train", "images_per_s": SPEEDS.get(method, 1.0)}
            (cell.folder / "metrics.jsonl").write_text(f"{json.dumps(line)}\n" * 3)
        record = {
            "id": cell.title, "cell": cell.spec(), "metrics": metrics, "seconds": 20.0,
            "jobs": jobs, "machine": "made up",
            "commit": "c", "versions": {"v": "1"}, "finished": "now",
            "flags": {k: str(v) for k, v in flags.items()},
        }  # fmt: skip
        (cell.folder / DONE).write_text(json.dumps(record))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of made-up results, with its document."""
    folder = tmp_path_factory.mktemp("comparison")
    words = [f"--plan={small_plan(folder)}", f"--output_dir={folder / 'out'}",
             f"--docs={folder / 'docs'}", "--jobs=2"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab_comparison, "run_plan", make_up)
        lab_comparison.main(words)
    return folder


def test_the_comparison_finds_what_was_put_in(done: Path) -> None:
    report = json.loads((done / "docs/comparison.json").read_text())
    assert report["done"] == report["cells"]
    assert {arm: float(rate) for arm, rate in report["chosen"].items()} == BEST
    # The ends were left: a rate was added beyond each.
    assert "0.012" in report["rates"]["pixio"] and "0.0001875" in report["rates"]["simmim_swin"]
    assert "0.012" not in report["rates"]["mae"]
    assert report["images"]["pixio"] == 5600  # at half the speed
    found = {
        (row["stage"], row["outcome"], *row["pair"]): row["mean"] for row in report["compared"]
    }
    assert found[STEPS, "kNN", "pixio", "mae"] == pytest.approx(4.0)
    assert found[TIME, "kNN", "pixio", "mae"] == pytest.approx(4.5 - 5.0)
    assert found[STEPS, "kNN", "mae", "untrained_vit"] > 4
    # Within 5 % of MAE's speed: its equal steps stand for equal time, and were run once.
    assert found[TIME, "kNN", "simmim_swin", "mae"] == found[STEPS, "kNN", "simmim_swin", "mae"]
    assert not list((done / "out/time").glob("*/pretrain.simmim_swin"))
    for row in report["rows"]:
        for outcome in row["outcomes"].values():
            assert outcome["mean"] == pytest.approx(statistics.fmean(outcome["values"].values()))


def test_the_document_follows_from_its_numbers(done: Path) -> None:
    report = json.loads((done / "docs/comparison.json").read_text())
    text = (done / "docs/comparison.md").read_text()
    assert text == markdown(report, "pictures")
    assert (done / "docs/pictures" / PLOT).stat().st_size > 10_000
    for words in ("## At equal steps", "## At equal time", "## The rates", "Pixio (8 decoder"):
        assert words in text
    # The chosen rate of Pixio is bold.
    assert f"**{show(report['rates']['pixio']['0.006'])}**" in text


def test_the_cost_is_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By hand: each run is 20 s, of which the short pretrainings are a part."""
    began = []

    def begin(path: Path, output: Path, jobs: int) -> None:
        began.append(path.stem)
        make_up(path, output, jobs)

    monkeypatch.setattr(lab_comparison, "run_plan", begin)
    words = [f"--plan={small_plan(tmp_path)}", f"--output_dir={tmp_path / 'out'}", "--cost"]
    lab_comparison.main([*words, "--jobs=2"])
    out = capsys.readouterr().out
    assert began == ["speed", "price"] and not (tmp_path / "docs").exists()
    short = 1280
    start = {arm: max(0.0, 20 - short / speed) for arm, speed in SPEEDS.items()}
    pretrain = {arm: start[arm] + 11200 / speed for arm, speed in SPEEDS.items()}
    rates = 5 * sum(own + 20 for own in pretrain.values())
    steps = 3 * (sum(own + 80 for own in pretrain.values()) + sum(s + 80 for s in start.values()))
    equal = 3 * (start["pixio"] + 5600 / 50 + 80)
    for cost in (rates, steps, equal, rates + steps + equal):
        assert f"{cost / 60 / 2:7.1f} min" in out, out


def test_a_report_of_less_does_not_take_the_place_of_more(
    done: Path, tmp_path: Path, run_main: Any
) -> None:
    words = [f"--plan={done / 'comparison.yaml'}", "--report", f"--docs={done / 'docs'}"]
    before = (done / "docs/comparison.json").read_text()
    code, _, err = run_main("lab.comparison.command", [*words, f"--output_dir={tmp_path}"])
    assert code == 2 and "it would be lost" in err
    assert (done / "docs/comparison.json").read_text() == before
