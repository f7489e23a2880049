"""Child processes that measure when they are asked: each fresh, with memory of its own."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from util.errors import BadInput, RunFailed

# What a child builds once and then answers with: a request to a picklable answer.
Answer = Callable[[Any], Any]


def _serve(link: Any, threads: int, build: Callable[..., Answer], given: Sequence[Any]) -> None:
    """In the child: build, say so, then answer until the parent hangs up."""
    torch.set_num_threads(threads)
    try:
        answer = build(*given)
        link.send((None, None))
        while (request := link.recv()) is not None:
            link.send((None, answer(request)))
    except EOFError:  # the parent is gone
        return
    except BadInput as error:
        link.send((BadInput, str(error)))
    except Exception as error:
        link.send((RunFailed, f"{type(error).__name__}: {error}"))
        raise


def preload_children() -> None:
    """Have the process that children are forked from import torch once, for all of them.

    It is set for the whole program: for a command to call in a process of its own, not for a class
    that others use beside fork servers of theirs.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["torch", "torchvision", "timm"]
    )


class Children:
    """Processes that work on every request together, one of them mostly.

    Args:
        name: for messages.
        build: called in each child with (rank, *given); returns what answers. Must be picklable.
        given: picklable arguments.
        count: children; each gets its rank.
        threads: of torch in each.
        wait: until they are built; otherwise `hear` waits, so that others can be built meanwhile.

    Raises:
        BadInput: a child said so.
        RunFailed: a child died.
    """

    def __init__(
        self,
        name: str,
        build: Callable[..., Answer],
        *given: Any,
        count: int = 1,
        threads: int,
        wait: bool = True,
    ) -> None:
        # Threads that wait by spinning would take the cores from whose turn it is.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # Forked from a process that has only imported: as clean as a new one, and there at once.
        context = multiprocessing.get_context("forkserver")
        self.name = name
        self.links, self.processes = [], []
        for rank in range(count):
            link, far = context.Pipe()
            process = context.Process(target=_serve, args=(far, threads, build, (rank, *given)))
            process.start()
            far.close()
            self.links.append(link)
            self.processes.append(process)
        if wait:
            self.hear()

    def ask(self, request: Any) -> list[Any]:
        """What each child answers, by rank; they work at the same time."""
        self.tell(request)
        return self.hear()

    def tell(self, request: Any) -> None:
        """Ask without waiting for the answer, which `hear` gives."""
        for link in self.links:
            link.send(request)

    def hear(self) -> list[Any]:
        """What each child answers, by rank."""
        answers = []
        for link, process in zip(self.links, self.processes, strict=True):
            try:
                fault, answer = link.recv()
            except (EOFError, OSError):
                process.join()
                self.close()
                raise RunFailed(
                    f"the process that measured {self.name} ended with code {process.exitcode} "
                    "(-9: out of memory, most likely; lower --batch_size)"
                ) from None
            if fault is not None:
                self.close()
                named = f"the process that measured {self.name}: " if fault is RunFailed else ""
                raise fault(named + answer)
            answers.append(answer)
        return answers

    def close(self) -> None:
        """Let them end, and wait for it."""
        for link in self.links:
            try:
                link.send(None)
            except OSError:
                continue  # it is gone already
        for process in self.processes:
            process.join(60)
            if process.is_alive():
                process.kill()
                process.join()
