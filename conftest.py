"""What all tests share, the laboratory's too: few threads, `run_main`, lanes, what CI may skip."""

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from util.data.source import Subset

# Read by processes that tests start, torchrun's among them: several share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Threads that wait by spinning starve whoever shares the two cores: steps took 10 times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Of the random repetitions; each run has a new one. The lanes of one run read the same.
SEED = os.environ.setdefault("MMAE_TEST_SEED", str(time.time_ns() % 10**6))

import torch  # noqa: E402  # after the environment that it reads
from runs import signals_kept  # noqa: E402
from tiny import add_small_models  # noqa: E402
from trained import Trained  # noqa: E402

torch.set_num_threads(1)

RunMain = Callable[[str, Sequence[str]], tuple[int, str, str]]


@pytest.fixture
def run_main(capfd: pytest.CaptureFixture[str]) -> RunMain:
    """``run_main("main_pretrain", ["--epochs", "1"]) -> (exit_code, stdout, stderr)``.

    Calls ``main(argv)`` of the module in this process and ends as the interpreter would: the code
    is 0 without SystemExit or with None in it; a text in it goes to stderr and the code is 1. Other
    exceptions pass, for a traceback is a failure. A test that uses it cannot use capsys as well.
    """

    def run(module_name: str, argv: Sequence[str]) -> tuple[int, str, str]:
        module = importlib.import_module(module_name)
        capfd.readouterr()  # what came before is not this command's
        try:
            with signals_kept():
                module.main(list(argv))
            code: int | str | None = 0
        except SystemExit as stop:
            code = stop.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
        out, err = capfd.readouterr()
        return code or 0, out, err

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """``trained("main_pretrain", flags) -> run folder``: trained once per test run; see there."""
    root = tmp_path_factory.getbasetemp()
    return Trained(root.parent if "PYTEST_XDIST_WORKER" in os.environ else root)


@pytest.fixture(scope="module")
def small_models() -> Iterator[None]:
    """Names for models so small that a run is its files and its bookkeeping."""
    with pytest.MonkeyPatch.context() as patch:
        add_small_models(patch)
        yield


PLACES_OF_SETS = (
    "main_pretrain", "plan_pretrain", "eval_pretrain", "main_finetune", "plan_finetune",
)  # fmt: skip


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """Pretraining and fine-tuning see that many images of their data set: runs of a few steps."""
    count = 60
    for name in PLACES_OF_SETS:
        module = importlib.import_module(name)
        whole = module.open_set

        def opened(*rest: object, whole: Callable = whole) -> object:
            source = whole(*rest)
            return Subset(source, range(min(count, len(source))))

        monkeypatch.setattr(module, "open_set", opened)
    return count


def pytest_report_header() -> str:
    """The seed that repeats this run."""
    many = "all" if os.environ.get("MMAE_TEST_ALL") == "1" else "few (make test-all: all)"
    return f"random repetitions: {many}; MMAE_TEST_SEED={SEED} draws the same"


# ---- Lanes and seconds -------------------------------------------------------------------------
# `make test` has two lanes, and a third that waits for Slurm first. A file's tests stay in one
# lane, for they share fixtures; the longest files come first, so that all lanes end together. The
# laboratory's tests are in one lane, too.

LONGEST = (
    "test_slurm.py", "test_resume.py", "test_os_errors.py", "test_pretrain.py", "test_compile.py",
    "test_changed_settings.py", "test_shard.py",
)  # fmt: skip
TIERS = ("slurm", "dist", "parity", "smoke", "gpu")
SECONDS: dict[str, list[float]] = {}


def in_lab(nodeid: str) -> bool:
    """Whether a test is the laboratory's."""
    return nodeid.startswith("lab/")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort files; inside of a file the order stays."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order) + (not in_lab(item.nodeid))))
    for item in items:
        tier = next((t for t in TIERS if item.get_closest_marker(t)), "unit")
        item.user_properties.append(("tier", tier))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole files to each lane, and the whole of `lab/tests/` to one."""
    from xdist.scheduler import LoadFileScheduling

    class Lanes(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "lab" if in_lab(nodeid) else str(super()._split_scope(nodeid))

    return Lanes(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Iterator[None]:
    """Names that are no UTF-8, in what a test printed, end a lane: they are written out."""
    return encodable((yield))


def encodable(data: Any) -> Any:
    """The same nesting with texts that UTF-8 can hold."""
    if isinstance(data, dict):
        return {encodable(key): encodable(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return type(data)(map(encodable, data))
    return data.encode("utf-8", "backslashreplace").decode() if isinstance(data, str) else data


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Seconds by tier and of the slowest files; then what failed the run in CI."""
    if SECONDS:
        terminalreporter.section("seconds by tier, then by file (of one lane)", sep="-")
        parts = sorted(SECONDS.items(), key=lambda item: -sum(item[1]))
        for part, seconds in [p for p in parts if p[0] in (*TIERS, "unit")]:
            terminalreporter.line(f"{sum(seconds):8.1f} s  {part}")
        for part, seconds in [p for p in parts if p[0].endswith(".py")][:30]:
            terminalreporter.line(f"{sum(seconds):8.1f} s  {part}")
    if AVOIDABLE and os.environ.get("CI") == "true":
        terminalreporter.section("skips that CI can avoid", sep="=", red=True, bold=True)
        for line in AVOIDABLE:
            terminalreporter.line(line)
        terminalreporter.line("make them run; only a reason that starts with 'gpu:' may skip in CI")


# ---- Skips in CI -------------------------------------------------------------------------------
# A GPU is the one thing that CI cannot install; every other skip would be a hole that nobody sees.

AVOIDABLE: list[str] = []


def _note(report: pytest.CollectReport | pytest.TestReport) -> None:
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if not reason.startswith("gpu:"):
        AVOIDABLE.append(f"{report.nodeid}: {reason}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note skips by mark, by call and in fixtures; and what each part takes."""
    _note(report)
    for part in (dict(report.user_properties)["tier"], report.nodeid.partition("::")[0]):
        SECONDS.setdefault(part, []).append(report.duration)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Note whole modules that skip, `pytest.importorskip` at their top among them."""
    _note(report)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Under CI=true an avoidable skip fails the run."""
    if AVOIDABLE and os.environ.get("CI") == "true" and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
