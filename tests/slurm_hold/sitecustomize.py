"""Python reads this as it starts in test_slurm's jobs, which have its folder on PYTHONPATH.

In the first start of a job every process stays in step $MMAE_TEST_HOLD until the step loop has
noted a signal, which so comes in the middle of an epoch, however fast or slow machine and cluster.
"""

import os
import signal
import time

STEP = int(os.environ.get("MMAE_TEST_HOLD", "0"))


def hold_in_step() -> None:
    import torch

    original, steps = torch.optim.AdamW.step, [0]

    def step(self, *args, **kwargs):
        steps[0] += 1
        if steps[0] == STEP:
            loop = getattr(
                signal.getsignal(signal.SIGUSR2), "__self__", None
            )  # util.dist.Agreement
            deadline = time.monotonic() + 200
            while loop is not None and not loop.signal and time.monotonic() < deadline:
                time.sleep(0.05)
        return original(self, *args, **kwargs)

    torch.optim.AdamW.step = step


if STEP and "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    hold_in_step()
