"""Run folders that several tests start from: each is trained once per test run, by one lane."""

import fcntl
import hashlib
import importlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from launch import launch, wait
from runs import signals_kept


class Trained:
    """``trained("main_pretrain", flags) -> run folder``, which is for reading only.

    A test that changes something in it, or runs a command there, copies it first.

    Args:
        root: the folder that all lanes of a test run share.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, module: str, argv: Sequence[str], world: int = 1) -> Path:
        """Train on the first call with these flags, in whichever lane that is; others wait for it.

        Args:
            world: processes; one trains in this process, several are launched.
        """
        name = hashlib.sha256(repr((module, list(argv), world)).encode()).hexdigest()[:12]
        folder, done = self.root / f"trained-{name}", self.root / f"trained-{name}.done"
        with (self.root / f"trained-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a lane that failed
                self._train(module, [*argv, f"--output_dir={folder}"], world, folder)
                done.touch()
        return folder

    def _train(self, module: str, argv: list[str], world: int, folder: Path) -> None:
        if world > 1:
            out = folder.with_suffix(".out")
            assert wait(launch(argv, out, world, module=module)) == [0] * world, out.read_text()
            return
        with signals_kept():
            importlib.import_module(module).main(argv)
