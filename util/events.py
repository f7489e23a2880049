"""TensorBoard's event file, written by the run itself.

torch's SummaryWriter writes from a thread of its own, whose failure is a traceback at some later
time. Records come once in a log interval: here they are written, or fail, where they are made.
"""

import os
import secrets
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np

from util.files import AppendedFile


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
        self.path = folder / f"events.out.tfevents.{int(time.time()):010d}.{end}"
        folder.mkdir(parents=True, exist_ok=True)
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
