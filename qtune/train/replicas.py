"""Ranks that hold the whole model each, take a share of every step's rows, and together train what one would.

A step is the same rows on any number of ranks: rank r of N takes every N-th of them, or where ranks are not alike a
share by its speed: as forecast, and after some steps as measured, which all are told. Before the passes the labelled
tokens of all shares are added up, as a loss is a mean over them; after the last pass the gradients and the nats are,
always in the order of the ranks, so that all clip, step and stay equal to the bit. No hook hangs on a gradient (DDP):
backward passes run inside backward passes here, and add to a gradient once a tile.

Held less of: nothing but what a step's packs take where several go in one pass.
Costs: a step, two small messages, and 2 (N - 1)/N of the 4P bytes of P trained weights out of each rank; 12P bytes of
the device between the last pass and the optimizer's step. Not measured on a card.
Refuses: adapters that are not equal to the bit at a checkpoint. Where one does not see a row in a step, it waits.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

from qtune import accelerator
from qtune.data.packing import PackedRow, collate
from qtune.data.rows import NOT_TRAINED
from qtune.distributed.ranks import ALONE, Ranks
from qtune.errors import RanksDiffer
from qtune.memory.oom_recovery import Batch, free_memory, is_out_of_memory, let_go
from qtune.train.sampler import dealt

MEASURED_STEPS = 8  # chosen: enough for one slow step not to count much


def in_batches(rows: Sequence[int], packs: Sequence[PackedRow], micro_batch: int) -> list[Batch]:
    """The micro-batches that a rank makes of its `rows` of a step."""
    return [
        collate([packs[number] for number in rows[start : start + micro_batch]])
        for start in range(0, len(rows), micro_batch)
    ]


@dataclass
class Shares:
    """Of a step's tokens, what each rank takes, by its speed; the same on all ranks.

    Those of ranks that are alike, or wait for each other in every layer, stay equal. Others are `measured` from time to
    time: so many tokens in so many seconds of passes, since the last time.
    """

    of_ranks: list[float]
    are_measured: bool = False
    steps: int = 0
    tokens: list[int] = field(init=False)
    seconds: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self._begin()

    @classmethod
    def agreed(cls, ranks: Ranks, kind: str, pack_seconds: float | None, in_lockstep: bool) -> "Shares":
        """To begin with, as forecast; `kind` is what ranks must have in common to be alike."""
        of_all = ranks.gather([kind, pack_seconds, in_lockstep])
        kinds, seconds, locksteps = zip(*of_all, strict=True)
        if len(set(kinds)) == 1 or any(locksteps):
            return cls([1 / ranks.size] * ranks.size)
        return cls(_shares([1 / each for each in seconds] if all(seconds) else [1.0] * ranks.size), True)

    def measured(self, tokens: Sequence[int], seconds: Sequence[float]) -> None:
        """A step's, of every rank."""
        self.tokens = [before + each for before, each in zip(self.tokens, tokens, strict=True)]
        self.seconds = [before + each for before, each in zip(self.seconds, seconds, strict=True)]
        self.steps += 1
        if self.are_measured and self.steps >= MEASURED_STEPS:
            if all(self.tokens) and all(self.seconds):
                speeds = [each / taken for each, taken in zip(self.tokens, self.seconds, strict=True)]
                self.of_ranks = _shares(speeds)
            self._begin()

    def _begin(self) -> None:
        self.steps, self.tokens, self.seconds = 0, [0] * len(self.of_ranks), [0.0] * len(self.of_ranks)


def _shares(speeds: Sequence[float]) -> list[float]:
    return [each / sum(speeds) for each in speeds]


def empty_batch() -> Batch:
    """One of no document, for a rank that has none left while others have."""
    none = torch.empty(1, 0, dtype=torch.int64)
    return {"input_ids": none, "labels": none, "position_ids": none, "document_lengths": ()}


def is_empty(batch: Batch) -> bool:
    return not batch["document_lengths"]


def tokens_in(batches: Iterable[Batch]) -> tuple[int, int]:
    """Tokens, and how many of them have a label."""
    batches = list(batches)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    return tokens, sum(int((batch["labels"] != NOT_TRAINED).sum()) for batch in batches)


def counted_in(batches: Iterable[Batch]) -> int | float:
    """What the labels count for together: how many there are, unless they have weights."""
    batches = list(batches)
    if not any("token_weights" in batch for batch in batches):
        return tokens_in(batches)[1]
    has_label = ((batch["labels"] != NOT_TRAINED, batch["token_weights"]) for batch in batches if not is_empty(batch))
    return sum(float(weights[labelled].double().sum()) for labelled, weights in has_label)


def draw_own_random(seed: int, step: int, ranks: Ranks) -> None:
    """Have this rank drop out what no other does, from numbers that follow from seed, step and rank.

    Those of rank 0 go on as one process's do; a checkpoint has them, and needs no others.
    """
    if not ranks.is_first:
        drawn = numpy.random.SeedSequence([seed, ranks.rank, step]).generate_state(2, numpy.uint32)
        torch.manual_seed(int(drawn[0]) << 32 | int(drawn[1]))


class SharedSteps:
    """What the ranks of a run tell each other in one step after another.

    `asks` are questions that each answers with yes or no at the end of its passes; `waited_seconds` is how long this
    rank has stood there, as others had not come yet.
    """

    def __init__(self, ranks: Ranks = ALONE):
        self.ranks, self.waited_seconds = ranks, 0.0
        self.asks: dict[str, Callable[[], bool]] = {}
        self.shares = Shares([1 / ranks.size] * ranks.size)
        self._began, self._tokens = time.perf_counter(), 0
        self._answers: Sequence[dict[str, bool]] = ()

    @property
    def are_shared(self) -> bool:
        return self.ranks.size > 1

    def any_says(self, name: str) -> bool:
        """Whether one of the ranks says yes to `asks[name]`: where there are several, what they said before the step
        was taken, which all have heard."""
        if not self.are_shared:
            return self.asks[name]()
        return any(answers[name] for answers in self._answers)

    def ours_of(self, rows: Sequence[int], packs: Sequence[PackedRow]) -> list[int]:
        """This rank's rows of a step."""
        return dealt(rows, lambda row: len(packs[row]["input_ids"]), self.shares.of_ranks)[self.ranks.rank]

    def begin_passes(self, tokens: int) -> None:
        """Over so many of this rank's; `add_up` ends them."""
        self._began, self._tokens = time.perf_counter(), tokens

    def total(self, counts: Sequence[float]) -> list[Any]:
        """Each of `counts` over all ranks."""
        start = time.perf_counter()
        of_all = self.ranks.gather(list(counts))
        self.waited_seconds += time.perf_counter() - start
        return [sum(each) for each in zip(*of_all, strict=True)]

    def standing(self, peak_bytes: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Of every rank its `peak_bytes`, and how long it has waited since this was asked before."""
        waited, self.waited_seconds = self.waited_seconds, 0.0
        of_all = self.ranks.gather((peak_bytes, round(waited, 3)))
        return tuple(peak for peak, _ in of_all), tuple(seconds for _, seconds in of_all)

    @torch.no_grad()
    def add_up(self, trained: Sequence[torch.nn.Parameter], loss: torch.Tensor) -> torch.Tensor:
        """Make every gradient of `trained` the sum of all ranks', and return that of `loss`, a scalar.

        One that no rank has stays None.
        """
        accelerator.synchronize(loss.device)  # or a rank that is slow would seem to be none
        start = time.perf_counter()
        answers = {name: bool(ask()) for name, ask in self.asks.items()}
        has_gradient = "".join("-+"[weight.grad is not None] for weight in trained)
        said = self.ranks.gather((answers, has_gradient, self._tokens, start - self._began))
        self.waited_seconds += time.perf_counter() - start
        self._answers, have_gradients, tokens, seconds = zip(*said, strict=True)
        self.shares.measured(tokens, seconds)
        anywhere = ["+" in of_ranks for of_ranks in zip(*have_gradients, strict=True)]
        summed = [weight for weight, is_there in zip(trained, anywhere, strict=True) if is_there]
        total = _with_room(lambda: self.ranks.sum_in_order(_flat(loss, summed)))
        _, *parts = total.split([1, *(weight.numel() for weight in summed)])
        for weight, part in zip(summed, parts, strict=True):
            weight.grad = part.view_as(weight).to(weight.dtype)
        return total[0].to(loss.dtype)


def _with_room(sums: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What it makes; where memory runs out, once more after what nothing refers to was given back."""
    try:
        return sums()
    except Exception as fault:
        if not is_out_of_memory(fault):
            raise
        let_go(fault)
    free_memory()
    return sums()


def _flat(loss: torch.Tensor, summed: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """The loss and behind it the gradients, (1 + n,) in float32."""
    return torch.cat([loss.float().view(1), *map(_flat_gradient, summed)])


def _flat_gradient(weight: torch.nn.Parameter) -> torch.Tensor:
    """(n,) in float32."""
    if weight.grad is None:
        return torch.zeros(weight.numel(), device=weight.device)
    return weight.grad.float().flatten()


def refuse_unlike(ranks: Ranks, named: Iterable[tuple[str, torch.Tensor]], step: int) -> None:
    """Raises RanksDiffer unless the trained weights of all ranks are equal to the bit."""
    if ranks.size == 1:
        return
    digest = hashlib.sha256()
    for name, weight in named:
        digest.update(name.encode())
        digest.update(accelerator.to_host(weight.detach()).contiguous().view(torch.uint8).numpy().tobytes())
    digests = ranks.gather(digest.hexdigest())
    others = [ranks.name(rank) for rank, each in enumerate(digests) if each != digests[0]]
    if others:
        raise RanksDiffer(
            f"Step {step}: the adapter of {', '.join(others)} is not that of {ranks.name(0)} to the bit, so they no"
            " longer train one run. No checkpoint was written; the one before it is whole. Cards of different kinds, or"
            " a card at fault, do this: `qtune doctor` looks at the cards of a machine."
        )
