"""Python reads this as it starts in test_slurm's jobs, which have its folder on PYTHONPATH.

In the first start of a job that gets so far every process stays in step $MMAE_TEST_HOLD until the
step loop has noted a signal, which so comes in the middle of an epoch, however fast or slow machine
and cluster.
With $MMAE_TEST_HOLD_IMPORT every process stays in the import of that module instead, long before
the loop. The file $MMAE_TEST_HELD.RANK says that it does.
"""

import os
import signal
import sys
import time

MODULE = os.environ.get("MMAE_TEST_HOLD_IMPORT", "")
STEP = int(os.environ.get("MMAE_TEST_HOLD", "0"))


def hold_in_step(mark: str) -> None:
    import torch

    original, steps = torch.optim.AdamW.step, [0]

    def step(self, *args, **kwargs):
        steps[0] += 1
        if steps[0] == STEP:
            open(mark, "w").close()
            loop = getattr(
                signal.getsignal(signal.SIGUSR2), "__self__", None
            )  # util.train.dist.Agreement
            deadline = time.monotonic() + 200
            while loop is not None and not loop.signal and time.monotonic() < deadline:
                time.sleep(0.05)
        return original(self, *args, **kwargs)

    torch.optim.AdamW.step = step


class HeldImport:
    """A finder of modules that finds none, and never comes back from looking for one."""

    def find_spec(self, name, path=None, target=None):
        if name == MODULE:
            rank = os.environ.get("SLURM_PROCID", "0")
            open(f"{os.environ['MMAE_TEST_HELD']}.{rank}", "w").close()
            deadline = time.monotonic() + 200
            while time.monotonic() < deadline:
                time.sleep(0.05)
        return None


if MODULE and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    sys.meta_path.insert(0, HeldImport())
elif STEP and "SLURM_STEP_ID" in os.environ:
    cluster, job = os.path.dirname(os.environ["SLURM_CONF"]), os.environ["SLURM_JOB_ID"]
    if not os.path.exists(f"{cluster}/held-{job}"):
        hold_in_step(f"{cluster}/held-{job}")
