"""The commands of the project by the names of their modules, and the files of the program."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAINS = sorted(path.stem for path in ROOT.glob("main_*.py"))
JOBS = sorted(path.stem for path in ROOT.glob("submitit_*.py"))
LAB = ["lab.bench.command", "lab.study.command"]
COMMANDS = [*MAINS, *LAB]


def program_files() -> list[Path]:
    """The program and the laboratory, without tests."""
    patterns = ("*_*.py", "util/**/*.py", "lab/**/*.py")
    return sorted(
        path
        for pattern in patterns
        for path in ROOT.glob(pattern)
        if "tests" not in path.relative_to(ROOT).parts
    )


def words_of(command: str) -> list[str]:
    """What stands after `python` on the command line."""
    return ["-m", command.removesuffix(".command")] if command in LAB else [f"{command}.py"]
