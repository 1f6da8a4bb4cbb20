"""Are copies beside arithmetic ordered? Found out without a card, by vector clocks.

Operations run at once, on the processor. Which stream they would run on, and what that stream has waited for, is kept
as a clock: for each stream, up to which of its operations another has seen it come. A dispatch mode sees what every
operation reads and writes, by storage, and that each comes after the last one in its way. Memory is checked where it
ends, too: a card's goes back to the stream it was born on, which may give it out again at once, and the host's to
nobody knows whom. The host is one more clock, that of whoever gives the orders.

A wait is known by its site: the function outside `qtune.accelerator` that asked for it, and the kind of wait; what is
waited for as memory ends, by the function in there. One that is `without` does nothing, as if it were not written.
"""

import contextlib
import gc
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from qtune import accelerator

DEVICE, PAGE_LOCKED, PAGED, PAGEABLE = "device", "page-locked", "paged", "pageable"
READ_BY_THE_HOST = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"}  # what they give depends on the values
SHAPES_ONLY = {"empty_like", "new_empty", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"}
COPIES = {"copy_", "_to_copy", "_foreach_copy_", "clone"}
COPY_WAITS, ARITHMETIC_WAITS = "copy waits", "arithmetic waits"
HOST_WAITS, ALL_WAIT = "host waits", "host waits for all"
AT_THE_END = {"Copy.__del__", "_at_rest"}  # of accelerator; whose frame is behind them is chance


class Clock(dict[int, int]):
    """Up to which operation each stream is known to have come."""

    def learn(self, other: "Clock") -> None:
        for stream, time in other.items():
            self[stream] = max(time, self.get(stream, 0))

    def knows(self, use: tuple[int, int]) -> bool:
        stream, time = use
        return self.get(stream, 0) >= time


@dataclass
class Use:
    """Where one storage is, the stream it was born on, and who used it last."""

    shape: tuple[int, ...]
    born_on: int
    place: str = DEVICE
    write: tuple[int, int] | None = None
    reads: Clock = field(default_factory=Clock)
    watch: Any = None

    def last_uses(self) -> list[tuple[int, int]]:
        return [*self.reads.items(), *([self.write] if self.write else [])]


class Raced(Exception):
    """There was a race, which is all that was asked."""


@dataclass
class Event:
    clocks: "StreamClocks"
    clock: Clock

    def synchronize(self) -> None:
        if self.clocks.is_done(HOST_WAITS):
            self.clocks.host.learn(self.clock)


class Stream:
    def __init__(self, clocks: "StreamClocks"):
        self.clocks, self.number = clocks, len(clocks.streams)
        self.clock = Clock({self.number: 0})
        clocks.streams.append(self)

    def next_operation(self) -> None:
        """What the host knows has happened when it gives an order."""
        self.clock.learn(self.clocks.host)
        self.clock[self.number] += 1

    def wait_event(self, event: Event) -> None:
        if self.clocks.is_done(ARITHMETIC_WAITS):
            self.clock.learn(event.clock)

    def wait_stream(self, other: "Stream") -> None:
        if self.clocks.is_done(COPY_WAITS):
            self.clock.learn(other.clock)

    def record_event(self) -> Event:
        return Event(self.clocks, Clock(self.clock))


class StreamClocks(TorchDispatchMode):
    """Stands in for a card while it is entered; `races` are sentences, `waits` how often each site waited.

    Memory runs out in the operation that is `fails_at` in their count, once. Where a wait is taken away, `without` it,
    the first race ends what runs by `Raced`.
    """

    def __init__(self, without: tuple[str, str] | None = None):
        super().__init__()
        self.without = without
        self.races: list[str] = []
        self.waits: Counter[tuple[str, str]] = Counter()
        self.operations, self.fails_at = 0, -1
        self.host, self.streams = Clock(), list[Stream]()
        self._computing = Stream(self)
        self._current = [self._computing]
        self._uses: dict[int, Use] = {}
        self._replaced = pytest.MonkeyPatch()

    def __enter__(self) -> "StreamClocks":
        self._page_locked = accelerator.page_locked
        for name in ("current_stream", "new_stream", "on_stream", "synchronize_cards", "page_locked", "to_host"):
            self._replaced.setattr(accelerator, name, getattr(self, name))
        self._replaced.setattr(accelerator, "lock_pages", lambda address, size: lambda: None)
        self._replaced.setattr(accelerator, "is_on_card", lambda tensor: self.use_of(tensor).place == DEVICE)
        self._replaced.setattr(accelerator, "reads_host_memory", lambda device: False)
        return super().__enter__()

    def __exit__(self, *fault: Any) -> None:
        super().__exit__(*fault)
        self._replaced.undo()
        self._uses.clear()

    # What stands in for qtune.accelerator.

    def current_stream(self, device: torch.device) -> Stream:
        return self._current[-1]

    def new_stream(self, device: torch.device) -> Stream:
        return Stream(self)

    @contextlib.contextmanager
    def on_stream(self, stream: Stream, device: torch.device) -> Iterator[None]:
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()

    def synchronize_cards(self) -> None:
        if self.is_done(ALL_WAIT):
            for stream in self.streams:
                self.host.learn(stream.clock)

    def page_locked(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        return self.in_host_memory(self._page_locked(count, dtype), PAGE_LOCKED)

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.use_of(tensor).place != DEVICE:
            return tensor
        copied = self.in_host_memory(tensor.clone(), PAGEABLE)
        self.host.learn(self._current[-1].clock)
        return copied

    # What is kept of storages.

    def in_host_memory(self, tensor: torch.Tensor, place: str) -> torch.Tensor:
        """`tensor`, known to be in host memory that is page-locked, paged or pageable."""
        use = self.use_of(tensor)
        use.place, use.write, use.reads = place, None, Clock()
        return tensor

    def use_of(self, tensor: torch.Tensor, born_on: int = 0) -> Use:
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._uses.get(key)
        if known is not None and known.watch() is storage:
            return known
        use = Use(tuple(tensor.shape), born_on)
        use.watch = weakref.ref(storage, lambda _: self._died(key, use))
        self._uses[key] = use
        return use

    def is_done(self, kind: str) -> bool:
        """Note a wait at the site that asks for it; whether it is done."""
        frame = sys._getframe(1)
        while frame.f_globals["__name__"] in (__name__, accelerator.__name__):
            if frame.f_code.co_qualname in AT_THE_END or frame.f_back is None:
                break
            frame = frame.f_back
        site = (frame.f_code.co_qualname, kind)
        self.waits[site] += 1
        return site != self.without

    def _died(self, key: int, use: Use) -> None:
        if self._uses.get(key) is use:
            del self._uses[key]
        known = Clock(self.host)
        if use.place == DEVICE:  # whoever is given the memory next is told so by the host, and comes after its stream
            known.learn(self.streams[use.born_on].clock)
        if use.place in (DEVICE, PAGE_LOCKED) and not all(known.knows(last) for last in use.last_uses()):
            self._race(f"{use.place} memory of {use.shape} ended while a stream may still use it")

    def _race(self, sentence: str) -> None:
        if sentence not in self.races:
            self.races.append(sentence)

    # What operations do.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.without and self.races:
            raise Raced
        self.operations += 1
        if self.operations == self.fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        result = func(*args, **kwargs)
        is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        if not is_view:
            name = func._overloadpacket.__name__
            read, written = ([], []) if name in SHAPES_ONLY else self._touched(func._schema, args, kwargs)
            self._note(name, read, written, [leaf for leaf in tree_iter(result) if isinstance(leaf, torch.Tensor)])
        return result

    def _note(
        self, name: str, read: list[torch.Tensor], written: list[torch.Tensor], results: list[torch.Tensor]
    ) -> None:
        """One operation: by the host if that has all that it touches, else on the current stream."""
        stream = self._current[-1]
        places = {self.use_of(tensor).place for tensor in (*read, *written)}
        there = {id(tensor.untyped_storage()) for tensor in written}
        born = [tensor for tensor in results if id(tensor.untyped_storage()) not in there]
        if places and DEVICE not in places:
            self._by_the_host(name, read, written)
            for tensor in born:
                self.in_host_memory(tensor, PAGEABLE)
            return
        for tensor in born:
            self.use_of(tensor, born_on=stream.number)
        if places - {DEVICE, PAGED} and name not in COPIES:
            self._race(f"{name} is given tensors of the card and of the host")
        self._on_a_stream(name, read, [*written, *born])
        if name in READ_BY_THE_HOST or any(self.use_of(tensor).place == PAGEABLE for tensor in written):
            self.host.learn(stream.clock)

    def _touched(self, schema: Any, args: Any, kwargs: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The tensors that an operation reads and those that it writes."""
        read: list[torch.Tensor] = []
        written: list[torch.Tensor] = []
        for place, argument in enumerate(schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            tensors = [leaf for leaf in tree_iter(value) if isinstance(leaf, torch.Tensor)]
            (written if is_written else read).extend(tensors)
        return read, written

    def _on_a_stream(self, name: str, read: list[torch.Tensor], written: list[torch.Tensor]) -> None:
        stream = self._current[-1]
        stream.next_operation()
        now = (stream.number, stream.clock[stream.number])
        self._in_order(f"{name} on stream {stream.number}", stream.clock, read, written)
        for tensor in read:
            self.use_of(tensor).reads[now[0]] = now[1]
        for tensor in written:
            use = self.use_of(tensor)
            use.write, use.reads = now, Clock()

    def _by_the_host(self, name: str, read: list[torch.Tensor], written: list[torch.Tensor]) -> None:
        self._in_order(f"{name} by the host", self.host, read, written)
        is_paged = any(self.use_of(tensor).place == PAGED for tensor in (*read, *written))
        if is_paged and not all(self.host.knows((s.number, s.clock[s.number])) for s in self.streams):
            self._race(f"{name} by the host touches paged memory while the card works")

    def _in_order(self, who: str, clock: Clock, read: list[torch.Tensor], written: list[torch.Tensor]) -> None:
        for verb, tensors in (("reads", read), ("writes", written)):
            for use in map(self.use_of, tensors):
                if use.write is not None and not clock.knows(use.write):
                    self._race(f"{who} {verb} {use.shape}, which stream {use.write[0]} may still be writing")
                if verb == "writes":
                    for stream, _ in (last for last in use.reads.items() if not clock.knows(last)):
                        self._race(f"{who} writes {use.shape}, which stream {stream} may still be reading")


def run_with_clocks(act: Callable[[StreamClocks], None], without: tuple[str, str] | None = None) -> StreamClocks:
    """The clocks when `act` is over and all that it held is gone."""
    clocks = StreamClocks(without)
    with clocks, contextlib.suppress(Raced):
        act(clocks)
        gc.collect()
    return clocks
