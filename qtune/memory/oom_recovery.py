"""When memory runs out in a pass: what failed is freed, and the same optimizer step is done again with less.

Less means, in this order: every batch in twice as many pieces, cut between documents, until the piece that failed is a
single document; then the next memory technique that `climb` has to offer. Both last for the rest of the run. The
gradient of a step is a sum over its tokens, so pieces change neither the step nor the effective batch, to rounding;
without pieces, a step that is done again is equal to the bit, dropout included. With dropout, pieces draw other masks.

Costs: nothing until memory runs out; then the part of the step that was done already, once more.
Refuses: with OutOfMemory, when one document does not fit and nothing is left to switch on.
"""

import contextlib
import errno
import gc
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from qtune import accelerator
from qtune.errors import OutOfMemory, QtuneError
from qtune.events import Event, Listener, Notice
from qtune.memory import rng_state
from qtune.memory.rng_state import RandomState
from qtune.memory.split_batch import split_batch
from qtune.train.optimizers import leanest

Batch = dict[str, Any]
NextTechnique = Callable[[], str | None]

SPELLINGS = re.compile(
    r"\bout of memory\b"  # CUDA, HIP, XPU, MPS, the driver, bitsandbytes
    r"|ErrorMemoryAllocation|ErrorOutOfMemory|CUDA_ERROR_OUT_OF_MEMORY"
    r"|\b(cu|hip|mi)[a-z]+(_status)?(_[a-z]+)*_alloc(ation)?_failed\b"  # the libraries: BLAS, DNN, SOLVER, SPARSE, RAND
    r"|\b(cu|hip)blas_status_not_initialized when calling .?(cu|hip)blasCreate"  # a handle that found no memory
    r"|\bcudnn_status_not_initialized\b"  # the same
    r"|CPUAllocator: (can't allocate|not enough) memory|\bcannot allocate memory\b"
    r"|NVML_SUCCESS == \w+ INTERNAL ASSERT",  # torch's allocator, asking the driver why it got nothing
    re.IGNORECASE,
)


def pieces_to_begin_with(documents_apart: bool) -> int:
    """Into how many pieces batches are cut before memory has run out: none, or one for every document."""
    return sys.maxsize if documents_apart else 1  # more than any batch has documents


def is_out_of_memory(fault: BaseException) -> bool:
    """Whether `fault`, or one that it wraps or came of, says that memory ran out, on the card or on the host."""
    if not isinstance(fault, Exception) or isinstance(fault, QtuneError):
        return False
    return any(_says_out_of_memory(link) for link in _chain(fault))


def _says_out_of_memory(fault: BaseException) -> bool:
    if isinstance(fault, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(fault, OSError):
        return fault.errno == errno.ENOMEM
    return isinstance(fault, RuntimeError) and SPELLINGS.search(str(fault)) is not None


def _chain(fault: BaseException | None) -> Iterator[BaseException]:
    """`fault`, what caused it, what caused that; a chain may bite its own tail."""
    seen: set[int] = set()
    while fault is not None and id(fault) not in seen:
        seen.add(id(fault))
        yield fault
        fault = fault.__cause__ or (None if fault.__suppress_context__ else fault.__context__)


def let_go(fault: BaseException) -> None:
    """Drop what the frames that `fault` passed through hold: the activations of the pass that failed."""
    for link in _chain(fault):
        traceback.clear_frames(link.__traceback__)
        link.__traceback__ = None


def free_memory() -> None:
    """Give what nothing refers to any more back to the device."""
    gc.collect()
    accelerator.free_cached_memory()


class LowestNode:
    """A graph of one node, older than every pass that is made after it, by which what a failed pass left is found.

    torch's engine leaves what it had still to do in its queue, and the activations with it. It works the newest node
    off first, so that a backward pass through an old one goes by all the others, and drops those of a dead pass.
    """

    def __init__(self) -> None:
        devices = [torch.device("cpu"), *accelerator.cards()]
        with torch.inference_mode(False), torch.enable_grad():
            self._starts = [torch.zeros((), device=device, requires_grad=True) for device in devices]
            self._nodes = [start.view_as(start) for start in self._starts]
        self._ones = [torch.ones_like(start) for start in self._starts]

    def drain(self) -> None:
        """Empty the queues of this thread and of the card."""
        for node, start, one in zip(self._nodes, self._starts, self._ones, strict=True):
            torch.autograd.grad(node, start, one, retain_graph=True)


def nothing_left() -> None:
    return None


def unheard(event: Event) -> None:
    pass


@dataclass
class Recovery:
    """What can still be given up when memory runs out, and how it is told. Training and evaluation have one each.

    `climb` switches a further memory technique on in the live model and returns a sentence on it, or None when none is
    left. `forget_pass` drops what the techniques keep of a pass that did not come to its end. Batches are run in
    `pieces`, or as many as they have documents, of which so many stay `together`.
    """

    listen: Listener = unheard
    climb: NextTechnique = nothing_left
    forget_pass: Callable[[], None] = nothing_left
    pieces: int = 1
    together: int = 1
    _lowest: LowestNode = field(default_factory=LowestNode, init=False, repr=False)

    def after_pass(self, where: str, phase: str, documents: Sequence[int]) -> None:
        """Take less memory from now on; `documents` are the lengths, in tokens, of the piece that failed.

        Raises OutOfMemory when there is nothing left to give up.
        """
        self._free()
        if len(documents) > self.together:
            self.pieces *= 2
            done = f"every batch in up to {self.pieces} pieces from here on"
        else:
            done = self.climb() or _refuse(_one_document_too_long(where, phase, documents))
        self._tell(where, phase, done)

    def after_optimizer_step(self, where: str, is_first: bool) -> None:
        """Free memory for the optimizer step to be taken again; after the `is_first` time, climb too.

        Raises OutOfMemory when there is nothing left to give up.
        """
        self._free()
        phase = "optimizer step"
        freed = "unused memory was given back first"
        self._tell(where, phase, freed if is_first else self.climb() or _refuse(_optimizer_too_large(where)))

    def _free(self) -> None:
        accelerator.clear_error()
        self.forget_pass()
        self._lowest.drain()
        free_memory()

    def _tell(self, where: str, phase: str, done: str) -> None:
        self.listen(Notice(f"{where} ran out of memory in the {phase} and is done again: {done}"))


def _refuse(sentence: str) -> NoReturn:
    raise OutOfMemory(sentence)


def _one_document_too_long(where: str, phase: str, documents: Sequence[int]) -> str:
    tokens, what = sum(documents), "document" if len(documents) == 1 else "pair"
    return (
        f"{where} ran out of memory in the {phase} with nothing but one {what} of {tokens:,} tokens, and no memory"
        f" technique is left to switch on. The adapter is that of the last whole step. Set data.max_tokens to"
        f" {max(8, tokens // 2)} (data.on_long says what becomes of longer rows), or take a smaller base."
    )


def _optimizer_too_large(where: str) -> str:
    return (
        f"{where} ran out of memory in the optimizer step, and no memory technique is left to switch on. The adapter is"
        " that of the last whole step. Lower lora.rank or name fewer lora.targets; of the optimizers,"
        f' train.optimizer = "{leanest().name}" takes the least.'
    )


@contextlib.contextmanager
def refusing(where: Callable[[], str]) -> Iterator[None]:
    """Memory that runs out inside, where nothing can be done again, becomes an OutOfMemory."""
    try:
        yield
    except Exception as fault:
        if not is_out_of_memory(fault):
            raise
        reason = next(str(link) for link in _chain(fault) if _says_out_of_memory(link))
        raise OutOfMemory(
            f"{where()} ran out of memory between its passes ({(reason or type(fault).__name__).splitlines()[0]}). The"
            " adapter is that of the last whole step. Close what else uses this memory, or lower data.max_tokens or"
            " lora.rank."
        ) from fault


class OpenStep:
    """The batches of one optimizer step, run in the order they come, and all of them again when memory runs out.

    `drop_gradients` drops those of every trained weight. Whoever runs a piece says in `phase` how far it has come.
    """

    def __init__(self, recovery: Recovery, where: str, device: torch.device, drop_gradients: Callable[[], None]):
        self.phase = "forward pass"
        self._recovery, self._where, self._device = recovery, where, device
        self._drop_gradients = drop_gradients
        self._batches: list[Batch] = []
        self._losses: list[torch.Tensor] = []
        self._random: RandomState | None = None

    def add(self, batch: Batch, run: Callable[[Batch], torch.Tensor]) -> torch.Tensor:
        """The loss of `batch`, and with it what doing the batches before it again has changed in theirs.

        `run` adds the gradient of one piece of a batch and returns its share of the loss. Raises OutOfMemory when one
        document does not fit; all gradients are gone then.
        """
        if self._random is None:
            self._random = rng_state.note(self._device)
        told = list(self._losses)
        self._batches.append(batch)
        while (documents := self._try(run)) is not None:
            self._drop_gradients()
            self._losses.clear()
            self._recovery.after_pass(self._where, self.phase, documents)
            rng_state.wind_back(self._random, self._device)
        loss = self._losses[-1]
        for now, before in zip(self._losses, told, strict=False):
            loss = loss + (now - before)
        return loss

    def _try(self, run: Callable[[Batch], torch.Tensor]) -> tuple[int, ...] | None:
        """Run what has not been run; None, or the documents of the piece for which memory did not suffice."""
        documents: tuple[int, ...] = ()
        try:
            for batch in self._batches[len(self._losses) :]:
                shares = []
                for piece in split_batch(batch, self._recovery.pieces, self._recovery.together):
                    self.phase, documents = "forward pass", piece["document_lengths"]
                    shares.append(run(piece))
                self._losses.append(torch.stack(shares).sum() if len(shares) > 1 else shares[0])
        except Exception as fault:
            if not is_out_of_memory(fault):
                raise
            let_go(fault)
            return documents
        return None
