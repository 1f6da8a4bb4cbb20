"""Work shared out among threads comes back in its order, and a file has every byte of it."""

import hashlib
import os
import threading
import time

import pytest
import torch

from qtune.merge import parallel_writer
from qtune.merge.parallel_writer import as_bytes, in_order, written_beside


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def slow_first(number: int) -> int:
    """The earlier, the longer."""
    time.sleep(0.02 / (number + 1))
    return number


def test_results_come_in_the_order_of_their_jobs(two_threads) -> None:
    assert list(in_order((lambda n=n: slow_first(n)) for n in range(40))) == list(range(40))


def test_two_jobs_are_at_work_at_once_each_with_one_thread_an_operation(two_threads) -> None:
    """Each waits for the other: one after the other they would wait for ever."""
    both = threading.Barrier(2, timeout=20)

    def job() -> int:
        both.wait()
        return torch.get_num_threads()

    assert list(in_order([job, job])) == [1, 1]


def test_jobs_are_asked_for_a_little_ahead_and_no_more(two_threads) -> None:
    asked = []

    def jobs():
        for number in range(1000):
            asked.append(number)
            yield lambda: None

    results = in_order(jobs())
    next(results)
    assert len(asked) == 2 * parallel_writer.MADE_AHEAD + 1
    results.close()


def test_the_first_fault_is_raised_in_its_place(two_threads) -> None:
    def fail() -> int:
        raise ValueError("seven")

    results = in_order([(lambda n=n: n) for n in range(7)] + [fail] * 20)
    assert [next(results) for _ in range(7)] == list(range(7))
    with pytest.raises(ValueError, match="seven"):
        next(results)


def test_bytes_are_appended_and_hashed_in_order(tmp_path) -> None:
    contents = [bytes([number]) * 1000 for number in range(100)]
    every, even = hashlib.sha256(), hashlib.sha256()
    with (tmp_path / "x").open("wb") as file, written_beside(file) as put:
        for number, content in enumerate(contents):
            put(content, *([every, even] if number % 2 == 0 else [every]))
    assert (tmp_path / "x").read_bytes() == b"".join(contents)
    assert every.hexdigest() == hashlib.sha256(b"".join(contents)).hexdigest()
    assert even.hexdigest() == hashlib.sha256(b"".join(contents[::2])).hexdigest()


def write_into(path: str) -> None:
    with open(path, "wb", buffering=0) as file, written_beside(file) as put:
        for _ in range(1000):
            put(b"x" * 100)


class SlowDisk:
    """A file whose every write takes a while, and which knows how much had been handed over by then."""

    def __init__(self, path) -> None:
        self.file = path.open("wb", buffering=0)
        self.handed = self.written = self.most_waiting = 0

    def write(self, content: bytes) -> None:
        time.sleep(0.002)
        self.most_waiting = max(self.most_waiting, self.handed - self.written)
        self.file.write(content)
        self.written += 1

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)


def test_a_slow_disk_holds_up_who_hands_over(tmp_path) -> None:
    """Else the parts of a whole model wait in memory."""
    disk = SlowDisk(tmp_path / "x")
    with disk.file, written_beside(disk) as put:  # type: ignore[arg-type]
        for _ in range(200):
            disk.handed += 1
            put(b"x")
    assert (tmp_path / "x").read_bytes() == b"x" * 200
    assert 1 < disk.most_waiting <= parallel_writer.WRITTEN_BEHIND + 1


def test_it_goes_to_the_disk_on_the_way(tmp_path, monkeypatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    monkeypatch.setattr(parallel_writer, "SYNCED_AT_ONCE", 40_000)
    write_into(str(tmp_path / "x"))
    assert len(synced) == 3
    assert synced[-1] == 100_000


def test_a_disk_that_fails_on_the_way_is_told(tmp_path, monkeypatch) -> None:
    results = iter([OSError("the disk is gone"), None, None])

    def fail_once(handle: int) -> None:
        if fault := next(results):
            raise fault

    monkeypatch.setattr(os, "fsync", fail_once)
    monkeypatch.setattr(parallel_writer, "SYNCED_AT_ONCE", 40_000)
    with pytest.raises(OSError, match="gone"):
        write_into(str(tmp_path / "x"))


def test_a_full_disk_is_told() -> None:
    with pytest.raises(OSError, match="No space"):
        write_into("/dev/full")


def test_a_transposed_tensor_is_in_its_own_order() -> None:
    tensor = torch.arange(6, dtype=torch.uint8).reshape(2, 3).T
    assert bytes(as_bytes(tensor)) == bytes([0, 3, 1, 4, 2, 5])
