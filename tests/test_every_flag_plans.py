"""Every flag of the commands that run others: tables and the jobs of a cluster.

Nothing is run: each row looks at what would be.
"""

import argparse
import json
from typing import Any

import pytest
import yaml
from every_flag import Command, Row, Table, Told, Trace, cases, check_complete
from launch import ROOT

import main_tables
from util.slurm import add_job_flags

# ---- Tables ------------------------------------------------------------------------------------

PAPERS = f"--papers={ROOT}/recipes/papers/mae.yaml"

TABLES: Table = {
    "--plan": Row("--plan={other}", "cells"),
    "--output_dir": Row("--output_dir={root}/there", "files"),
    "--seeds": Row("--seeds 1", "cells"),
    "--jobs": Row("--jobs=2", "jobs"),
    "--only": Row("--only b", "cells"),
    "--list": Told("test_list"),
    "--papers": Told("test_papers"),
    "--runs": Row("--runs={curves}", "runs", PAPERS, without="--plan"),
    "--commands": Told("test_commands"),
    "--compare": Row(
        "--compare {a} {a}", "said", "--compare {a} {b} --tolerance=9", without="--plan"
    ),
    "--tolerance": Row("--tolerance=9", "bounds said", "--compare {a} {a}", without="--plan"),
    "--window": Row("--window=2", "bounds said", "--compare {a} {a}", without="--plan"),
    "--save_curve": Row(
        "--save_curve {a} {root}/kept.json",
        "files said",
        "--save_curve {a} {root}/other.json",
        without="--plan",
    ),
}


class Tables(Command):
    """Cells, how many at once, where runs are looked for."""

    def watch(self, patch: pytest.MonkeyPatch, trace: Trace) -> None:
        """Stand in for the runs."""
        compare = main_tables.compare

        def run_cells(cells: Any, wanted: Any, jobs: int, *rest: Any) -> dict[str, str]:
            trace["cells"], trace["jobs"] = list(wanted), jobs
            trace["asked"] = True
            return {}

        def find_runs(roots: Any) -> list[Any]:
            trace["runs"] = [path.name for path in roots]
            trace["asked"] = True
            return []

        def compared(run: Any, reference: Any, tolerance: float, window: int) -> Any:
            trace["bounds"] = tolerance, window
            return compare(run, reference, tolerance, window)

        patch.setattr(main_tables, "run_cells", run_cells)
        patch.setattr(main_tables, "find_runs", find_runs)
        patch.setattr(main_tables, "compare", compared)
        patch.setattr(main_tables, "check_metrics", lambda *rest: None)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    root = tmp_path_factory.mktemp("tables")
    places = {"curves": str(root)}
    for name, runs in (("plan", "ab"), ("other", "abc")):
        flags = {"dataset": "synthetic", "seed": "{seed}"}
        plan = {
            "seeds": [0],
            "runs": {run: {"main": "main_finetune", "flags": flags} for run in runs},
            "tables": [{"title": "t", "rows": [[run, run, "top1"] for run in runs]}],
        }
        (root / f"{name}.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
        places[name] = str(root / f"{name}.yaml")
    for name, slope in (("a", 0.01), ("b", 0.02)):
        (root / name).mkdir()
        lines = [
            {"kind": "train", "step": i, "loss": 2 - slope * i, "lr": 0.1, "grad_norm": 1.0}
            for i in range(1, 60)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (root / name / "metrics.jsonl").write_text(text)
        places[name] = str(root / name)
    return Tables("main_tables", ["--plan={plan}"], places, root)


def test_every_flag_of_tables_has_an_entry() -> None:
    check_complete(TABLES, main_tables.build_parser(), __name__)


@cases(TABLES)
def test_tables(row: Row, tables: Tables) -> None:
    tables.check(row)


def test_list(tables: Tables) -> None:
    """The cells, and none is run."""
    trace = tables("--list")
    assert trace["ends"] == 0 and "cells" not in trace and not trace["files"]
    assert "seed-0/a  [to do]" in trace["text"] and "--dataset=synthetic" in trace["text"]


def test_papers(tables: Tables) -> None:
    """Their tables, without a plan."""
    trace = tables(PAPERS, without="--plan")
    assert trace["ends"] == 0 and {"run/papers.csv", "run/papers.md"} <= set(trace["files"])
    assert trace["runs"] == ["output_dir"]


def test_commands(tables: Tables) -> None:
    """What to type, and no tables."""
    trace = tables(PAPERS, "--commands", without="--plan")
    assert trace["ends"] == 0 and not trace["files"] and "runs" not in trace
    assert "main_pretrain.py" in trace["text"]


# ---- Jobs --------------------------------------------------------------------------------------

CPUS = "--ngpus=0"

JOB: Table = {
    "--job_dir": Row("--job_dir={root}/there", "said", says="/there"),
    "--nodes": Row("--nodes=2", "said", says="#SBATCH --nodes=2"),
    "--ngpus": Row("--ngpus=4", "said", says="#SBATCH --gpus-per-node=4"),
    "--cpu_tasks": Row("--cpu_tasks=3", "said", CPUS, "#SBATCH --ntasks-per-node=3"),
    "--timeout": Row("--timeout=77", "said", says="#SBATCH --time=77"),
    "--signal_seconds": Row("--signal_seconds=33", "said", says="#SBATCH --signal=USR2@33"),
    "--partition": Row("--partition=fast", "said", says="#SBATCH --partition=fast"),
    "--qos": Row("--qos=high", "said", says="#SBATCH --qos=high"),
    "--account": Row("--account=lab", "said", says="#SBATCH --account=lab"),
    "--constraint": Row("--constraint=a100", "said", says="#SBATCH --constraint=a100"),
    "--use_volta32": Row("--use_volta32", "said", says="#SBATCH --constraint=volta32gb"),
    "--comment": Row("--comment=mine", "said", says="#SBATCH --comment=mine"),
    "--mem_gb": Row("--mem_gb=2", "said", says="#SBATCH --mem=2048M"),
    "--cpus_per_task": [
        Row("--cpus_per_task=3", "said", says="#SBATCH --cpus-per-task=3"),
        Row("--cpus_per_task=3", "said", says="--cpus-per-task=3 --kill-on-bad-exit"),
    ],
    "--setup": Row("--setup=true", "said", says="\ntrue\n"),
    "--local": Row("--local", "said", CPUS),
    "--dry_run": Told("test_job_without_dry_run"),
}


class Job(Command):
    """A job on a machine without a cluster."""

    def watch(self, patch: pytest.MonkeyPatch, trace: Trace) -> None:
        """No sbatch."""
        patch.setenv("PATH", str(self.root))


@pytest.fixture(scope="module", params=["pretrain", "segment"])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    base = ["--dry_run", "--dry_run_images=100"]
    if request.param == "pretrain":
        base += ["--dataset=synthetic", "--model=mae_vit_nano_patch4", "--batch_size=4"]
    else:
        base += ["--model=vit_deep_patch4", "--input_size=16", "--nb_classes=3"]
    root = tmp_path_factory.mktemp("job")
    return Job(f"submitit_{request.param}", base, {}, root, "--job_dir={root}/job")


def test_every_flag_of_a_job_has_an_entry() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_job_flags(parser)
    check_complete(JOB, parser, __name__)


@cases(JOB)
def test_job(row: Row, job: Job) -> None:
    job.check(row)


def test_job_without_dry_run(job: Job) -> None:
    """With the flag nothing is written and no cluster is needed."""
    dry, real = job(), job(without="--dry_run")
    assert dry["ends"] == 0 and not dry["files"] and "nothing is submitted" in dry["text"]
    assert real["ends"] == 2 and "no sbatch and srun" in real["text"]
