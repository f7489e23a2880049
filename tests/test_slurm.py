"""Jobs on a real Slurm: stopped by everything that stops jobs, they end in the same bits.

The cluster runs on this machine (`slurm-on-one-machine`). What is checked before a submission
needs none.
"""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from launch import EVERY_DRAW, PATIENCE, ROOT, launch, steps_done, until, wait
from runs import different, records, signals_kept, weights
from trained import Trained

import submitit_finetune
import submitit_pretrain
from util.errors import EXIT_BAD_INPUT, EXIT_STOPPED, RunFailed, Stopped
from util.slurm import parse_gpus, project_files
from util.train.checkpoint import LAST, load_file
from util.train.task import leave

HERE = Path(__file__).resolve().parent
# Random parts on; 3 epochs of 10 steps on two processes.
FLAGS = [*EVERY_DRAW, "--batch_size=12"]
# Held in step 11, all processes have agreed on the signal after step 16 at the latest: in epoch 1.
HOLD, STEPS = 11, 30
ONE_BY_TWO = ["--nodes=1", "--ngpus=0", "--cpu_tasks=2"]
TWO_BY_ONE = ["--nodes=2", "--ngpus=0", "--cpu_tasks=1"]
FINETUNE = [
    "--dataset=synthetic", "--train_images=48", "--batch_size=12", "--epochs=2", "--blr=5e-4",
    "--warmup_epochs=1", "--layer_decay=0.65", "--weight_decay=0.05", "--drop_path=0.1",
    "--reprob=0.25", "--mixup=0.8", "--cutmix=1.0", "--dist_eval", "--num_workers=0",
    "--log_every=1", "--device=cpu",
]  # fmt: skip


# ---- The cluster -------------------------------------------------------------------------------


def run(*command: str | Path, check: bool = True, **options) -> str:
    """Output of a command, which must succeed."""
    words = [str(word) for word in command]
    answer = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, **options)
    assert not check or answer.returncode == 0, f"{words}: {answer.stdout}{answer.stderr}"
    return answer.stdout


def start_cluster(**knobs: str) -> Iterator[dict[str, str]]:
    """What the environment of its users needs; stopped at the end."""
    if os.geteuid():
        pytest.skip("slurm: the daemons need root; run the tests as root, in a container")
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if missing := [p for p in ("munged", "slurmctld", "slurmd") if not shutil.which(p, path=path)]:
        pytest.skip(f"slurm: no {', '.join(missing)}; apt-get install slurm-wlm munge")
    folder = tempfile.mkdtemp(prefix="mmae-slurm-", dir="/tmp")
    knobs |= {"ONE_CPUS": "8", "ONE_GPUS": "2", "ONE_FEATURE": "volta32gb", "OMP_NUM_THREADS": "1"}
    lines = run(HERE / "slurm-on-one-machine", "start", folder, env={**os.environ, **knobs})
    try:
        assert lines.split() == [
            "export", f"SLURM_CONF={folder}/slurm.conf", "export", f"PATH={folder}/bin:$PATH",
        ]  # fmt: skip
        yield {
            "SLURM_CONF": f"{folder}/slurm.conf",
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "PYTHONPATH": f"{HERE / 'slurm_hold'}",
        }
    finally:
        run(HERE / "slurm-on-one-machine", "stop", folder)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster_environment() -> Iterator[dict[str, str]]:
    yield from start_cluster()


@pytest.fixture
def cluster(cluster_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cluster_environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """First starts of jobs submitted from here stay in one step until a signal comes."""
    monkeypatch.setenv("MMAE_TEST_HOLD", str(HOLD))


@pytest.fixture(scope="module")
def undisturbed(trained: Trained) -> Path:
    """Run folder of two processes without Slurm that were never stopped."""
    return trained("main_pretrain", FLAGS, 2)


def check_same(folder: Path, other: Path, name: str = LAST) -> None:
    """The weights bit for bit, and every step logged once, with the same numbers."""
    assert not different(weights(folder, name), weights(other, name))
    logged = [
        [(r["step"], r["loss"], r["lr"]) for r in records(f, "train")] for f in (folder, other)
    ]
    assert logged[0] == logged[1]


def number_in(text: str) -> str:
    """The job's number in what a submission printed."""
    return re.search(r"^job +(\d+):", text, re.MULTILINE).group(1)


def state(job: str) -> str:
    return run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()


def story(folder: Path, job: str) -> str:
    """Both logs of the first task and of the batch script."""
    paths = [folder / f"{job}_0_log.{end}" for end in ("out", "err")]
    return "\n".join(path.read_text() for path in paths if path.exists())


def wait_until_held(folder: Path, job: str, step: int = HOLD) -> None:
    """Until the job has logged the step before the one that it stays in."""
    until(
        lambda: steps_done(folder) >= step - 1,
        lambda: f"{state(job)}: {story(folder, job)}",
        pause=0.2,
    )


def wait_for_end(folder: Path, job: str, expected: str = "COMPLETED") -> None:
    busy = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "PREEMPTED")
    until(lambda: state(job) not in busy, lambda: f"{state(job)}: {story(folder, job)}", pause=0.2)
    assert state(job) == expected, story(folder, job)


def set_limit(job: str, minutes: int) -> None:
    """Give a job another time limit, counted from its start."""
    run("scontrol", "update", f"jobid={job}", f"TimeLimit={minutes}")


def minutes_run(job: str) -> int:
    """Whole minutes since a job began to run."""
    hours, minutes = re.search(
        r"RunTime=(\d+):(\d+):", run("scontrol", "show", "job", job)
    ).groups()
    return 60 * int(hours) + int(minutes)


def wait_for_restart(folder: Path, job: str) -> None:
    """Until a job has been queued again; from then on its time is long enough for any machine."""
    until(lambda: restarts(job) > 0, lambda: f"{state(job)}: {story(folder, job)}", pause=0.2)
    set_limit(job, 30)


def restarts(job: str) -> int:
    return int(re.search(r"Restarts=(\d+)", run("scontrol", "show", "job", job)).group(1))


def submit(folder: Path, flags: Sequence[str], module: ModuleType = submitit_pretrain) -> str:
    """Submit in this process; the job's number."""
    with redirect_stdout(io.StringIO()) as out:
        module.main([f"--job_dir={folder}", *flags])
    return number_in(out.getvalue())


def check_went_on(stopped: "Job", kind: str, other: Path, by_us: bool) -> None:
    """Stopped in the middle of an epoch, queued again, went on, and nobody took it for failed."""
    folder, job = stopped.folder, stopped.number
    wait_for_end(folder, job)
    text = story(folder, job)
    step = int(re.search(rf"stopped: {kind} after step (\d+), in epoch 2", text).group(1))
    assert 10 < step < 20
    # A slow start may itself have been stopped once, before it could say so.
    assert f"job {job} starts again, restart {restarts(job)}" in text and restarts(job) >= 1
    assert f"{LAST}, {step} steps done" in text
    assert (f"requeued job {job}" in text) == by_us
    assert "triggered an exception" not in text and "Traceback" not in text
    check_same(folder, other)


# ---- Jobs --------------------------------------------------------------------------------------


@pytest.mark.slurm
@pytest.mark.parametrize("layout", [ONE_BY_TWO, TWO_BY_ONE], ids=["1x2", "2x1"])
@pytest.mark.usefixtures("cluster")
def test_a_job_gives_what_the_same_processes_give_without_slurm(
    layout: list[str], undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submitit_pretrain.main([f"--job_dir={tmp_path}/%j", *layout, *FLAGS, "--cpus_per_task=2"])
    out = capsys.readouterr().out
    job = number_in(out)
    folder = tmp_path / job
    for line in (
        f"run      {folder}", f"log      {folder / job}_0_log.out", f"state    squeue -j {job}",
        f"cancel   scancel {job}",
    ):  # fmt: skip
        assert line in out
    wait_for_end(folder, job)
    check_same(folder, undisturbed)
    assert restarts(job) == 0
    assert len(list(folder.glob("*_result.pkl"))) == 2
    assert len(list(tmp_path.glob("code-*/main_pretrain.py"))) == 1


@dataclass(frozen=True)
class Job:
    """A job that was disturbed in the middle of epoch 1, and its run folder."""

    folder: Path
    number: str


@pytest.fixture(scope="module")
def disturbed(
    cluster_environment: dict[str, str],
    undisturbed: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Job]:
    """Several jobs at once, for most of their time is waiting."""
    jobs = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster_environment.items():
            patch.setenv(name, value)
        patch.setenv("MMAE_TEST_HOLD", str(HOLD))

        folder = tmp_path_factory.mktemp("limit")
        flags = [*ONE_BY_TWO, *FLAGS, "--timeout=30", "--signal_seconds=10"]
        limited = submit(folder, flags)
        jobs["time limit"] = Job(folder, limited)
        assert "TimeLimit=00:30:00" in run("scontrol", "show", "job", limited)
        wait_until_held(folder, limited)
        # However long the start took: its time is up in one to two minutes.
        set_limit(limited, minutes_run(limited) + 2)

        for name in ("by hand", "cancelled"):
            folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
            jobs[name] = Job(folder, submit(folder, [*ONE_BY_TWO, *FLAGS]))
        project = tmp_path_factory.mktemp("edited")
        jobs["edited"] = Job(project / "runs", submit_from_copy(project))
        folder = tmp_path_factory.mktemp("srun")
        jobs["srun"] = Job(folder, submit_script(folder))

        signals = ["scancel", "--signal=USR2"]
        for name, disturb in (
            ("by hand", signals), ("edited", ["scontrol", "requeue"]), ("srun", signals),
            ("cancelled", ["scancel"]),
        ):  # fmt: skip
            wait_until_held(jobs[name].folder, jobs[name].number)
            if name == "edited":
                spoil(project)
            run(*disturb, jobs[name].number)
        wait_for_restart(folder=jobs["time limit"].folder, job=limited)
    return jobs


def submit_from_copy(project: Path) -> str:
    """Submit by a copy of the project, with a recipe and a relative folder; the job's number."""
    for name, content in project_files().items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_bytes(content)
    (project / "recipe.yaml").write_text("mask: mixed\navg_temperature: 1\n")
    flags = [flag for flag in FLAGS if not flag.startswith(("--mask=", "--avg_temperature"))]
    words = ["--job_dir=runs", *TWO_BY_ONE, *flags, "--config=recipe.yaml"]
    return number_in(run(sys.executable, "submitit_pretrain.py", *words, cwd=project))


def spoil(project: Path) -> None:
    """Break every file that the job was submitted from."""
    edited = [*project.glob("*.py"), *project.glob("util/**/*.py")]
    assert len(edited) > 100
    for path in edited:
        path.write_text("raise SystemExit('edited after the submission')\n")
    (project / "recipe.yaml").write_text("mask: random\n")


def submit_script(folder: Path) -> str:
    """A batch script without submitit, as docs/running.md has it; the job's number."""
    script = folder / "job.sh"
    command = f"{sys.executable} {ROOT}/main_pretrain.py {' '.join(FLAGS)} --output_dir={folder}"
    script.write_text(
        "#!/bin/bash\n#SBATCH --nodes=1 --ntasks-per-node=2 --signal=USR2@120 --requeue\n"
        f"#SBATCH --open-mode=append --output={folder}/log.txt\n"
        f"srun --kill-on-bad-exit=1 {command}\n"
        "code=$?\n"
        "[ $code = 75 ] && scontrol requeue $SLURM_JOB_ID && sleep 600\n"
        "exit $code\n"
    )
    return re.search(r"\d+", run("sbatch", script)).group(0)


@pytest.mark.slurm
@pytest.mark.usefixtures("cluster")
def test_a_signal_by_hand(disturbed: dict[str, Job], undisturbed: Path) -> None:
    check_went_on(disturbed["by hand"], "SIGUSR2", undisturbed, by_us=True)


@pytest.mark.slurm
@pytest.mark.usefixtures("cluster")
def test_requeue_by_an_operator_after_the_project_was_edited(
    disturbed: dict[str, Job], undisturbed: Path
) -> None:
    """It never calls submitit's checkpoint(); and the job runs what was submitted."""
    check_went_on(disturbed["edited"], "SIGTERM", undisturbed, by_us=False)


@pytest.mark.slurm
@pytest.mark.usefixtures("cluster")
def test_srun_without_submitit(disturbed: dict[str, Job], undisturbed: Path) -> None:
    folder, job = disturbed["srun"].folder, disturbed["srun"].number
    wait_for_end(folder, job)
    text = (folder / "log.txt").read_text()
    step = int(re.search(r"stopped: SIGUSR2 after step (\d+), in epoch 2", text).group(1))
    assert restarts(job) == 1 and f"{step} steps done" in text
    check_same(folder, undisturbed)


@pytest.mark.slurm
@pytest.mark.usefixtures("cluster")
def test_a_cancelled_job_saves_and_stays_cancelled(disturbed: dict[str, Job]) -> None:
    folder, job = disturbed["cancelled"].folder, disturbed["cancelled"].number
    wait_for_end(folder, job, "CANCELLED")
    text = story(folder, job)
    step = int(re.search(r"stopped: SIGTERM after step (\d+), in epoch 2", text).group(1))
    assert load_file(folder / LAST)["step"] == step
    assert restarts(job) == 0 and "requeued" not in text


@pytest.mark.slurm
@pytest.mark.usefixtures("cluster")
def test_the_time_limit(disturbed: dict[str, Job], undisturbed: Path) -> None:
    check_went_on(disturbed["time limit"], "SIGUSR2", undisturbed, by_us=True)


# Where a job is in its start: reading its pickle, before submitit sets handlers; importing the
# main; and opening the log, when the processes have met.
STARTING = ("torch", "main_pretrain", "tensorboard.summary.writer.record_writer")


@pytest.mark.slurm
@pytest.mark.usefixtures("cluster")
def test_a_signal_while_a_job_starts(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long starting takes, the job is queued again: by hand, and at its time limit."""
    jobs = {}
    for n, module in enumerate(STARTING):
        monkeypatch.setenv("MMAE_TEST_HOLD_IMPORT", module)
        monkeypatch.setenv("MMAE_TEST_HELD", str(tmp_path / f"held-{n}"))
        flags = [*ONE_BY_TWO, *FLAGS]
        if n == 0:
            flags += ["--timeout=1", "--signal_seconds=10"]
        jobs[module] = Job(tmp_path / str(n), submit(tmp_path / str(n), flags))
    for n, job in enumerate(jobs.values()):
        # The main process alone writes TensorBoard's events; the others are in the loop, and wait.
        ranks = (0, 1) if n < 2 else (0,)
        until(
            lambda n=n, ranks=ranks: all((tmp_path / f"held-{n}.{r}").exists() for r in ranks),
            lambda job=job: f"{state(job.number)}: {story(job.folder, job.number)}",
        )
        if n > 0:
            run("scancel", "--signal=USR2", job.number)
    wait_for_restart(jobs[STARTING[0]].folder, jobs[STARTING[0]].number)
    for job in jobs.values():
        wait_for_end(job.folder, job.number)
        text = story(job.folder, job.number)
        assert "stopped: SIGUSR2 before the first step of this start" in text
        assert f"requeued job {job.number}" in text and "Traceback" not in text
        assert restarts(job.number) == 1
        check_same(job.folder, undisturbed)


@pytest.mark.slurm
@pytest.mark.usefixtures("cluster", "hold")
def test_preemption(undisturbed: Path, tmp_path: Path) -> None:
    """The cluster sends the job's own signal."""
    check_went_on(preempt(tmp_path), "SIGUSR2", undisturbed, by_us=True)


@pytest.mark.slurm
@pytest.mark.usefixtures("hold")
def test_preemption_that_sends_sigterm(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm's default; a job that then ends by itself would not come back."""
    for environment in start_cluster(ONE_SEND_SIGNAL="0", ONE_NODES="1"):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        check_went_on(preempt(tmp_path), "SIGTERM", undisturbed, by_us=True)


def preempt(folder: Path) -> Job:
    """Submit a job that takes a node, and one of a higher partition that needs it."""
    job = submit(folder, [*ONE_BY_TWO, "--cpus_per_task=4", *FLAGS])
    wait_until_held(folder, job)
    node = run("squeue", "-h", "-j", job, "-o", "%N").strip()
    run("sbatch", "-p", "high", "-w", node, "-c8", "-o", "/dev/null", "--wrap", "sleep 1")
    return Job(folder, job)


@pytest.mark.slurm
@pytest.mark.usefixtures("cluster")
def test_a_killed_task_ends_the_job_and_the_same_command_goes_on(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*ONE_BY_TWO, *FLAGS, "--save_minutes=1e-12"]
    with monkeypatch.context() as first:
        first.setenv("MMAE_TEST_HOLD", str(HOLD))
        job = submit(tmp_path, flags)
    wait_until_held(tmp_path, job)
    os.kill(task_of(job, 1), signal.SIGKILL)
    wait_for_end(tmp_path, job, "FAILED")
    assert "task 1: Killed" in story(tmp_path, job)
    again = submit(tmp_path, flags)
    wait_for_end(tmp_path, again)
    assert re.search(rf"going on from .*{LAST}, ([4-9]|1\d) steps done", story(tmp_path, again))
    check_same(tmp_path, undisturbed)


@pytest.mark.slurm
@pytest.mark.usefixtures("cluster")
def test_a_node_that_dies(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One job is all on it and goes on elsewhere, one has half of it there and waits for it.

    The controller is told at once instead of finding out after SlurmdTimeout; no process of the
    node says a word, and the step that the others are in needs none of it: so dies a machine.
    """
    monkeypatch.setenv("MMAE_TEST_HOLD", "18")  # saved by the clock in step 12 or 16, of epoch 1
    jobs = {}
    for name, layout in (("all", ONE_BY_TWO), ("half", TWO_BY_ONE)):
        number = submit(tmp_path / name, [*layout, *FLAGS, "--save_minutes=1e-12"])
        jobs[name] = Job(tmp_path / name, number)
    for job in jobs.values():
        wait_until_held(job.folder, job.number, 18)
    node = place(jobs["all"].number)
    cluster = Path(os.environ["SLURM_CONF"]).parent
    run(HERE / "slurm-on-one-machine", "fail", cluster, node)
    try:
        wait_for_end(jobs["all"].folder, jobs["all"].number)
        # Slurm first ends what is left of it on the other node, however long that takes.
        until(lambda: state(jobs["half"].number) == "PENDING", lambda: state(jobs["half"].number))
    finally:
        run(HERE / "slurm-on-one-machine", "repair", cluster, node)
    wait_for_end(jobs["half"].folder, jobs["half"].number)
    assert place(jobs["all"].number) != node
    for job in jobs.values():
        text = story(job.folder, job.number)
        assert restarts(job.number) == 1
        assert f"job {job.number} starts again, restart 1" in text
        assert re.search(rf"going on from {job.folder}/{LAST}, 1[26] steps done", text)
        check_same(job.folder, undisturbed)
    log = (cluster / "log" / "slurmctld.log").read_text()
    for job in jobs.values():
        assert f"requeue job JobId={job.number} due to failure of node {node}" in log


def place(job: str) -> str:
    """Nodes of a job."""
    return run("squeue", "-h", "-t", "all", "-j", job, "-o", "%N").strip()


def task_of(job: str, rank: int) -> int:
    """The process of a task: all nodes are this machine."""
    wanted = {f"SLURM_JOB_ID={job}", f"SLURM_PROCID={rank}", "SUBMITIT_EXECUTOR=slurm"}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_text().split("\0")
            if "submitit.core._submit" not in words or words[0].endswith("srun"):
                continue
            if wanted <= set((path / "environ").read_text().split("\0")):
                return int(path.name)
        except OSError:
            continue  # has ended
    raise AssertionError(f"no task {rank} of job {job}")


@pytest.mark.slurm
@pytest.mark.usefixtures("cluster")
def test_a_fault_of_the_run_is_a_failed_job_with_its_message(tmp_path: Path) -> None:
    flags = ["--ngpus=0", "--dataset=imagefolder", "--data_path=/nowhere/at/all", "--device=cpu"]
    job = submit(tmp_path, flags)
    wait_for_end(tmp_path, job, "FAILED")
    text = story(tmp_path, job)
    assert "BadInput: " in text and "/nowhere/at/all" in text and "main_pretrain" not in text
    assert (tmp_path / f"{job}_0_result.pkl").exists()


@pytest.mark.slurm
@pytest.mark.usefixtures("cluster")
def test_pretrain_and_finetune_in_one_folder(tmp_path: Path) -> None:
    """The published commands but for size and set; on GPUs that only Slurm believes in, on CPUs."""
    here, there = tmp_path / "slurm", tmp_path / "alone"
    there.mkdir()
    pretrain = [
        "--batch_size=32", "--model=mae_vit_micro_patch4", "--norm_pix_loss", "--mask_ratio=0.75",
        "--epochs=2", "--warmup_epochs=1", "--blr=1.5e-4", "--weight_decay=0.05",
        "--dataset=synthetic", "--input_size=16", "--num_workers=0", "--device=cpu",
        "--log_every=1", "--picture_every=0",
    ]  # fmt: skip
    job = submit(here, ["--nodes=1", "--use_volta32", "--ngpus=2", "--cpus_per_task=2", *pretrain])
    wait_for_end(here, job)
    assert "TresPerNode=gres:gpu:2" in run("scontrol", "show", "job", job)
    assert wait(launch([*pretrain, f"--output_dir={there}"], there / "out", 2)) == [0, 0]
    check_same(here, there)

    finetune = ["--model=vit_micro_patch4", *FINETUNE]
    words = [*ONE_BY_TWO, *finetune, f"--finetune={here}/checkpoint-1.pth"]
    wait_for_end(here, submit(here, words, submitit_finetune))
    words = [*finetune, f"--finetune={there}/checkpoint-1.pth", f"--output_dir={there}"]
    assert wait(launch(words, there / "out", 2, module="main_finetune")) == [0, 0]
    check_same(here, there)
    results = [json.loads((f / "metrics-finetune.jsonl").read_text().split("\n")[-2])
               for f in (here, there)]  # fmt: skip
    assert results[0] == results[1] and results[0]["kind"] == "eval"


@pytest.mark.dist
def test_local(undisturbed: Path, tmp_path: Path) -> None:
    """submitit's local executor: two tasks on this machine."""
    job = submit(tmp_path, ["--local", "--ngpus=0", "--cpu_tasks=2", *FLAGS])
    until(
        lambda: len(list(tmp_path.glob(f"{job}_*_result.pkl"))) == 2,
        lambda: story(tmp_path, job),
    )
    check_same(tmp_path, undisturbed)


# ---- Before a submission -----------------------------------------------------------------------


@pytest.fixture
def paper_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands as shell scripts on the PATH; the folder of what they were called with."""
    calls = tmp_path / "calls"
    calls.mkdir()
    rows = "main*|2|gpu:v100:2(S:0)|16\nmain*|1|gpu:v100:4|16\nbig|1|(null)|64"
    scripts = {
        "sinfo": f"printf '{rows}\n'",
        "srun": "",
        "sbatch": "echo 'sbatch: error: Invalid account' >&2; exit 1",
        "scontrol": 'cat "${0%/*}/../job" 2>/dev/null || { echo refused >&2; exit 1; }',
    }
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in scripts.items():
        text = f'#!/bin/sh\necho "$@" >>{calls}/{name}\n{body}\n'
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return calls


BAD = {
    "partition": (["--partition=fast"], "--partition fast: there is none; partitions: big, main"),
    "one of two partitions": (["--partition=main,fast"], "--partition fast"),
    "gpus": (
        ["--ngpus=5", "--cpus_per_task=1"],
        "no node of the default partition has more than 4",
    ),
    "gpus of a partition": (["--partition=big", "--ngpus=1"], "no node of big has more than 0"),
    "nodes": (["--ngpus=1", "--nodes=4"], "--nodes 4, but the default partition has 3"),
    "cpus": (["--ngpus=2"], "2 tasks of 10 CPUs (--cpus_per_task)"),
    "folder": (["--ngpus=1", "--job_dir=/dev/null/x"], "cannot write to folder /dev/null/x"),
    "flag of the main": (["--batch_sise=3"], "--batch_sise=3 (did you mean --batch_size?)"),
    "value of the main": (["--epochs=0"], "--epochs: 0 is not at least 1"),
    "flag of the job": (["--node=3"], "--node=3 (did you mean --nodes?)"),
    "value of the job": (["--nodes=0"], "--nodes: 0 is not at least 1"),
    "a job's key in a recipe": (["--config={root}/recipe.yaml"], "unknown key 'partition'"),
    "local nodes": (["--local", "--nodes=2"], "--nodes 2 with --local"),
    "local GPUs": (["--local", "--ngpus=99"], "--ngpus 99, but this machine has"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_before_anything_is_submitted(
    case: str, paper_cluster: Path, tmp_path: Path, run_main
) -> None:
    flags, message = BAD[case]
    (tmp_path / "recipe.yaml").write_text("partition: main\n")
    flags = [flag.format(root=tmp_path) for flag in flags]
    code, _, err = run_main("submitit_pretrain", [f"--job_dir={tmp_path}/job", *flags])
    assert code == EXIT_BAD_INPUT and message in err and "Traceback" not in err
    assert not (paper_cluster / "sbatch").exists() and not (tmp_path / "job").exists()


def test_without_slurm(tmp_path: Path, run_main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = run_main("submitit_finetune", [f"--job_dir={tmp_path}/job"])
    assert code == EXIT_BAD_INPUT and "no sbatch and srun on the PATH" in err
    assert not (tmp_path / "job").exists()


@pytest.mark.usefixtures("paper_cluster")
def test_a_refusal_of_sbatch(tmp_path: Path, run_main) -> None:
    flags = [f"--job_dir={tmp_path}/job", "--ngpus=1", "--account=nobody"]
    code, _, err = run_main("submitit_pretrain", flags)
    assert code == EXIT_BAD_INPUT and "Slurm refused the job: " in err and "Invalid account" in err


PUBLISHED = {
    "submitit_pretrain": """--job_dir JOB_DIR --nodes 1 --use_volta32 --batch_size 100
        --model mae_vit_base_patch16 --norm_pix_loss --mask_ratio 0.75 --epochs 400
        --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 --data_path DATA""",
    "submitit_finetune": """--job_dir JOB_DIR --nodes 1 --batch_size 64 --model vit_base_patch16
        --finetune JOB_DIR/checkpoint-399.pth --epochs 100 --blr 5e-4 --layer_decay 0.65
        --weight_decay 0.05 --drop_path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --dist_eval
        --data_path DATA""",
}


@pytest.mark.parametrize("module", PUBLISHED)
def test_dry_run_of_the_published_commands(
    module: str, tmp_path: Path, run_main, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Slurm, and without a trace on the disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    words = PUBLISHED[module].split()
    code, out, err = run_main(module, [*words, "--dry_run", "--setup=module load 'a b'"])
    assert code == 0, err
    folder = tmp_path / "JOB_DIR"
    own = [w for w in words if w not in ("--job_dir", "--use_volta32", "--nodes", "1")][1:]
    command = f"{' '.join(own)} --output_dir={folder}"
    assert f"command  main_{module[9:]}.py {command}\n" in out
    lines = out.splitlines()
    for line in (
        "#SBATCH --nodes=1", "#SBATCH --gpus-per-node=8", "#SBATCH --ntasks-per-node=8",
        "#SBATCH --cpus-per-task=10", "#SBATCH --time=4320", "#SBATCH --signal=USR2@120",
        "#SBATCH --requeue", "#SBATCH --open-mode=append", "module load 'a b'",
    ):  # fmt: skip
        assert line in lines
    assert ("#SBATCH --constraint=volta32gb" in lines) == (module == "submitit_pretrain")
    assert "--partition" not in out
    (srun,) = [line for line in lines if line.startswith("srun ")]
    assert "--cpus-per-task=10 --kill-on-bad-exit=1 env --chdir=" in srun
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("answer", ["echo 'sinfo: error: Unable to contact' >&2; exit 1", None])
def test_dry_run_without_an_answer(
    answer: str | None, paper_cluster: Path, tmp_path: Path, run_main, monkeypatch
) -> None:
    folder = tmp_path / "bin"
    if answer is None:
        (folder / "srun").unlink()  # half of a Slurm
        monkeypatch.setenv("PATH", str(folder))
    else:
        (folder / "sinfo").write_text(f"#!/bin/sh\n{answer}\n")
    flags = [f"--job_dir={tmp_path}/job", "--partition=fast"]
    code, out, err = run_main("submitit_pretrain", [*flags, "--dry_run"])
    assert code == 0, err
    reason = "no sbatch and srun on the PATH" if answer is None else "Unable to contact"
    assert re.search(f"^not checked against .*{reason}", out, re.MULTILINE)
    assert "#SBATCH --partition=fast" in out.splitlines()
    assert not (tmp_path / "job").exists() and not (paper_cluster / "sbatch").exists()
    code, _, err = run_main("submitit_pretrain", flags)  # what is submitted is checked
    assert code == EXIT_BAD_INPUT and reason in err


def test_dry_run_keeps_the_flags_of_the_main(
    tmp_path: Path, run_main, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("mask_ratio: 0.5\n")
    own = ["--mean", "0.5", "0.4", "0.3", "--crop_scale", "0.3", "0.9", "--no_flip", "--seed=3"]
    flags = ["--ngpus=0", *own[:4], "--cpu_tasks", "3", *own[4:7], "--qos", "q", *own[7:]]
    flags += ["--dry_run", "--constraint=a100", "--use_volta32", "--mem_gb=1.5", "--local"]
    flags += [f"--job_dir={tmp_path}/jobs/%j"]
    code, out, err = run_main("submitit_pretrain", [*flags, f"--config={recipe}"])
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if line.startswith("command")]
    assert line.startswith(f"command  main_pretrain.py {' '.join(own)} --config={recipe} --config=")
    assert line.endswith("--device=cpu") and "/code-" in line
    assert list(tmp_path.iterdir()) == [recipe]  # nothing is written
    flags.remove("--local")
    code, out, err = run_main("submitit_pretrain", flags)
    assert code == 0, err
    for text in ("--constraint='volta32gb&a100'", "--mem=1536M", "--qos=q", "-node=3"):
        assert text in out
    assert "gpus-per-node" not in out


@pytest.mark.parametrize(
    ("resources", "gpus"),
    [("(null)", 0), ("gpu:2", 2), ("gpu:v100:4(S:0-1)", 4), ("gpu:1g.10gb:7,gpu:a100:2,fpga:1", 9)],
)
def test_gpus_of_a_node(resources: str, gpus: int) -> None:
    assert parse_gpus(resources) == gpus


@pytest.mark.parametrize(
    ("kind", "job", "again"),
    [
        (signal.SIGUSR2, "JobState=RUNNING PreemptTime=None", True),
        (signal.SIGTERM, "JobState=RUNNING PreemptTime=2026-11-22T20:00:00", True),
        (signal.SIGTERM, "JobState=RUNNING PreemptTime=None", False),  # somebody's kill
        (signal.SIGTERM, "JobState=CANCELLED PreemptTime=None", False),
        (signal.SIGTERM, "JobState=PREEMPTED PreemptTime=2026-11-22T20:00:00", False),
        (signal.SIGUSR2, None, None),  # Slurm would not
    ],
)
def test_who_queues_a_job_again(
    kind: signal.Signals,
    job: str | None,
    again: bool | None,
    paper_cluster: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    if job is not None:
        (tmp_path / "job").write_text(job)
    for name, value in {
        "SUBMITIT_EXECUTOR": "slurm",
        "SLURM_PROCID": "0",
        "SLURM_JOB_ID": "7",
    }.items():
        monkeypatch.setenv(name, value)
    with signals_kept():
        with pytest.raises(RunFailed if again is None else SystemExit) as ended:
            leave(Stopped("stopped", kind))
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN
    if again is None:
        assert "job 7 cannot be queued again: refused" in str(ended.value)
        return
    assert ended.value.code == EXIT_STOPPED
    assert ("requeue 7" in (paper_cluster / "scontrol").read_text().splitlines()) == again
