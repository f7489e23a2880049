"""Submit a main to Slurm, or to this machine, with submitit; stop on its signals and come back.

Who does what: the step loop owns the signals and writes the checkpoint
(`util.train.agreement.Agreement`), all processes leave it together, and only then `Training` has
the job queued again. Every start goes on from the newest checkpoint of the run folder, so that it
does not matter who queued it again: this program, an operator (`scontrol requeue`) or Slurm itself
(preemption, a node that failed).
"""

import argparse
import hashlib
import importlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import submitit
import torch
from submitit.core.utils import FailedSubmissionError, JobPaths, UncompletedJobError
from submitit.helpers import DelayedSubmission

from util.config.flags import FlagParser, number
from util.config.recipes import read_recipe, write_recipe
from util.console import print_text
from util.errors import BadInput, RunFailed, Stopped
from util.files import build_whole, sweep
from util.flag_types import MOST_TASKS, expanded_path
from util.plugins import LOADED
from util.signals import StoppedAtStart, begin, take_signals
from util.train.advice import check_settings
from util.train.logger import prepare_folder
from util.train.task import ask, leave, leave_at_once

PROJECT = Path(__file__).resolve().parent.parent
# What a job runs: nothing else of the project is read after the submission.
CODE = ("*.py", "util/**/*.py", "recipes/**/*.yaml")
RECIPE = "submitted-recipe.yaml"
PLUGINS = "plugins"
# submitit gives up after so many time limits; a run may have any number of them.
MANY = 1_000_000
MOST_PER_NODE = 4096  # tasks, GPUs or CPUs
MOST_MINUTES = 10 * 365 * 24 * 60
MOST_MEMORY = 1_000_000  # GB of a node


def add_job_flags(parser: argparse.ArgumentParser) -> None:
    """What the job is; MAE's flags keep their names and meaning, and no site is a default."""
    group = parser.add_argument_group("job")
    group.add_argument(
        "--job_dir",
        type=expanded_path,
        default="output_dir/%j",
        help="logs of the job, and the run folder where --output_dir is not given; %%j: job number",
    )
    group.add_argument(
        "--nodes", type=number(int, 1, MOST_TASKS), default=1, help="nodes of the job"
    )
    group.add_argument(
        "--ngpus",
        type=number(int, 0, MOST_PER_NODE),
        default=8,
        help="GPUs per node, a task each; 0: CPU tasks",
    )
    group.add_argument(
        "--cpu_tasks",
        type=number(int, 1, MOST_PER_NODE),
        default=1,
        help="tasks per node with --ngpus 0",
    )
    group.add_argument(
        "--timeout",
        type=number(int, 1, MOST_MINUTES),
        default=4320,
        help="time limit in minutes; then it saves and is queued again",
    )
    group.add_argument(
        "--signal_seconds",
        type=number(int, 1, 65535),
        default=120,
        help="seconds before the time limit at which the job is told to save",
    )
    group.add_argument("--partition", help="partition to queue in; default: the cluster's")
    group.add_argument("--qos", help="quality of service; default: the cluster's")
    group.add_argument("--account", help="account that is charged; default: the cluster's")
    group.add_argument("--constraint", help="features that nodes must have; default: none")
    group.add_argument(
        "--use_volta32", action="store_true", help="short for --constraint volta32gb"
    )
    group.add_argument("--comment", help="text that Slurm keeps with the job; default: none")
    group.add_argument(
        "--mem_gb",
        type=number(float, 0, MOST_MEMORY, open_low=True),
        help="gigabytes of memory per node; default: the cluster's",
    )
    group.add_argument(
        "--cpus_per_task",
        type=number(int, 1, MOST_PER_NODE),
        help="cores of each task; default: 10 with a GPU, 1 without",
    )
    group.add_argument(
        "--setup",
        action="append",
        default=[],
        metavar="LINE",
        help="shell line to run before the tasks, such as 'module load cuda'; can be repeated",
    )
    group.add_argument(
        "--local", action="store_true", help="run on this machine, in the background"
    )
    # A main's own --dry_run says what the run costs; here it says the job as well.
    if "--dry_run" not in parser._option_string_actions:
        group.add_argument(
            "--dry_run", action="store_true", help="print the run and the job, submit nothing"
        )


@dataclass
class Training:
    """What a task of the job does; submitit pickles it.

    Args:
        module: name of the main.
        argv: its flags.
        folder: where it was submitted; relative paths are meant from there.
        port: where the tasks of a local job meet; 0: a Slurm job, which meets in a file.
    """

    module: str
    argv: list[str]
    folder: str
    port: int

    def __call__(self) -> None:
        """Run the main; queue the job again where it stopped on a signal to do so.

        Raises:
            BadInput, RunFailed: what the main raises; submitit takes the job for a failed one.
            SystemExit: stopped. submitit writes nothing, for the job is neither done nor failed.
        """
        take_signals(leave_at_once)  # submitit has just set handlers of its own
        here = submitit.JobEnvironment()
        os.chdir(self.folder)  # only now: the code was imported from the snapshot
        if here.name() == "local":
            os.environ |= local_places(here, self.port)
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        if restarts and here.global_rank == 0:
            print_text(f"job {here.job_id} starts again, restart {restarts}")
        main = importlib.import_module(self.module).main
        begin()
        try:
            # Without its wrapper, which makes exit codes of errors: submitit would miss them.
            main.__wrapped__([word.replace("%j", here.job_id) for word in self.argv])
        except (Stopped, StoppedAtStart) as stopped:
            leave(stopped)
        except (BadInput, RunFailed) as error:
            raise type(error)(str(error)) from None  # the message says it, not where it came from

    def checkpoint(self) -> DelayedSubmission:
        """What submitit asks for on a signal outside of the step loop: the same again."""
        return DelayedSubmission(self)


def local_places(here: submitit.JobEnvironment, port: int) -> dict[str, str]:
    """The variables by which torchrun would tell this task who it is."""
    return {
        "RANK": str(here.global_rank),
        "WORLD_SIZE": str(here.num_tasks),
        "LOCAL_RANK": str(here.local_rank),
        "LOCAL_WORLD_SIZE": str(here.num_tasks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


# ---- Submission --------------------------------------------------------------------------------


def job_parser(main: ModuleType, argv: Sequence[str] = ()) -> FlagParser:
    """The flags of a main and of its job together, with those of plugins that argv names."""
    parser: FlagParser = main.build_parser(argv)
    add_job_flags(parser)
    parser.description = f"Submit to Slurm: {parser.description}"
    parser.example = parser.example.replace("python main_", "python submitit_").replace(
        "--output_dir", "--nodes 1 --ngpus 8 --job_dir"
    )
    # Slurm gives the device, the job's folder is the run's, and most jobs train.
    left_out = ("config", "output_dir", "device", "resume", "eval", "predict", "input_size")
    own = [dest for dest in parser.first if dest not in left_out]
    parser.first = ("job_dir", "nodes", "ngpus", "timeout", "partition", *own)
    return parser


def submit(main: ModuleType, argv: Sequence[str] | None) -> None:
    """Check everything that can be known here, then submit, and tell how to follow the job.

    Args:
        main: module of the main, with `build_parser` and `main`.
        argv: flags of the job and of the main; None: the program's own.

    Raises:
        BadInput: a flag of either; no cluster; a partition, node or folder that is not there.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    job_parser(main, argv).parse(argv)  # help for all flags, and a hint for a mistyped one
    only_job = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_job_flags(only_job)
    job, words = only_job.parse_known_args(argv)

    parser = main.build_parser(words)
    parser.set_defaults(output_dir=None)
    settings = parser.parse(words)
    if settings.list_models:
        main.main(words)
        return
    if job.local:
        job.job_dir = job.job_dir.replace("%j", time.strftime("local-%Y%m%d-%H%M%S"))
    job_dir = Path(job.job_dir).absolute()
    shared = JobPaths.get_first_id_independent_folder(job_dir)
    if job.local:
        check_machine(job)
    else:
        check_cluster(job)

    files = project_files()
    if settings.config:
        # Whole: what it extends is not looked for again beside the snapshot.
        files[RECIPE] = write_recipe(read_recipe(Path(settings.config)))
    # They travel with the code, so that the job has them as they are now.
    plugins = {f"{PLUGINS}/{one.path.name}": one.path for one in LOADED.values()}
    files |= {name: path.read_bytes() for name, path in plugins.items()}
    code = shared / f"code-{digest(files)}"
    planned = [*words, "--dry_run"]
    if settings.config:
        words.append(f"--config={code / RECIPE}")  # the last one counts
    if plugins:
        words += ["--plugin", *(str(code / name) for name in plugins)]
    run_folder = settings.output_dir or str(job_dir)
    words.append(f"--output_dir={run_folder}")
    check_settings(vars(settings) | {"output_dir": run_folder})
    if job.ngpus == 0 and settings.device == "auto":
        words.append("--device=cpu")  # a GPU that is there all the same is not this job's
    training = Training(main.__name__, words, os.getcwd(), free_port() if job.local else 0)
    executor = create_executor(job, job_dir, code, name=f"mmae-{main.TASK}")
    if job.dry_run:
        if hasattr(settings, "dry_run_processes"):  # the main can say what the run costs
            if settings.dry_run_processes is None:
                planned.append(f"--dry_run_processes={job.nodes * count_tasks(job)}")
            planned.append(f"--output_dir={run_folder}")
            main.main.__wrapped__(planned)
            print_text()
        describe(training, code, executor)
        return

    prepare_folder(shared)
    write_code(code, files)
    try:
        submitted = executor.submit(training)
    except (UncompletedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
        raise BadInput(f"Slurm refused the job: {' '.join(str(error).split())}") from None
    tell(job, submitted, run_folder.replace("%j", submitted.job_id), code)


def count_tasks(job: argparse.Namespace) -> int:
    """Tasks per node."""
    return int(job.ngpus or job.cpu_tasks)


def count_cpus(job: argparse.Namespace) -> int:
    """CPUs per task: 10 as in MAE's code, for loading; a CPU task computes on them."""
    return int(job.cpus_per_task or (10 if job.ngpus else 1))


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def project_files() -> dict[str, bytes]:
    """The code by its path in the project."""
    found = {path for pattern in CODE for path in PROJECT.glob(pattern)}
    return {path.relative_to(PROJECT).as_posix(): path.read_bytes() for path in sorted(found)}


def digest(files: Mapping[str, bytes]) -> str:
    """A name for what is in the files."""
    total = hashlib.sha256()
    for name, content in files.items():
        total.update(f"{name}\0{len(content)}\0".encode() + content)
    return total.hexdigest()[:12]


def write_code(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the snapshot, whole or not at all; one that is there already has the same content.

    Raises:
        BadInput: it cannot be written.
    """
    if folder.exists():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder.parent)
        with build_whole(folder) as place:
            for name, content in files.items():
                path = place / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
    except OSError as error:
        if not folder.exists():  # else another submission was faster
            raise BadInput(f"cannot write {folder}: {error.strerror}; check --job_dir") from None


class _Paper(submitit.SlurmExecutor):
    """Writes sbatch files also where there is no Slurm, for --dry_run."""

    @classmethod
    def affinity(cls) -> int:
        return 2


class _PaperLocal(submitit.LocalExecutor):
    """Makes no folder, for --dry_run."""

    def __init__(self, folder: Path, **rest: Any) -> None:
        with tempfile.TemporaryDirectory() as elsewhere:
            super().__init__(elsewhere, **rest)
        self.folder = folder


def create_executor(job: argparse.Namespace, folder: Path, code: Path, name: str) -> Any:
    """submitit's executor for this job."""
    # `python -m` imports from its working directory first, and so from the snapshot. submitit adds
    # what to start, and our module starts it.
    python = shlex.join(["env", f"--chdir={code}", sys.executable, "-u", "-m", "util.train.task"])
    if job.local:
        create_local = _PaperLocal if job.dry_run else submitit.LocalExecutor
        local = create_local(folder, max_num_timeout=MANY, python=python)
        local.update_parameters(
            timeout_min=job.timeout,
            gpus_per_node=job.ngpus,
            tasks_per_node=count_tasks(job),
            signal_delay_s=job.signal_seconds,
            setup=job.setup,
        )
        return local
    constraint = "&".join(filter(None, ["volta32gb" * job.use_volta32, job.constraint]))
    parameters = {
        "job_name": name,
        "nodes": job.nodes,
        "ntasks_per_node": count_tasks(job),
        "gpus_per_node": job.ngpus or None,
        "cpus_per_task": count_cpus(job),
        "mem": None if job.mem_gb is None else f"{int(job.mem_gb * 1024)}M",
        "time": job.timeout,
        "signal_delay_s": job.signal_seconds,
        "partition": job.partition,
        "qos": job.qos,
        "account": job.account,
        "constraint": constraint or None,
        "comment": job.comment,
        "setup": job.setup or None,
        "additional_parameters": {"requeue": True},  # also where the cluster's default is not to
        # srun does not take CPUs per task from sbatch (Slurm 22.05 and later). A task that fails
        # ends the others: between GPUs they would wait for it until a timeout.
        "srun_args": [f"--cpus-per-task={count_cpus(job)}", "--kill-on-bad-exit=1"],
    }
    create = _Paper if job.dry_run else submitit.SlurmExecutor
    executor = create(folder, max_num_timeout=MANY, python=python)
    executor.update_parameters(**{k: v for k, v in parameters.items() if v is not None})
    return executor


def check_machine(job: argparse.Namespace) -> None:
    """Whether this machine can run a local job.

    Raises:
        BadInput: several nodes, or more GPUs than there are.
    """
    if job.nodes > 1:
        raise BadInput(f"--nodes {job.nodes} with --local: this is one machine")
    there = torch.cuda.device_count()
    if job.ngpus > there:
        raise BadInput(
            f"--ngpus {job.ngpus}, but this machine has {there}; give --ngpus {there}"
            f"{'' if there else ', and --cpu_tasks for their number'}"
        )


def check_cluster(job: argparse.Namespace) -> None:
    """Whether the cluster has what the job asks for, as far as that can be known.

    A dry run submits nothing, so it only notes that there was no cluster to ask.

    Raises:
        BadInput: no Slurm here; no such partition; more nodes, GPUs or CPUs than it has.
    """
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        if job.dry_run:
            print_text("not checked against a cluster: no sbatch and srun on the PATH")
            return
        raise BadInput(
            "no sbatch and srun on the PATH: submit from a machine of the cluster that has them, "
            "or give --local; without Slurm start with torchrun"
        )
    answer = ask("sinfo", "--noheader", "--format=%P|%D|%G|%c")
    if answer.returncode:
        reason = f"Slurm does not answer: {' '.join(answer.stderr.split())}"
        if job.dry_run:
            print_text(f"not checked against the cluster: {reason}")
            return
        raise BadInput(reason)
    rows = [line.split("|") for line in answer.stdout.split()]
    names = sorted({name.rstrip("*") for name, *_ in rows})
    asked = job.partition.split(",") if job.partition else []
    for name in asked:
        if name not in names:
            raise BadInput(f"--partition {name}: there is none; partitions: {', '.join(names)}")
    # Without --partition and without a default sbatch says so itself.
    usable = [r for r in rows if (r[0].rstrip("*") in asked if asked else r[0].endswith("*"))]
    if not usable:
        return
    where = job.partition or "the default partition"
    wishes: list[tuple[str, int, Callable[[list[str]], int]]] = [
        (f"--ngpus {job.ngpus}", job.ngpus, lambda row: parse_gpus(row[2])),
        (
            f"{count_tasks(job)} tasks of {count_cpus(job)} CPUs (--cpus_per_task)",
            count_tasks(job) * count_cpus(job),
            lambda row: int(row[3].rstrip("+")),
        ),
    ]
    for what, wish, has in wishes:
        most = max(map(has, usable))
        if wish > most:
            raise BadInput(f"{what}, but no node of {where} has more than {most}")
    # "%D" counts a partition's nodes of one kind.
    nodes = max(sum(int(r[1]) for r in usable if r[0] == name) for name in {r[0] for r in usable})
    if job.nodes > nodes:
        raise BadInput(f"--nodes {job.nodes}, but {where} has {nodes}")


def parse_gpus(resources: str) -> int:
    """GPUs of a node, from sinfo's `gpu:2`, `gpu:v100:4(S:0-1),gpu:a100:2` or `(null)`."""
    return sum(map(int, re.findall(r"\bgpu(?::[^:,()]+)?:(\d+)", resources)))


def describe(training: Training, code: Path, executor: Any) -> None:
    """What would be submitted."""
    print_text("dry run: nothing is submitted, nothing is written")
    print_text(f"command  {training.module}.py {shlex.join(training.argv)}")
    print_text(f"in       {training.folder}")
    print_text(f"code     {code}")
    print_text(f"folder   {executor.folder}")
    for name, value in sorted(executor.parameters.items()):
        print_text(f"  {name}: {value}")
    if isinstance(executor, submitit.SlurmExecutor):
        # Methods that submitit keeps to itself: it has no public way to see the file first.
        command = executor._submitit_command_str
        print_text(f"\n{executor._make_submission_file_text(command, uid='dry-run')}", end="")


def tell(
    job: argparse.Namespace, submitted: submitit.Job[None], run_folder: str, code: Path
) -> None:
    """Number, places, and what to type next."""
    number_of, paths = submitted.job_id, submitted.paths
    per_task = "a GPU" if job.ngpus else "CPUs only"
    print_text(
        f"job      {number_of}: {job.nodes} node{'s' * (job.nodes > 1)} x {count_tasks(job)} "
        f"task{'s' * (count_tasks(job) > 1)}, {per_task} each; at most {job.timeout} minutes at a "
        "time"
    )
    print_text(f"run      {run_folder}")
    print_text(f"code     {code}")
    print_text(f"log      {paths.stdout}\nerrors   {paths.stderr}")
    print_text(
        f"follow   tail -F {shlex.quote(str(paths.stdout))} {shlex.quote(str(paths.stderr))}"
    )
    if job.local:
        print_text(f"state    ps -p {number_of}\ncancel   kill {number_of}")
    else:
        print_text(f"state    squeue -j {number_of}\ncancel   scancel {number_of}")
