"""Work on many batches, spread over all cores: results in the order of the batches, whoever made them.

A file that is long gets processes beside this one, started anew and not forked: threads of the tokenizer's, rensa's and
torch's libraries do not survive a fork. Each works on one batch at a time, so that memory holds a batch a process. They
end with this process, by whatever it ends.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import chain, islice
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from qtune.errors import MachineError

T = TypeVar("T")
R = TypeVar("R")

BATCHES_HERE = 4  # two processes take as long to start as this many batches take
MOST_PROCESSES = 6  # reading rows and looking at results keeps this process busy with so many
SETTLED = "from qtune.fast_imports import settle_own_process; settle_own_process()"
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}


def processes_of_machine() -> int:
    """How many processes may work at a time, which is at least 1."""
    return min(len(os.sched_getaffinity(0)), MOST_PROCESSES)


def spread(
    work: Callable[[T], R], batches: Iterable[T], processes: int | None = None
) -> Generator[tuple[T, R], None, None]:
    """Every batch with what `work` makes of it. To be closed by whoever does not take all.

    The first BATCHES_HERE are worked on here, and all where there is one core, or `work` cannot be sent. Raises what
    `work` raises, and MachineError where a process ends before it is done.
    """
    rest = iter(batches)
    for batch in islice(rest, BATCHES_HERE):
        yield batch, work(batch)
    count = processes_of_machine() if processes is None else processes
    following = next(rest, None)
    if following is None:
        return
    sent = _pickled(work) if count > 1 else None
    rest = chain([following], rest)
    if sent is None:
        for batch in rest:
            yield batch, work(batch)
    else:
        yield from _in_processes(sent, rest, count)


def _pickled(work: Callable[[T], R]) -> bytes | None:
    """None for a tokenizer that is a program of its own and cannot be pickled."""
    try:
        return pickle.dumps(work)
    except Exception:  # pickling fails in as many ways as there are classes
        return None


def _in_processes(work: bytes, batches: Iterable[T], count: int) -> Iterator[tuple[T, Any]]:
    with contextlib.ExitStack() as running:
        free = [running.enter_context(contextlib.closing(Worker())) for _ in range(count)]
        for worker in free:
            worker.give(work)
        busy: deque[tuple[Worker, T]] = deque()
        for batch in batches:
            if free:
                worker, done = free.pop(), None
            else:
                worker, before = busy.popleft()
                done = before, worker.result()
            worker.give(pickle.dumps(batch))
            busy.append((worker, batch))
            if done is not None:
                yield done
        for worker, batch in busy:
            yield batch, worker.result()


class Worker:
    """A process that is given `work`, then batches, and gives back what it makes of each."""

    def __init__(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", f"{SETTLED}; from {__name__} import serve; serve({theirs.fileno()})"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                process_group=0,  # Ctrl-C is for us
            )

    def give(self, message: bytes) -> None:
        with self._said_when_it_ends():
            self._connection.send_bytes(message)

    def result(self) -> Any:
        """Raises what the work raised."""
        with self._said_when_it_ends():
            result, fault = self._connection.recv()
        if fault is not None:
            raise fault
        return result

    def close(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()

    @contextlib.contextmanager
    def _said_when_it_ends(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):
            code = self._process.wait()
            told = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            raise MachineError(
                f"A process that reads rows has ended before it was done ({told}). SIGKILL means that memory ran out:"
                " free some, and try again."
            ) from None


def serve(handle: int) -> None:
    """What a Worker's process does: work until there is nobody to work for."""
    with Connection(handle) as connection, contextlib.suppress(EOFError, ConnectionError):
        work = pickle.loads(connection.recv_bytes())
        while True:
            connection.send(_done(work, pickle.loads(connection.recv_bytes())))


def _done(work: Callable[[T], R], batch: T) -> tuple[R | None, Exception | None]:
    try:
        return work(batch), None
    except Exception as fault:
        fault.add_note(traceback.format_exc())  # a traceback stays behind when its exception is sent
        return None, fault
