"""Work for processes beside the tests, which import this and little more."""

import os
import time

from qtune.errors import DataError


def doubled(batch: int) -> int:
    time.sleep(0.03 if batch % 3 == 0 else 0)  # so that later batches are done first
    return 2 * batch


def whose(batch: int) -> int:
    return os.getpid()


def refuse(batch: int) -> int:
    if batch == 7:
        raise DataError("rows.jsonl:7: is seven.")
    return batch


def end(batch: int, by: int) -> int:
    if batch == 7:
        os.kill(os.getpid(), by)
    return batch
