"""What a device is asked for besides arithmetic: streams, events, random numbers, page-locked memory.

torch keeps these under the same names in a module for each kind of device: `torch.cuda` (ROCm too), `torch.xpu`,
`torch.cpu`, or one that a backend registers. On the processor a copy is done when it returns, so there its streams and
events wait for nothing. Whoever asks here needs not know which kind it has.
"""

import contextlib
import ctypes
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, Protocol

import torch
from torch._subclasses.fake_tensor import FakeTensor

CONCURRENT_MANAGED_ACCESS = 89  # CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS of cuda.h
Capability = tuple[int, int]  # of a CUDA card, major and minor: which kernels it can run


def kind(device: torch.device) -> ModuleType:
    """torch's module for the kind of `device`; for what is no card the processor's, which waits for nothing."""
    return torch.get_device_module(device) if is_card(device) else torch.cpu


def is_card(device: torch.device) -> bool:
    """Whether `device` has memory of its own, which the host's tensors have to be copied to."""
    return device.type not in ("cpu", "meta")


def is_on_card(tensor: torch.Tensor) -> bool:
    """Whether a card holds `tensor`. Paged memory, which a card reads too, is the host's here, as torch has it."""
    return is_card(tensor.device)


def reads_host_memory(device: torch.device) -> bool:
    """Whether arithmetic on `device` reads host tensors where they stand."""
    return device.type == "cpu"


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` where the processor can read it, once the card has made it; the same where it can already."""
    return tensor.to("cpu")


def cards() -> list[torch.device]:
    """The card that torch computes on; none on a machine without."""
    card = torch.accelerator.current_accelerator(check_available=True)
    return [] if card is None else [torch.device(card.type)]


def capability(device: torch.device) -> Capability | None:
    """Of a CUDA card; None for any other device, whose kernels torch chooses by other rules."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def new_stream(device: torch.device) -> Any:
    """A stream beside the one that computes; on the processor one that orders nothing."""
    return kind(device).Stream(device) if is_card(device) else torch.cpu.Stream()


def current_stream(device: torch.device) -> Any:
    """The stream to which work on `device` is now given."""
    return kind(device).current_stream(device)


def on_stream(stream: Any, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Give work on `device` to `stream`."""
    entered: contextlib.AbstractContextManager[Any] = kind(device).stream(stream)
    return entered


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all that it was told."""
    kind(device).synchronize(device)


def synchronize_cards() -> None:
    """Wait until nothing is under way on any card."""
    for card in cards():
        synchronize(card)


class Exchange(Protocol):
    """Bytes on their way between processes."""

    def wait(self) -> Any:
        """Have the stream that is current wait for them; on the processor, which has none, this thread does."""
        ...


class Copy:
    """A copy under way, beside the arithmetic of `device`.

    It holds on to the memory that it reads and writes until the arithmetic waits for it. One that is dropped before has
    the arithmetic's stream wait then, as memory that nobody names is given out again there.
    """

    def __init__(
        self,
        device: torch.device,
        arithmetic: Any,
        is_done: Any,
        memory: tuple[torch.Tensor, ...],
        exchange: Exchange | None = None,
    ):
        """`exchange` is one that no stream waits for, and so whoever wants its bytes."""
        self._device, self._arithmetic, self._is_done, self._memory = device, arithmetic, is_done, memory
        self._exchange = exchange

    def wait(self) -> None:
        """Have the arithmetic given to the device from now on wait until the copy is done."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.wait()
        current_stream(self._device).wait_event(self._is_done)
        self._memory = ()

    def synchronize(self) -> None:
        """Wait, here on the host, until the copy is done."""
        if self._is_done is not None:
            self._is_done.synchronize()

    def __del__(self) -> None:
        if self._memory and not sys.is_finalizing():
            self._arithmetic.wait_event(self._is_done)
            if self._exchange is not None:
                with contextlib.suppress(Exception):  # of what nobody wants any more
                    self._exchange.wait()


class CopyStream:
    """Copies to and from `device`, one after another, beside its arithmetic."""

    def __init__(self, device: torch.device):
        self._device, self._stream = device, new_stream(device)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Copy:
        """Start copying `source` into `target` when the arithmetic given so far is done.

        It may still make `source`, and read what stood where `target` was given its memory.
        """
        arithmetic = current_stream(self._device)
        self._stream.wait_stream(arithmetic)
        with on_stream(self._stream, self._device):
            target.copy_(source, non_blocking=True)
        return Copy(self._device, arithmetic, self._stream.record_event(), (target, source))

    def gather(self, whole: torch.Tensor, own: slice, part: torch.Tensor, begin: Callable[[], Exchange]) -> Copy:
        """Start copying `part` to its place in `whole`, and behind that the exchange that fills the rest of it, which
        `begin` gives to the stream that is current then."""
        arithmetic = current_stream(self._device)
        self._stream.wait_stream(arithmetic)
        with on_stream(self._stream, self._device):
            whole[own].copy_(part, non_blocking=True)
            exchange = begin()
            if has_streams := is_card(self._device):
                exchange.wait()
        is_done, waited_for = self._stream.record_event(), None if has_streams else exchange
        return Copy(self._device, arithmetic, is_done, (whole, part), waited_for)


def copy_each(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy every one of `sources`, here and now: what a card holds in one call, then the rest, by the processor.

    Paged memory is of that rest. The processor must not touch it while a card works: under WSL2 that ends the process.
    """
    pairs = list(zip(targets, sources, strict=True))
    of_card = [pair for pair in pairs if any(map(is_on_card, pair))]
    of_host = [pair for pair in pairs if not any(map(is_on_card, pair))]
    if of_card:
        torch._foreach_copy_([target for target, _ in of_card], [source for _, source in of_card], non_blocking=True)
    synchronize_cards()
    if of_host:
        torch._foreach_copy_([target for target, _ in of_host], [source for _, source in of_host])


def random_state(device: torch.device) -> torch.Tensor | None:
    """The state of the random numbers that `device` draws; None for the processor, whose are torch's own."""
    return kind(device).get_rng_state(device) if is_card(device) else None


def set_random_state(state: torch.Tensor, device: torch.device) -> None:
    kind(device).set_rng_state(state, device)


def compute_on(device: torch.device) -> Callable[[], None]:
    """Have this thread's work go to that card where none is named; returns how that is undone."""
    card = kind(device)
    if not hasattr(card, "set_device"):  # of a backend with one card
        return _nothing
    before = card.current_device()
    card.set_device(device)
    return lambda: card.set_device(before)


def hold_to(device: torch.device, most_bytes: int) -> Callable[[], None]:
    """Have torch's allocator take no more than `most_bytes` of a card beside what it has already: beyond that it is
    out of memory, where some drivers would go on in the host's. Returns how that is undone."""
    card = kind(device)
    if not hasattr(card, "set_per_process_memory_fraction"):  # not every backend has it
        return _nothing
    before = card.get_per_process_memory_fraction(device)
    fraction = (most_bytes + reserved_bytes(device)) / free_and_total_bytes(device)[1]
    card.set_per_process_memory_fraction(min(1.0, max(0.0, fraction)), device)
    return lambda: card.set_per_process_memory_fraction(before, device)


def _nothing() -> None:
    pass


def may_share_paged_memory(card: torch.device) -> bool | None:
    """Whether processor and card may touch paged (managed) memory at the same time; None where no driver tells.

    Not so under Windows and WSL2: there the processor's touch ends the process while the card is at work (CUDA
    programming guide, unified memory, concurrentManagedAccess).
    """
    value, handle = ctypes.c_int(), ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    if driver.cuDeviceGet(ctypes.byref(handle), card.index or 0) != 0:
        return None
    if driver.cuDeviceGetAttribute(ctypes.byref(value), CONCURRENT_MANAGED_ACCESS, handle) != 0:
        return None
    return value.value == 1


def free_cached_memory() -> None:
    """Give what torch's allocator keeps of a card's memory, and nothing uses, back to the card."""
    for card in cards():
        kind(card).empty_cache()


def free_and_total_bytes(card: torch.device) -> tuple[int, int]:
    """What is free of a card's memory, and all of it, as the driver has it."""
    free, total = kind(card).mem_get_info(card)
    return int(free), int(total)


def reserved_bytes(card: torch.device) -> int:
    """What torch's allocator holds of a card's memory, used or not."""
    return int(kind(card).memory_reserved(card))


def most_allocated_bytes(card: torch.device) -> int:
    """The most that tensors took on a card since `count_anew`."""
    return int(kind(card).max_memory_allocated(card))


def most_reserved_bytes(card: torch.device) -> int:
    """The most that torch's allocator held of a card's memory since `count_anew`."""
    return int(kind(card).max_memory_reserved(card))


def count_anew(card: torch.device) -> None:
    kind(card).reset_peak_memory_stats(card)


def page_locked(count: int, dtype: torch.dtype) -> torch.Tensor:
    """An empty host tensor of `count` elements that a card can copy to and from while it computes.

    torch's own pinned allocator rounds a size up to the next power of two, which can double it; so an ordinary tensor
    is registered with the driver. Where that is refused (a limit on locked memory) copies still work, unoverlapped.
    """
    buffer = torch.empty(count, dtype=dtype)
    if count and not isinstance(buffer, FakeTensor):  # which has no address
        unlock = lock_pages(buffer.data_ptr(), buffer.nbytes)
        if unlock is not None:
            weakref.finalize(buffer.untyped_storage(), _at_rest, unlock)
    return buffer


_when_refused: list[Callable[[], None]] = []


@contextlib.contextmanager
def when_locking_is_refused(tell: Callable[[], None]) -> Iterator[None]:
    """Inside, `tell` is called the first time that the driver refuses to lock host memory in its place."""
    _when_refused.append(tell)
    try:
        yield
    finally:
        if tell in _when_refused:
            _when_refused.remove(tell)


def lock_pages(address: int, size: int) -> Callable[[], None] | None:
    """Have the driver lock host memory in its place; what unlocks it, or None where there is no card or it refuses."""
    if not torch.cuda.is_available():
        return None
    runtime = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(address, size, 0)) != 0:
        clear_error()
        while _when_refused:
            _when_refused.pop()()
        return None

    def unlock() -> None:
        if int(runtime.cudaHostUnregister(address)) != 0:
            clear_error()

    return unlock


def _at_rest(unlock: Callable[[], None]) -> None:
    """Unlock memory that nobody names any more, once no copy can be under way there."""
    with contextlib.suppress(RuntimeError):  # to and from a card that is gone, nothing is
        synchronize_cards()
    unlock()


def clear_error() -> None:
    """Take up what a card's runtime remembers of a call that it refused. torch would raise that for the next kernel,
    whichever it is, and bitsandbytes ends the process (its `BNB_CHECK_RETURN`)."""
    for card in cards():
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=card)
