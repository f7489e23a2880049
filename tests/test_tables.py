"""main_tables.py: cells run once, stopped and gone on with, and what the tables say of them.

Most tests run a stand-in for main_finetune that takes milliseconds: what it does is in its flags.
"""

import json
import os
import re
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from launch import TINY, steps_done, until
from runs import records

import main_tables
from util.errors import BadInput
from util.runs import cell_runs
from util.runs.plan import list_cells, read_plan
from util.runs.tables import mean_and_deviation, show
from util.train.lease import NAME, acquire

ROOT = Path(__file__).resolve().parent.parent

FAKE = """
import json, os, signal, sys, time
from pathlib import Path

flags = dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)
out = Path(flags["output_dir"])
starts = out.parent.parent / "order.txt"
with starts.open("a") as file:
    file.write(f"{out.parent.name}/{out.name}\\n")
if "meet" in flags:  # wait for the other of the two
    (out / "here").touch()
    other = out.parent / flags["meet"] / "here"
    deadline = time.monotonic() + 600
    while not other.exists():
        assert time.monotonic() < deadline, "the other never came"
        time.sleep(0.01)
if "alone" in flags:  # fail if another is at work
    handle = os.open(out.parent / "alone", os.O_CREAT | os.O_EXCL)
    time.sleep(0.05)
    (out.parent / "alone").unlink()
if "stop" in flags and not (out / "half").exists():
    def leave(number, frame):
        (out / "half").touch()
        sys.exit(75)
    signal.signal(signal.SIGTERM, leave)
    if flags["stop"] == "us":
        os.kill(os.getppid(), signal.SIGTERM)
    if flags["stop"] == "itself":
        sys.exit(75)
    if flags["stop"] == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(0.5)
        os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)
if flags.get("code", "0") != "0" and not (out.parent.parent / "mended").exists():
    print("loading\\nerror: no such thing\\n 50% of a bar\\n")
    sys.exit(int(flags["code"]))
if flags.get("crash"):
    os.kill(os.getpid(), signal.SIGKILL)
if flags.get("silent") is None:
    seed = int(flags.get("seed", 0))
    result = {"top1": 90 + seed * float(flags.get("slope", 1)), "loss": 0.5, "model": "fake",
              "threads": int(os.environ["OMP_NUM_THREADS"])}
    (out / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with nothing but the stand-in."""
    root = tmp_path / "repository"
    root.mkdir()
    (root / "main_finetune.py").write_text(FAKE)
    monkeypatch.setattr(cell_runs, "ROOT", root)
    monkeypatch.setattr(cell_runs, "POLL", 0.01)
    return root


def write_plan(path: Path, runs: dict, rows: list | None = None, **rest: object) -> list[str]:
    """A plan of stand-ins (name to flags, `after` among them) and the words that run it."""
    entries = {}
    for name, flags in runs.items():
        entry = {"main": "main_finetune", "flags": {k: v for k, v in flags.items() if k != "after"}}
        entries[name] = entry | ({"after": flags["after"]} if "after" in flags else {})
    rows = rows or [[name, name, "top1"] for name in runs]
    plan = {"seeds": [0], "defaults": {"main_finetune": {"seed": "{seed}"}}, "runs": entries}
    plan |= {"tables": [{"title": "Accuracy", "rows": rows}], **rest}
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    return [f"--plan={path}", f"--output_dir={path.parent / 'out'}"]


def started(tmp_path: Path) -> list[str]:
    return (tmp_path / "out" / "order.txt").read_text().split()


def done(tmp_path: Path, title: str) -> dict:
    return json.loads((tmp_path / "out" / title / "done.json").read_text())


# ---- Running -----------------------------------------------------------------------------------


def test_cells_run_once_and_tables_hold_mean_and_deviation(tmp_path, fake, run_main) -> None:
    runs = {
        "b": {"slope": 0.7, "from": "{run:a}/weights", "silent": False, "empty": None},
        "a": {"slope": 2.5, "loud": True},
    }
    rows = [["after | a", "b", "top1"], ["a", "a", "top1", "loss"]]
    words = write_plan(tmp_path / "plan.yaml", runs, rows, seeds=[0, 1, 3])
    code, out, err = run_main("main_tables", words)
    assert code == 0, err
    # Seed after seed; what is read comes before what reads it.
    assert started(tmp_path) == [f"seed-{s}/{name}" for s in (0, 1, 3) for name in "ab"]
    record = done(tmp_path, "seed-3/b")
    expected = ["python", "main_finetune.py", "--seed=3", "--slope=0.7"]
    expected += [f"--from={tmp_path}/out/seed-3/a/weights", f"--output_dir={tmp_path}/out/seed-3/b"]
    assert shlex.split(record["command"]) == expected
    assert "--loud" in shlex.split(done(tmp_path, "seed-0/a")["command"])
    assert record["metrics"] == {"top1": 92.1, "loss": 0.5, "threads": cell_runs.cores()}
    assert record["starts"] == 1 and 0 < record["seconds"] < 30
    assert record["versions"].keys() == {"python", "torch", "timm"} and record["cores"] >= 1

    report = json.loads((tmp_path / "out" / "tables.json").read_text())
    row_b, row_a = report["tables"][0]["rows"]
    values = [90.0, 90.7, 92.1]
    top1 = row_b["metrics"]["top1"]
    assert list(top1["values"].values()) == pytest.approx(values, abs=1e-12)
    assert top1["mean"] == pytest.approx(np.mean(values), rel=1e-12)
    assert top1["deviation"] == pytest.approx(np.std(values, ddof=1), rel=1e-12)
    cost = {t: done(tmp_path, t)["seconds"] for t in started(tmp_path)}
    mean_a, mean_b = (np.mean([cost[f"seed-{s}/{x}"] for s in (0, 1, 3)]) for x in "ab")
    assert row_a["seconds"] == pytest.approx(mean_a) == row_a["seconds_with_needs"]
    assert row_b["seconds_with_needs"] == pytest.approx(mean_a + mean_b)
    assert report["seconds"] == pytest.approx(sum(cost.values()))

    text = (tmp_path / "out" / "tables.md").read_text()
    assert text in out
    assert re.search(r"^\| after \\\| a \| 90\.93 ± 1\.07 \|  \| 3 \| \d+ \| \d+ \|$", text, re.M)
    assert re.search(r"^\| a \| 93\.33 ± 3\.82 \| 0\.5000 ± 0\.0000 \| 3 \| ", text, re.M)
    header = text.splitlines()[0]
    for part in ("6 of 6 runs", f"{cell_runs.cores()} cores", "torch ", "timm ", "commit "):
        assert part in header

    # Nothing is left to do, and the tables come out the same.
    code, out, err = run_main("main_tables", words)
    assert code == 0 and len(started(tmp_path)) == 6 and text in out

    # A run that two commits made, one of them known from the other runs.
    file = tmp_path / "out" / "seed-3" / "b" / "done.json"
    file.write_text(json.dumps(record | {"commit": f"{record['commit']}; abcdef"}))
    code, _, err = run_main("main_tables", words)
    assert code == 0 and len(started(tmp_path)) == 6, err
    report = json.loads((tmp_path / "out" / "tables.json").read_text())
    assert report["commit"] == [record["commit"], "abcdef"]


def test_only_some_runs_or_seeds_leave_the_rest_missing(tmp_path, fake, run_main) -> None:
    runs = {"a": {}, "b_1": {"x": "{run:a}"}, "b_2": {"x": "{run:a}"}, "c": {}}
    words = write_plan(tmp_path / "plan.yaml", runs, seeds=[0, 1])
    code, out, err = run_main("main_tables", [*words, "--only", "b_*", "--seeds", "1"])
    assert code == 0, err
    assert started(tmp_path) == ["seed-1/a", "seed-1/b_1", "seed-1/b_2"]
    assert re.search(r"^\| b_1 \| 91\.00 \| 1 \(1 missing\) \| \d+ \| \d+ \|$", out, re.M)
    assert "| c | - | 0 (2 missing) | - | - |" in out
    code, out, err = run_main("main_tables", [*words, "--only", "seed-0/a", "c"])
    assert code == 0, err
    assert started(tmp_path)[3:] == ["seed-0/a", "seed-0/c", "seed-1/c"]
    code, out, _ = run_main("main_tables", [*words, "--list"])
    assert code == 0 and len(started(tmp_path)) == 6
    states = dict(re.findall(r"^(\S+)  \[(.*)\]$", out, re.M))
    assert states["seed-1/b_2"] == "done" and states["seed-0/b_2"] == "to do" and len(states) == 8
    code, _, err = run_main("main_tables", [*words, "--only", "d_1"])
    assert code == 2 and "did you mean b_1?" in err


@pytest.mark.parametrize("jobs", [1, 2])
def test_jobs_run_together_or_one_by_one(jobs, tmp_path, fake, run_main, monkeypatch) -> None:
    monkeypatch.setattr(cell_runs, "cores", lambda: 7)
    flags = [{"alone": 1}, {"alone": 2}] if jobs == 1 else [{"meet": "b"}, {"meet": "a"}]
    runs = {"a": flags[0], "b": flags[1], "c": {"x": "{run:b}"}}
    words = write_plan(tmp_path / "plan.yaml", runs)
    code, _, err = run_main("main_tables", [*words, f"--jobs={jobs}"])
    assert code == 0, err
    assert started(tmp_path)[-1] == "seed-0/c"
    assert done(tmp_path, "seed-0/c")["metrics"]["threads"] == 7 // jobs


def test_failure_leaves_out_what_needs_it_and_is_tried_again(tmp_path, fake, run_main) -> None:
    runs = {
        "last": {"after": ["middle"]},
        "bad": {"code": 3},
        "middle": {"after": ["bad"]},
        "crash": {"crash": 1},
        "silent": {"silent": 1},
        "good": {},
    }
    words = write_plan(tmp_path / "plan.yaml", runs)
    code, out, err = run_main("main_tables", words)
    assert code == 1
    assert started(tmp_path) == [f"seed-0/{x}" for x in ("bad", "crash", "silent", "good")]
    log = tmp_path / "out/seed-0/bad/log.txt"
    assert f"seed-0/bad: exit code 3: error: no such thing (log: {log})" in err
    assert "seed-0/crash: killed by SIGKILL" in err
    assert re.search(r"seed-0/silent: it ended well but .*result\.json", err)
    assert "seed-0/middle: not started, it needs seed-0/bad" in err
    assert "seed-0/last: not started" in err and "seed-0/good" not in err
    assert "| good | 90.00 | 1 |" in out and "| bad | - | 0 (1 missing) |" in out

    (tmp_path / "out" / "mended").touch()
    code, _, err = run_main("main_tables", [*words, "--only", "last"])
    assert code == 0, err
    assert started(tmp_path)[4:] == ["seed-0/bad", "seed-0/middle", "seed-0/last"]
    assert done(tmp_path, "seed-0/bad")["starts"] == 2


@pytest.mark.parametrize("who", ["us", "itself", "deaf"])
def test_stopped_and_gone_on_with(who: str, tmp_path, fake, run_main) -> None:
    """SIGTERM to us, a child stopped by others, and one that only SIGKILL ends."""
    runs = {"first": {}, "long": {"stop": who}, "beside": {"stop": "waits"}, "next": {}}
    words = [*write_plan(tmp_path / "plan.yaml", runs), "--jobs=2"]
    code, _, err = run_main("main_tables", [*words, "--only", "first"])
    assert code == 0, err
    old = {number: signal.getsignal(number) for number in cell_runs.SIGNALS}
    began = time.monotonic()
    code, _, err = run_main("main_tables", words)
    assert code == 75 and time.monotonic() - began < 20  # far below the 60 s that they would take
    reason = {"us": "SIGTERM", "itself": "seed-0/long was stopped", "deaf": "SIGINT"}[who]
    assert f"stopped: {reason}; 1 of 4 runs are done" in err
    assert {number: signal.getsignal(number) for number in cell_runs.SIGNALS} == old
    assert "seed-0/next" not in started(tmp_path)
    folder = tmp_path / "out/seed-0"
    assert not (folder / "long/done.json").exists()
    before = json.loads((folder / "long/starts.json").read_text())["starts"][0]["seconds"]
    assert before > 0

    (folder / "long/half").touch()  # a deaf one has left nothing; here it shall go on as well
    (folder / "beside/half").touch()
    code, _, err = run_main("main_tables", words)
    assert code == 0, err
    assert started(tmp_path).count("seed-0/first") == 1
    assert done(tmp_path, "seed-0/long")["starts"] == 2
    assert done(tmp_path, "seed-0/long")["seconds"] > before
    assert (folder / "long/log.txt").read_text().count("=== ") == 2


def test_time_is_noted_while_a_run_goes_on(tmp_path, fake, run_main, monkeypatch) -> None:
    monkeypatch.setattr(cell_runs, "HEARTBEAT", 0.01)
    noted = []
    write = cell_runs.write_json

    def note(path: Path, content: dict) -> None:
        noted.append(path.name)
        write(path, content)

    monkeypatch.setattr(cell_runs, "write_json", note)
    assert run_main("main_tables", write_plan(tmp_path / "plan.yaml", {"a": {"alone": 1}}))[0] == 0
    # At the start and at the end, and in between.
    assert noted[: noted.index("done.json")].count("starts.json") > 2


def test_no_child_outlives_a_fault_of_ours(tmp_path, fake, run_main, monkeypatch) -> None:
    words = write_plan(tmp_path / "plan.yaml", {"a": {}, "b": {"stop": "waits"}})
    children, start = [], cell_runs.start
    monkeypatch.setattr(cell_runs, "start", lambda *a: children.append(start(*a)) or children[-1])
    monkeypatch.setattr(main_tables, "fill_tables", lambda *_: 1 / 0)
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        main_tables.main([*words, "--jobs=2"])
    assert time.monotonic() - began < 50  # the second would wait for 60 seconds
    assert len(children) == 2
    assert all(child.process.returncode is not None for child in children)
    assert not (tmp_path / "out" / NAME).exists()


def test_one_at_a_time_in_an_output_folder(tmp_path, fake, run_main) -> None:
    words = write_plan(tmp_path / "plan.yaml", {"a": {}})
    (tmp_path / "out").mkdir()
    with acquire(tmp_path / "out"):
        code, _, err = run_main("main_tables", words)
    assert code == 2 and f"in use by process {os.getpid()} on" in err
    assert run_main("main_tables", words)[0] == 0


# ---- What is done must be what the plan says ---------------------------------------------------


def test_changed_command_line_of_a_done_run_is_refused(tmp_path, fake, run_main) -> None:
    words = write_plan(tmp_path / "plan.yaml", {"a": {"epochs": 5}, "b": {}})
    assert run_main("main_tables", words)[0] == 0
    write_plan(tmp_path / "plan.yaml", {"a": {"epochs": 6}, "b": {}})
    code, _, err = run_main("main_tables", [*words, "--only", "b"])
    assert code == 2
    assert "was --epochs=5, now --epochs=6" in err and f"move {tmp_path}/out/seed-0/a away" in err
    (tmp_path / "out/seed-0/a").rename(tmp_path / "old")
    assert run_main("main_tables", words)[0] == 0
    assert started(tmp_path) == ["seed-0/a", "seed-0/b", "seed-0/a"]


def test_run_made_from_one_that_was_repeated_is_refused(tmp_path, fake, run_main) -> None:
    words = write_plan(tmp_path / "plan.yaml", {"a": {}, "b": {"x": "{run:a}"}})
    assert run_main("main_tables", words)[0] == 0
    (tmp_path / "out/seed-0/a").rename(tmp_path / "old")
    for _ in range(2):  # gone, then run again
        code, _, err = run_main("main_tables", words)
        assert code == 2 and "seed-0/b was made from a seed-0/a that is no longer there" in err
        (tmp_path / "out/seed-0/b").rename(tmp_path / "kept")
        assert run_main("main_tables", [*words, "--only", "a"])[0] == 0
        (tmp_path / "kept").rename(tmp_path / "out/seed-0/b")
    # The same holds for one that had only begun.
    (tmp_path / "out/seed-0/b/done.json").unlink()
    assert run_main("main_tables", words)[0] == 2


def test_output_may_be_moved_as_a_whole(tmp_path, fake, run_main) -> None:
    words = write_plan(tmp_path / "plan.yaml", {"a": {}, "b": {"x": "{run:a}/w"}})
    assert run_main("main_tables", words)[0] == 0
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    words[1] = f"--output_dir={tmp_path / 'elsewhere'}"
    code, _, err = run_main("main_tables", words)
    assert code == 0, err
    assert len((tmp_path / "elsewhere/order.txt").read_text().split()) == 2


def test_damaged_record_and_unknown_metric_are_told(tmp_path, fake, run_main) -> None:
    words = write_plan(tmp_path / "plan.yaml", {"a": {}}, [["a", "a", "top_1"]])
    code, out, err = run_main("main_tables", words)
    assert code == 2 and "no such metric (did you mean top1?)" in err and "| a | - | 1 |" in out
    (tmp_path / "out/seed-0/a/done.json").write_text("{")
    code, _, err = run_main("main_tables", words)
    assert code == 2 and "done.json" in err and "Traceback" not in err


# ---- Numbers -----------------------------------------------------------------------------------


def test_mean_and_deviation_equal_numpys() -> None:
    values = np.random.default_rng(0).normal(90, 0.3, 7).tolist()
    mean, deviation = mean_and_deviation(values)
    assert mean == pytest.approx(np.mean(values), rel=1e-14)
    assert deviation == pytest.approx(np.std(values, ddof=1), rel=1e-12)
    assert mean_and_deviation([1.5]) == (1.5, None)
    assert mean_and_deviation([]) == (None, None)


def test_shown_digits() -> None:
    assert show(92.126, 0.204) == "92.13 ± 0.20"
    assert show(0.71234, 0.0004) == "0.7123 ± 0.0004"
    assert show(10.0) == "10.00"
    assert show(None) == "-"


def test_pretraining_metrics_are_the_last_of_each_kind(tmp_path: Path) -> None:
    lines = [
        {"kind": "epoch", "step": 5, "loss": 0.9},
        {"kind": "eval", "step": 5, "model_psnr": 11.0, "model_ssim": 0.1},
        {"kind": "train", "step": 6, "loss": 7.0},
        {"kind": "epoch", "step": 10, "loss": 0.8},
        {"kind": "eval", "step": 10, "model_psnr": 12.0, "model_ssim": 0.2},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    found = cell_runs.READERS["main_pretrain"](tmp_path)
    assert (found["loss"], found["model_psnr"], found["step"]) == (0.8, 12.0, 10)


# ---- Plans -------------------------------------------------------------------------------------

GOOD = """
seeds: [0]
defaults: {main_finetune: {seed: "{seed}"}}
runs:
  a: {main: main_finetune, flags: {epochs: 1}}
  b: {main: main_knn, flags: {checkpoint: "{run:a}/w"}, after: [a]}
tables:
  - {title: T, rows: [[A, a, top1]]}
"""
FAULTS = [
    ("seeds: [0]", "seed: [0]", "unknown key of .*'seed' .did you mean seeds"),
    ("seeds: [0]", "", "has no 'seeds'"),
    ("seeds: [0]", "seeds: [0, 0]", "different whole numbers"),
    ("seeds: [0]", "seeds: [true]", "different whole numbers"),
    ("seeds: [0]", "seeds: [0", "is not YAML"),
    ("defaults: {main_finetune", "defaults: {main_finetunes", "did you mean main_finetune"),
    ("main: main_knn", "main: main_kn", "main of run 'b'.*did you mean main_knn"),
    ("main: main_knn, ", "", "run 'b' .*names no main"),
    ("flags: {epochs", "flag: {epochs", "'flag' .did you mean flags"),
    ("epochs: 1", "--epochs: 1", "write the name alone"),
    ("epochs: 1", "epochs: {a: 1}", "needs quotes"),
    ("epochs: 1", "output_dir: here", "by themselves"),
    ("epochs: 1", 'epochs: "{epoch}"', "{epoch} is not known"),
    ("epochs: 1", 'epochs: "{run:}"', "{run:} is not known"),
    ('seed: "{seed}"', "seed: 0", "run 'a' .*same at every seed"),
    ("{run:a}", "{run:aa}", "needs: 'aa' .did you mean a"),
    ("after: [a]", "after: [c]", "needs: 'c'; known: a, b"),
    ("after: [a]", "after: a", "must be a list"),
    ("after: [a]", "after: [b]", "in a circle: b -> b"),
    ("epochs: 1}", "epochs: 1}, after: [b]", "in a circle: a -> b -> a"),
    ("  b: {", "  a: {", "'a' stands twice .*line 6"),
    ("  b: {", "  a/b: {", "a name is letters"),
    ("  b: {", "  1: {", "must be text"),
    ("[A, a, top1]", "[A, a]", "expected .label, run, metric"),
    ("[A, a, top1]", "[A, aa, top1]", "run of row 'A'.*did you mean a"),
    ("[A, a, top1]", "[A, a, 1]", "metrics are names"),
    ("title: T", "titel: T", "did you mean title"),
    ("title: T, ", "", "needs a title"),
]


@pytest.mark.parametrize(("old", "new", "message"), FAULTS)
def test_bad_plans_are_refused_before_anything_starts(old, new, message, tmp_path, run_main):
    assert GOOD.count(old) == 1
    path = tmp_path / "plan.yaml"
    path.write_text(GOOD.replace(old, new))
    code, _, err = run_main("main_tables", [f"--plan={path}", f"--output_dir={tmp_path / 'out'}"])
    assert code == 2 and re.search(message, err), err
    assert "Traceback" not in err and not (tmp_path / "out").exists()


def test_plan_that_the_faults_are_made_from_is_good(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(GOOD)
    plan = read_plan(path, cell_runs.READERS)
    assert plan.runs["b"].needs == ("a",) and plan.runs["a"].needs == ()
    with pytest.raises(BadInput, match="cannot read"):
        read_plan(tmp_path / "none.yaml", cell_runs.READERS)


@pytest.mark.parametrize("words", [[], ["--plan=x.yaml"], ["--plan=x", "--jobs=0"], ["--pln=x"]])
def test_bad_flags_exit_2(words, run_main) -> None:
    code, _, err = run_main("main_tables", words)
    assert code == 2 and err.startswith("error: ")


def test_every_plan_of_the_project_reads() -> None:
    paths = sorted((ROOT / "recipes" / "tables").glob("*.yaml"))
    assert "fashion_mnist.yaml" in [path.name for path in paths]
    for path in paths:
        plan = read_plan(path, cell_runs.READERS)
        cells = list_cells(plan, plan.seeds, ROOT / "output_dir")
        own = [run.copy.seeds or plan.given["seeds"] for run in plan.runs.values()]
        assert len(cells) == sum(map(len, own))
        shown = {row.run for table in plan.tables for row in table.rows}
        needed = {need for name in shown for need in plan.runs[name].needs}
        assert shown | needed == plan.runs.keys(), f"{path.name} pays for runs that it never shows"


# ---- With a real command -----------------------------------------------------------------------


@pytest.mark.smoke
def test_pretraining_stopped_in_the_middle_goes_on(tmp_path: Path, run_main) -> None:
    flags = {word[2:].partition("=")[0]: word.partition("=")[2] for word in TINY}
    plan = {
        "seeds": [4],
        "runs": {
            "pre": {
                "main": "main_pretrain",
                "flags": {**flags, "seed": "{seed}", "save_every": 0, "epochs": 12},
            }
        },
        "tables": [{"title": "Loss", "rows": [["tiny", "pre", "loss"]]}],
    }
    path, folder = tmp_path / "plan.yaml", tmp_path / "out/seed-4/pre"
    path.write_text(yaml.safe_dump(plan))
    words = [f"--plan={path}", f"--output_dir={tmp_path / 'out'}"]

    def stop_at_step_three() -> None:
        until(lambda: steps_done(folder) >= 3)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=stop_at_step_three)
    watcher.start()
    code, _, err = run_main("main_tables", words)
    watcher.join()
    assert code == 75 and "SIGTERM; 0 of 1 runs are done" in err
    halfway = steps_done(folder)
    assert 3 <= halfway < 120
    code, out, err = run_main("main_tables", words)
    assert code == 0, err
    assert [r["step"] for r in records(folder, "train")] == list(range(1, 121))
    loss = records(folder, "epoch")[-1]["loss"]
    assert done(tmp_path, "seed-4/pre")["metrics"]["loss"] == loss
    assert f"| tiny | {loss:.4f} | 1 |" in out
    assert sys.executable in (folder / "log.txt").read_text()


@pytest.mark.parametrize("main", ["main_finetune", "main_segment"])
def test_a_runs_own_result_is_read_before_an_evaluations(main: str, tmp_path: Path) -> None:
    (tmp_path / "result-eval.json").write_text('{"top1": 1.0}')
    assert cell_runs.READERS[main](tmp_path) == {"top1": 1.0}
    (tmp_path / "result.json").write_text('{"top1": 2.0}')
    assert cell_runs.READERS[main](tmp_path) == {"top1": 2.0}
