"""Every flag of lab.study: another value changes what is run or written, and nothing else.

Nothing is run: each row looks at what would be.
"""

import shutil
from pathlib import Path

import pytest
import yaml
from every_flag import Command, Row, Table, Told, Trace, cases, check_complete
from launch import ROOT

import lab.study.command as command

ROW = "factorial/mask_on-lscale_off-offset_off"

STUDY: Table = {
    "--plan": Row("--plan={other}", "plan"),
    "--output_dir": Row("--output_dir={root}/there", "output"),
    "--docs": Told("test_docs"),
    "--jobs": [Row("--jobs=2", "jobs"), Row("--jobs=2", "jobs", f"--only={ROW}")],
    "--only": Row(f"--only={ROW}", "files plan output"),
    "--seeds": Row("--seeds 7", "plan", f"--only={ROW}"),
    "--report": Told("test_report"),
    "--from_docs": Told("test_docs"),
}


class Study(Command):
    """The first plan that is run; there it ends."""

    def watch(self, patch: pytest.MonkeyPatch, trace: Trace) -> None:
        """Stand in for the runs."""

        def run_plan(path: Path, output: Path, jobs: int) -> None:
            trace["asked"], trace["jobs"] = True, jobs
            trace["plan"] = Path(path).read_text()
            trace["output"] = output.parts[-2:]
            raise SystemExit(0)

        patch.setattr(command, "run_plan", run_plan)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    root = tmp_path_factory.mktemp("study")
    whole = ROOT / "recipes/tables/study.yaml"
    plan = yaml.safe_load(whole.read_text())
    plan["study"]["about"] = "another"
    (root / "other.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    shutil.copytree(ROOT / "docs", root / "docs", ignore=shutil.ignore_patterns("pictures"))
    places = {"plan": str(whole), "other": str(root / "other.yaml"), "docs": str(root / "docs")}
    return Study("lab.study.command", ["--plan={plan}", "--docs={docs}"], places, root)


def test_every_flag_of_study_has_an_entry() -> None:
    check_complete(STUDY, command.build_parser(), __name__)


@cases(STUDY)
def test_study(row: Row, study: Study) -> None:
    study.check(row)


def test_docs(study: Study, tmp_path: Path) -> None:
    """The document anew, from the numbers in that folder and into it; nothing is run."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / "docs/study.json", tmp_path / name)
    trace = study("--from_docs --docs={root}/two", folder=tmp_path)
    assert trace["ends"] == 0 and "asked" not in trace, trace["text"]
    assert (tmp_path / "two/study.md").exists() and not (tmp_path / "one/study.md").exists()


def test_report(study: Study) -> None:
    """Nothing is run; of nothing there is no document, and what is there stays."""
    trace = study("--report")
    assert "asked" not in trace and trace["ends"] == 2 and "0 finished runs" in trace["text"]
