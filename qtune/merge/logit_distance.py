"""How near another model's logits are to the live one's, over as many token rows as it takes to be sure.

Letters: T tokens of a row, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from qtune.errors import UserError

MAX_ROWS, MAX_ROW_TOKENS = 64, 512
TOKENS_AT_ONCE = 512  # float32 logits of 512 tokens and a vocabulary of 128k are 256 MiB a side
ROWS_AT_ONCE = 4  # between two looks at how sure it is
POSITIONS_AT_ONCE = 64
T_BY_ROWS = {4: 5.84, 8: 3.50, 16: 2.95, 32: 2.74, 64: 2.66}  # Student's t, 99 % between minus and plus

Row = list[int]


@dataclass(frozen=True)
class RowCloseness:
    """How another model's logits over one row compare with those of the live one; `base_kl_sum` is the base's KL."""

    positions: int
    kl_sum: float
    max_kl: float
    base_kl_sum: float
    agreeing: int
    live_loss_sum: float
    other_loss_sum: float

    @classmethod
    def of(cls, expected: torch.Tensor, found: torch.Tensor, row: Row, base_kl_sum: float) -> "RowCloseness":
        """From both logits (T, V)."""
        kl = divergences(expected, found)
        next_ids = torch.tensor(row[1:], device=expected.device)
        losses = (float(cross_entropy(logits[:-1], next_ids, reduction="sum")) for logits in (expected, found))
        agreeing = int((expected.argmax(-1) == found.argmax(-1)).sum())
        return cls(len(row), float(kl.sum()), float(kl.max()), base_kl_sum, agreeing, *losses)


@dataclass(frozen=True)
class Closeness:
    """The same over all rows: per position, and the losses per token."""

    rows: int
    positions: int
    mean_kl: float
    max_kl: float
    base_kl: float
    agreement_fraction: float
    live_loss: float
    other_loss: float

    @classmethod
    def over(cls, measured: Sequence[RowCloseness]) -> "Closeness":
        positions = sum(row.positions for row in measured)
        predicted = positions - len(measured)  # nothing comes before a row's first token
        return cls(
            rows=len(measured),
            positions=positions,
            mean_kl=sum(row.kl_sum for row in measured) / positions,
            max_kl=max(row.max_kl for row in measured),
            base_kl=sum(row.base_kl_sum for row in measured) / positions,
            agreement_fraction=sum(row.agreeing for row in measured) / positions,
            live_loss=sum(row.live_loss_sum for row in measured) / predicted,
            other_loss=sum(row.other_loss_sum for row in measured) / predicted,
        )


def divergences(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL of `found` from `expected`, logits (T, V), at each position in nats: (T,)."""
    pieces = zip(expected.split(POSITIONS_AT_ONCE), found.split(POSITIONS_AT_ONCE), strict=True)
    return torch.cat([_divergence(*pair) for pair in pieces])


def _divergence(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """In double, as 1e-6 drowns in float32 sums."""
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def usable_rows(rows: Sequence[Sequence[int]], what: object) -> list[Row]:
    """The rows that are compared, cut to the tokens that are; UserError, about `what`, where there is none."""
    usable = [list(row[:MAX_ROW_TOKENS]) for row in rows if len(row) > 1][:MAX_ROWS]
    if not usable:
        raise UserError(
            f"{what}: there is no held-out row of two tokens or more to compare it on. Train with"
            " data.held_out_fraction above 0 to have some."
        )
    return usable


def in_batches(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows of like length together, so many that they are `TOKENS_AT_ONCE` at most."""
    batch: list[Row] = []
    for row in sorted(rows, key=len):
        if batch and (len(batch) + 1) * len(row) > TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def logits_of(model: torch.nn.Module, batch: Sequence[Row], device: str) -> list[torch.Tensor]:
    """(T, V) of each row, in float32. What fills up a shorter row stands behind it, where no token of it looks."""
    longest = max(map(len, batch))
    ids = torch.tensor([[*row, *row[-1:] * (longest - len(row))] for row in batch], device=device)
    logits = model(input_ids=ids, use_cache=False).logits.float()
    return [logits[number, : len(row)] for number, row in enumerate(batch)]


def is_at_most(bound: float, values: Sequence[float], sizes: Sequence[int]) -> bool | None:
    """Whether the sum of `values` over that of `sizes` is, by how much it differs from row to row; None if unsure.

    From Student's interval of a ratio of sums. Fewer than four rows say nothing.
    """
    count, total = len(values), sum(sizes)
    if count < ROWS_AT_ONCE:
        return None
    mean = sum(values) / total
    squares = sum((value - mean * size) ** 2 for value, size in zip(values, sizes, strict=True))
    error = math.sqrt(squares * count / (count - 1)) / total
    width = T_BY_ROWS[max(rows for rows in T_BY_ROWS if rows <= count)] * error
    return None if abs(mean - bound) <= width else mean < bound


def is_kl_at_most(least: float, base_fraction: float, measured: Sequence[RowCloseness]) -> bool | None:
    """Whether mean KL is at most `least`, or that fraction of the base's; None if unsure."""
    positions = [row.positions for row in measured]
    answers = (
        is_at_most(least, [row.kl_sum for row in measured], positions),
        is_at_most(0.0, [row.kl_sum - base_fraction * row.base_kl_sum for row in measured], positions),
    )
    return True if True in answers else None if None in answers else False


def is_loss_rise_at_most(bound: float, measured: Sequence[RowCloseness]) -> bool | None:
    """Whether the loss has risen by no more than `bound` a token; None if unsure."""
    rises = [row.other_loss_sum - row.live_loss_sum for row in measured]
    return is_at_most(bound, rises, [row.positions - 1 for row in measured])
