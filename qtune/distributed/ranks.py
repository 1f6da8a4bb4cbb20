"""The processes of one run, a rank each, and what they tell each other.

Every rank has the whole story of the run, and calls these at the same places of it. A call that does not come to its
end within the time limit names the rank that is late: each writes down in a store, which all can read, at which call it
has arrived. A process that is ALONE is answered at once, and loads nothing of torch.distributed.

A rank that fails says so in the store before it ends; the others end with the same error, which one of them tells.
"""

import contextlib
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from qtune.distributed.launched import Launched
from qtune.errors import MachineError, RankLost
from qtune.units import parse_seconds

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
LIMIT = "QTUNE_RANKS_LIMIT"
LIMIT_SECONDS = 600.0  # chosen: longer than any step, evaluation or save of one rank that the others wait for
FIRST_BYTES = 1024  # chosen: what a step tells fits, so that one message does; what does not has a second
BEAT_SECONDS = 0.5  # chosen: between two signs of life
SILENT_SECONDS = 2.0  # chosen: four of them
ASK_AGAIN_SECONDS = 0.1  # chosen: whether another rank is done
ASK_SECONDS = 5.0  # chosen: for an answer of the store
HEARD_SECONDS = 5.0  # chosen: for rank 0 to say what another rank failed with, and for the others to hear it


@dataclass(frozen=True)
class Ranks:
    """One of the `size` processes of a run; `local_rank` counts those on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    hosts: tuple[str, ...] = ("",)
    _wire: "Wire | None" = field(default=None, repr=False)

    @classmethod
    def join(cls, launched: Launched | None) -> "Ranks":
        """Meet the others that were launched with this process: over NCCL where there are cards, else gloo.

        Raises MachineError where they do not meet.
        """
        if launched is None:
            return ALONE
        wire = Wire.laid(launched)
        place = cls(launched.rank, launched.size, launched.local_rank, ("",) * launched.size, wire)
        wire.hosts = tuple(place.gather(socket.gethostname()))
        launched.tell_met()
        return cls(launched.rank, launched.size, launched.local_rank, wire.hosts, wire)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes the run and draws it."""
        return self.rank == 0

    def name(self, rank: int) -> str:
        """`rank 1`, and its machine where there are several."""
        return _name(rank, self.hosts)

    def gather(self, value: T) -> list[T]:
        """The small JSON-like `value` of every rank, in their order. Raises RankLost."""
        if self._wire is None:
            return [value]
        return [json.loads(each) for each in self._wire.gathered(json.dumps(value).encode())]

    def broadcast(self, value: T) -> T:
        """That of rank 0. Raises RankLost."""
        return self.gather(value if self.is_first else None)[0] if self._wire is not None else value  # type: ignore

    def share(self, dealt: Sequence[T]) -> list[T]:
        """Every N-th of what is dealt out, from that of this rank's number on."""
        return list(dealt[self.rank :: self.size])

    def in_order(self, ours: Sequence[T]) -> list[T]:
        """What all ranks made of their shares, in the order in which it was dealt out. Raises RankLost."""
        parts = self.gather(list(ours))
        whole = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            whole[rank :: self.size] = part  # type: ignore[assignment]
        return whole  # type: ignore[return-value]

    def sum_in_order(self, flat: "torch.Tensor") -> "torch.Tensor":
        """The sum over all ranks of one (n,) tensor, added up from rank 0 on, so that all get the same to the bit.

        Each rank adds up one part and hands it to all: 2 (N - 1)/N of the bytes go out of each, as in the ring of an
        all-reduce (Patarasuk and Yuan 2009), whose order differs from part to part. Where there is no memory for it,
        it can be called again: the others have not been told anything. Raises RankLost.
        """
        return flat if self._wire is None else self._wire.summed(flat)

    def exchange_parts(self, whole: "torch.Tensor") -> "Parts":
        """Begin to fill `whole`, of N equal parts, with the r-th of every rank r, which stands in its place there; more
        than one such exchange may be under way. Raises RankLost."""
        assert self._wire is not None, "of one rank a part is the whole"
        return self._wire.exchanged(whole)

    def deal_parts(self, owner: int, whole: "torch.Tensor | None", part: "torch.Tensor") -> None:
        """Fill `part` with this rank's of the N equal parts of `whole`, which rank `owner` has. Raises RankLost."""
        assert self._wire is not None, "of one rank a part is the whole"
        self._wire.dealt(owner, whole, part)

    @contextlib.contextmanager
    def one_before_others(self, what: str) -> Iterator[None]:
        """For what leaves files in a cache that all on one machine read: the first of each does it, then the others.

        However long that takes, unless it fails, or gives no sign of life for the time limit. Raises RankLost.
        """
        if self._wire is None:
            yield
            return
        host = self.hosts[self.rank]
        key = f"done {what} {host}"
        if self.local_rank != 0:
            self._wire.wait_for(key, self.hosts.index(host))
        yield
        if self.local_rank == 0:
            self._wire.note(key)

    def fail(self, sentence: str, exit_code: int) -> bool:
        """Have all end with an error of this rank; returns whether this rank is the one to tell it to the user."""
        return True if self._wire is None else self._wire.fail(sentence, exit_code)

    def leave(self) -> None:
        """After the last call of all: every rank is done."""
        if self._wire is not None:
            self.gather("done")
            self._wire.cut()


ALONE = Ranks()


def _name(rank: int, hosts: tuple[str, ...]) -> str:
    return f"rank {rank} on {hosts[rank]}" if len(set(hosts)) > 1 else f"rank {rank}"


class Wire:
    """torch's default group between the ranks, and the store in which each notes how far it has come."""

    def __init__(self, launched: Launched, store: Any, limit: float):
        self._place, self._store, self._limit = launched, store, limit
        self._calls, self.hosts = 0, ("",) * launched.size
        self._ends, self._is_deaf = threading.Event(), False
        threading.Thread(target=self._beat, name="ranks", daemon=True).start()

    @classmethod
    def laid(cls, launched: Launched) -> "Wire":
        """Raises MachineError."""
        import torch.distributed as dist

        from qtune import accelerator

        limit = limit_seconds()
        try:
            meeting = _store(launched, launched.rank == 0 and not launched.keeps_store, limit)
            store = _store(launched, False, limit)  # a connection of our own, as torch waits long on its
            store.set_timeout(timedelta(seconds=ASK_SECONDS))
            cards = accelerator.cards()
            over = f",{cards[0].type}:{_backend(cards[0])}" if cards else ""
            dist.init_process_group(
                f"cpu:gloo{over}" if over else "gloo",
                store=dist.PrefixStore("group", meeting),
                rank=launched.rank,
                world_size=launched.size,
                timeout=timedelta(seconds=limit),
            )
        except (RuntimeError, ValueError) as fault:
            if "EADDRINUSE" in str(fault):
                raise MachineError(
                    f"Port {launched.port} of this machine is taken, so the ranks cannot meet there. Name another:"
                    " MASTER_PORT for srun, --master-port or --rdzv-endpoint HOST:PORT for torchrun,"
                    " --main_process_port for accelerate launch."
                ) from fault
            where = f"{launched.address}:{launched.port}"
            raise MachineError(
                f"Rank {launched.rank} of {launched.size} did not meet the others at {where} within {limit:g} s:"
                f" {_first_line(fault)}. Every rank must reach that address, and nothing else may listen there; the"
                " launcher chooses it (torchrun --rdzv-endpoint HOST:PORT, or MASTER_ADDR and MASTER_PORT)."
            ) from fault
        return cls(launched, store, limit)

    def gathered(self, message: bytes) -> list[bytes]:
        with self._call():
            size = len(message).to_bytes(8, "big")
            first = self._all(size + message[: FIRST_BYTES - 8], FIRST_BYTES)
            sizes = [int.from_bytes(each[:8], "big") for each in first]
            longest = max(sizes)
            whole = self._all(message, longest) if longest > FIRST_BYTES - 8 else [each[8:] for each in first]
        return [each[:size] for each, size in zip(whole, sizes, strict=True)]

    def _all(self, message: bytes, length: int) -> list[bytes]:
        """`message` of every rank, filled up to `length`."""
        import torch

        ours = torch.frombuffer(bytearray(message.ljust(length, b"\0")), dtype=torch.uint8)
        all_of_them = ours.new_empty(self._place.size, length)
        _gather_into(all_of_them.view(-1), ours)
        return [each.numpy().tobytes() for each in all_of_them]

    def summed(self, flat: "torch.Tensor") -> "torch.Tensor":
        import torch

        from qtune import accelerator

        size = self._place.size
        part = -(-flat.numel() // size)
        ours = torch.nn.functional.pad(flat, (0, part * size - flat.numel()))
        of_all = torch.empty_like(ours)  # memory runs out before the others are told anything, or not at all
        if accelerator.is_on_card(flat):
            self.gathered(b"")  # a card's calls return at once and wait for ever: all are here before it is told
        with self._call():
            torch.distributed.all_to_all_single(of_all, ours)
            total, *others = of_all.view(size, part)
            for each in others:
                total += each
            _gather_into(ours, total)
        return ours[: flat.numel()]

    def exchanged(self, whole: "torch.Tensor") -> "Parts":

        own = whole.view(self._place.size, -1)[self._place.rank]
        with self._call():
            return Parts(_gather_into(whole, own, async_op=True), self)

    def dealt(self, owner: int, whole: "torch.Tensor | None", part: "torch.Tensor") -> None:
        import torch

        parts = None if whole is None else list(whole.view(self._place.size, -1))
        with self._call():
            torch.distributed.scatter(part, parts, src=owner)

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        """One call of all ranks."""
        self._calls += 1
        try:
            self._store.set(f"calls of {self._place.rank}", str(self._calls))
            yield
        except RuntimeError as fault:
            raise self.lost(fault) from fault

    def wait_for(self, key: str, rank: int) -> None:
        """Until `rank` has noted `key`."""
        beats, heard = b"", time.monotonic()
        try:
            while not self._has(key):
                if self._has("failed"):
                    raise RuntimeError("another rank failed")
                before, beats = beats, self._beats_of(rank)
                heard = heard if beats == before else time.monotonic()
                if time.monotonic() - heard > self._limit:
                    raise RuntimeError("no sign of life")
                time.sleep(ASK_AGAIN_SECONDS)
        except RuntimeError as fault:
            raise self.lost(fault) from fault

    def note(self, key: str) -> None:
        self._store.set(key, "")

    def lost(self, fault: RuntimeError) -> RankLost:
        """What the others know of why a call failed."""
        try:
            if not self._has("failed"):
                others = [rank for rank in range(self._place.size) if rank != self._place.rank]
                late = [rank for rank in others if self._calls_of(rank) < self._calls]
                silent = self._silent(others)
                said = json.dumps([*self._said(late, silent, fault), 1])
                self._ask(lambda: self._store.compare_set("failed", "", said))
            rank, sentence, exit_code = json.loads(self._told("failed"))
        except RuntimeError:
            holder = "the launcher" if self._place.keeps_store else _name(0, self.hosts).capitalize()
            rank, sentence, exit_code = 0, f"{holder} is gone, without which the ranks do not find each other.", 1
        return RankLost(sentence, rank, exit_code)

    def _said(self, late: list[int], silent: list[int], fault: RuntimeError) -> tuple[int, str]:
        """A rank to blame, and the sentence on it."""
        if silent:
            names = ", ".join(_name(rank, self.hosts) for rank in silent)
            return silent[0], f"{names.capitalize()} ended, or its machine did, without a word."
        if late:
            names = ", ".join(_name(rank, self.hosts) for rank in late)
            return late[0], (
                f"{names.capitalize()} did not come to where the others wait within {self._limit:g} s, though it lives."
                f" {LIMIT} says how long they wait (20min)."
            )
        return self._place.rank, f"The ranks lost each other: {_first_line(fault)}."

    def _calls_of(self, rank: int) -> int:
        return int(self._told(f"calls of {rank}") or 0)

    def _silent(self, ranks: list[int]) -> list[int]:
        """Those that give no sign of life."""
        before = {rank: self._beats_of(rank) for rank in ranks}
        until = time.monotonic() + SILENT_SECONDS
        while ranks and time.monotonic() < until:
            time.sleep(BEAT_SECONDS / 2)
            ranks = [rank for rank in ranks if self._beats_of(rank) == before[rank]]
        return ranks

    def _beats_of(self, rank: int) -> bytes:
        return self._told(f"beats of {rank}")

    def _has(self, *keys: str) -> bool:
        return self._ask(lambda: bool(self._store.check(list(keys))))

    def _told(self, key: str) -> bytes:
        """What is noted there; nothing where that is nothing."""
        return self._ask(lambda: bytes(self._store.get(key)) if self._store.check([key]) else b"")

    def _ask(self, question: Callable[[], T]) -> T:
        """The store's answer. Raises RuntimeError where it gives none: of a process that is stopped, or a machine that
        is cut off, torch waits for an answer for ever."""
        if self._is_deaf:
            raise RuntimeError("the store has not answered")
        answers: queue.SimpleQueue[tuple[T | None, RuntimeError | None]] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put((question(), None))
            except RuntimeError as fault:
                answers.put((None, fault))

        threading.Thread(target=ask, name="asking", daemon=True).start()
        try:
            answer, fault = answers.get(timeout=ASK_SECONDS)
        except queue.Empty:
            self._is_deaf = True
            raise RuntimeError("the store does not answer") from None
        if fault is not None:
            raise fault
        return answer  # type: ignore[return-value]

    def _beat(self) -> None:
        """A sign of life again and again."""
        count = 0
        with contextlib.suppress(RuntimeError):  # the store is gone
            while not self._ends.wait(BEAT_SECONDS):
                count += 1
                self._store.set(f"beats of {self._place.rank}", str(count))

    def fail(self, sentence: str, exit_code: int) -> bool:
        try:
            told = f"{_name(self._place.rank, self.hosts).capitalize()}: {sentence}"
            said = json.dumps([self._place.rank, told, exit_code])
            self._ask(lambda: self._store.compare_set("failed", "", said))
        except RuntimeError:
            return True
        self.cut()  # or those that wait for this rank would do so until it is gone
        ours = str(self._place.rank)
        try:
            if self._place.rank != 0:
                self._wait_a_little_for("told")
            tells = self._ask(lambda: bytes(self._store.compare_set("told", "", ours))).decode() == ours
            self._store.set(f"heard by {ours}", "")
            if self._place.rank == 0:  # with whose end the store is gone, unless a launcher has it
                lost, *_ = json.loads(self._told("failed"))
                self._wait_a_little_for(*(f"heard by {rank}" for rank in range(self._place.size) if rank != lost))
            return tells
        except RuntimeError:
            return self._place.rank == 0  # which has the store, and told before it went

    def _wait_a_little_for(self, *keys: str) -> None:
        """Until all of `keys` are noted, or they are late."""
        until = time.monotonic() + HEARD_SECONDS
        while time.monotonic() < until and not self._has(*keys):
            time.sleep(ASK_AGAIN_SECONDS)

    def cut(self) -> None:
        """No more calls."""
        import torch.distributed as dist

        self._ends.set()
        if dist.is_initialized():
            dist.destroy_process_group()


@dataclass(frozen=True)
class Parts:
    """Parts on their way between the ranks."""

    _work: Any
    _wire: Wire

    def wait(self) -> None:
        """Until they are here, or have a card's stream wait for them. Raises RankLost."""
        try:
            self._work.wait()
        except RuntimeError as fault:
            raise self._wire.lost(fault) from fault


def _gather_into(target: "torch.Tensor", ours: "torch.Tensor", async_op: bool = False) -> Any:
    """`ours` of all ranks, one behind the other."""
    import torch.distributed as dist

    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
    return gather(target, ours, async_op=async_op)


def _store(launched: Launched, is_kept_here: bool, limit: float) -> Any:
    from torch.distributed import TCPStore

    return TCPStore(
        launched.address,
        launched.port,
        is_master=is_kept_here,
        timeout=timedelta(seconds=limit),
        wait_for_workers=False,
    )


def _backend(card: "torch.device") -> str:
    """What cards of this maker talk over. Raises MachineError where this torch has not got it."""
    import torch
    import torch.distributed as dist

    backend = dist.get_default_backend_for_device(card)
    if not dist.is_backend_available(backend):
        raise MachineError(
            f"Several cards talk over {backend.upper()}, and this torch ({torch.__version__}) was built without it."
            " Install a torch that has it, as those of PyTorch's own index for Linux have, or use one card: --cards 1."
        )
    return backend


def limit_seconds() -> float:
    """How long ranks wait for one. Raises MachineError for a limit that is no time."""
    said = os.environ.get(LIMIT)
    seconds = LIMIT_SECONDS if said is None else parse_seconds(said)
    if not seconds:
        raise MachineError(f'{LIMIT} is {said!r} in the environment; it takes a time such as "20min".')
    return float(seconds)


def _first_line(fault: BaseException) -> str:
    return (str(fault).strip() or type(fault).__name__).splitlines()[0].rstrip(".")
