"""Ranks that hold the whole model each, take a share of every step's rows, and together train what one would.

A step is the same rows on any number of ranks: rank r of N takes every N-th of them. Before the passes the labelled
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

import numpy
import torch

from qtune import accelerator
from qtune.data.packing import PackedRow, collate
from qtune.data.rows import NOT_TRAINED
from qtune.distributed.ranks import ALONE, Ranks
from qtune.errors import RanksDiffer
from qtune.memory.oom_recovery import Batch


def share_of(rows: Sequence[int], packs: Sequence[PackedRow], ranks: Ranks, micro_batch: int) -> list[Batch]:
    """The micro-batches that this rank makes of the `rows` of a step."""
    ours = ranks.share(rows)
    return [
        collate([packs[number] for number in ours[start : start + micro_batch]])
        for start in range(0, len(ours), micro_batch)
    ]


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
        self._answers: list[dict[str, bool]] = []

    @property
    def are_shared(self) -> bool:
        return self.ranks.size > 1

    def any_says(self, name: str) -> bool:
        """Whether one of the ranks says yes to `asks[name]`: where there are several, what they said before the step
        was taken, which all have heard."""
        if not self.are_shared:
            return self.asks[name]()
        return any(answers[name] for answers in self._answers)

    def total(self, counts: Sequence[int]) -> list[int]:
        """Each of `counts` over all ranks."""
        start = time.perf_counter()
        of_all = self.ranks.gather(list(counts))
        self.waited_seconds += time.perf_counter() - start
        return [sum(each) for each in zip(*of_all, strict=True)]

    @torch.no_grad()
    def add_up(self, trained: Sequence[torch.nn.Parameter], loss: torch.Tensor) -> torch.Tensor:
        """Make every gradient of `trained` the sum of all ranks', and return that of `loss`, a scalar.

        One that no rank has stays None.
        """
        accelerator.synchronize(loss.device)  # or a rank that is slow would seem to be none
        start = time.perf_counter()
        answers = {name: bool(ask()) for name, ask in self.asks.items()}
        has_gradient = "".join("-+"[weight.grad is not None] for weight in trained)
        said = self.ranks.gather((answers, has_gradient))
        self.waited_seconds += time.perf_counter() - start
        self._answers = [answers for answers, _ in said]
        anywhere = ["+" in of_ranks for of_ranks in zip(*(each for _, each in said), strict=True)]
        summed = [weight for weight, is_there in zip(trained, anywhere, strict=True) if is_there]
        total = self.ranks.sum_in_order(torch.cat([loss.float().view(1), *map(_flat_gradient, summed)]))
        _, *parts = total.split([1, *(weight.numel() for weight in summed)])
        for weight, part in zip(summed, parts, strict=True):
            weight.grad = part.view_as(weight).to(weight.dtype)
        return total[0].to(loss.dtype)


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
