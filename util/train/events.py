"""TensorBoard's event file, written by the run itself.

torch's SummaryWriter writes from a thread of its own, whose failure is a traceback at some later
time. Records come once in a log interval: here they are written, or fail, where they are made.
"""

import os
import re
import secrets
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np

from util.files import AppendedFile


def _second(folder: Path) -> int:
    """The time for a new file's name: now, or one second behind the latest file of the folder.

    TensorBoard reads the files of a folder in the order of their names, and the later one counts
    where two hold a step. Two starts in one second, or on machines whose clocks differ, would
    leave that order to chance.
    """
    names = [re.match(r"events\.out\.tfevents\.(\d{10})\.", path.name) for path in folder.iterdir()]
    taken = [int(name[1]) for name in names if name]
    return min(max([int(time.time()), *(second + 1 for second in taken)]), 10**10 - 1)


class EventFile:
    """A new `events.out.tfevents.*` file in a folder.

    Args:
        folder: made if it is not there.
        purge_step: TensorBoard hides what earlier files of the folder hold from this step on.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.event = Event
        # The random end: the process may start anew, and another one have its number.
        end = f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"events.out.tfevents.{_second(folder):010d}.{end}"
        self.file = AppendedFile(self.path, new=True)
        self.records = RecordWriter(self.file)
        self._write(file_version="brain.Event:2")
        self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, name: str, value: float, step: int) -> None:
        """A number."""
        from torch.utils.tensorboard.summary import scalar

        self._write(step=step, summary=scalar(name, value))

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """A picture: uint8 [H, W, 3]."""
        from torch.utils.tensorboard.summary import image as summary_of

        self._write(step=step, summary=summary_of(name, image, dataformats="HWC"))

    def _write(self, **fields: Any) -> None:
        self.records.write(self.event(wall_time=time.time(), **fields).SerializeToString())

    def close(self) -> None:
        """Close the file."""
        self.file.close()
