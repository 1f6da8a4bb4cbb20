"""A file of weights made as a stream of parts: side by side, handed over in order, hashed and written beside.

Parts of a few MiB are shared out among threads, and not the work on one: threads that share an operation wait for each
other at every one, which on a busy machine took ten times as long.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from typing import Any, BinaryIO, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

Made = TypeVar("Made")
Buffer = bytes | memoryview

MOST_THREADS = 8  # more would wait for Python's lock
MADE_AHEAD = 8  # parts for each thread, made and not yet asked for
WRITTEN_BEHIND = 8  # parts handed over and not yet written
SYNCED_AT_ONCE = 1 << 27  # bytes sent to the disk together, on the way


class Digest(Protocol):
    """What hashlib makes."""

    def update(self, content: Any, /) -> None: ...


class Put(Protocol):
    """Appends bytes to a file, and to digests on the way."""

    def __call__(self, content: Buffer, *digests: Digest) -> None: ...


def in_order(jobs: Iterable[Callable[[], Made]]) -> Iterator[Made]:
    """What each of `jobs` returns, in their order, while the next ones are at work in as many threads as torch has.

    `jobs` itself is gone through by the caller's thread, a little ahead.
    """
    with _one_thread_an_operation() as threads, ThreadPoolExecutor(threads) as workers:
        waiting: deque[Future[Made]] = deque()
        try:
            for job in jobs:
                waiting.append(workers.submit(job))
                if len(waiting) > MADE_AHEAD * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for each in waiting:
                each.cancel()


@contextmanager
def _one_thread_an_operation() -> Iterator[int]:
    """The number of threads that torch had for one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield min(before, MOST_THREADS)
    finally:
        torch.set_num_threads(before)


@contextmanager
def written_beside(file: BinaryIO) -> Iterator[Put]:
    """What appends to `file` in a thread of its own; all of it is on the disk when the block ends.

    It is sent to the disk on the way, by another thread, so that there is little to wait for in the end.
    """
    waiting: deque[Future[None]] = deque()
    synced: list[Future[None]] = []

    def append(content: Buffer, *digests: Digest) -> None:
        for digest in digests:
            digest.update(content)
        before = file.tell()
        file.write(content)
        if file.tell() // SYNCED_AT_ONCE > before // SYNCED_AT_ONCE:
            synced.append(syncing.submit(os.fsync, file.fileno()))

    def put(content: Buffer, *digests: Digest) -> None:
        waiting.append(beside.submit(append, content, *digests))
        if len(waiting) > WRITTEN_BEHIND:
            waiting.popleft().result()

    with ThreadPoolExecutor(max_workers=1) as syncing, ThreadPoolExecutor(max_workers=1) as beside:
        yield put
        for each in chain(waiting, synced):
            each.result()
    file.flush()
    os.fsync(file.fileno())


def as_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """The bytes of a tensor in host memory, in its own order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
