"""Attention in tiles of queries, for scores that none of torch's kernels makes: capped ones, and whatever has sinks
where no kernel gives its normaliser away.

Held less of: the (S, S) scores of every head. What is kept for the backward pass is queries, keys, values, the output
and one number for each query; a tile of scores lives at a time, in it and forward.
Costs: the scores are made twice; products of half precision as torch makes them, and the rest in float32.
Refuses: dropout of attention's weights.

The backward pass is that of flash attention (Dao et al. 2022, arXiv:2205.14135, appendix B.4): from the sum of a row's
exponentials its weights are made again. A sink is one more score of each query whose value is 0, so it is in that sum
and nowhere else; a cap's derivative is 1 - tanh^2.

Letters: D documents, S queries of each, N keys, H query heads, K key/value heads, G query heads of each of those, E
head_dim, V width of values.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from qtune.memory import kept_attention, memory_tracker
from qtune.units import MIB

TILE_BYTES = 32 * MIB  # of scores; a backward pass holds four such tiles


@dataclass(frozen=True)
class Scores:
    """What is made of queries times keys: `scaling`, then `cap` * tanh(. / `cap`). Seen are the keys that `mask` says
    (broadcast to (D, H, S, N), of bool or added), or where there is none, up to oneself, `window` at most."""

    scaling: float
    cap: float | None = None
    window: int | None = None
    mask: torch.Tensor | None = None

    def tile_rows(self, query: torch.Tensor, keys: int) -> int:
        """How many queries of each document go at once."""
        documents, heads, _, _ = query.shape
        return max(1, TILE_BYTES // (_sum_dtype(query).itemsize * documents * heads * keys))

    def seen(self, rows: slice, keys: int, is_causal: bool) -> slice:
        """The keys that any query of `rows` sees."""
        if self.mask is not None or not is_causal:
            return slice(0, keys)
        return slice(0 if self.window is None else max(0, rows.start + 1 - self.window), rows.stop)

    def hide(self, scores: torch.Tensor, rows: slice, columns: slice, is_causal: bool) -> torch.Tensor:
        """(D, H, rows, columns) scores, in place, without what a query does not see."""
        if self.mask is not None:
            part = self.mask[..., rows if self.mask.shape[-2] > 1 else slice(None), columns]
            return scores.masked_fill_(~part, -torch.inf) if part.dtype == torch.bool else scores.add_(part)
        if not is_causal:
            return scores
        row = torch.arange(rows.start, rows.stop, device=scores.device)[:, None]
        column = torch.arange(columns.start, columns.stop, device=scores.device)
        hidden = column > row
        if self.window is not None:
            hidden |= column <= row - self.window
        return scores.masked_fill_(hidden, -torch.inf)


def attend_in_tiles(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None, how: Scores
) -> torch.Tensor:
    """(D, H, S, V) of (D, H, S, E) queries, (D, K, N, E) keys and (D, K, N, V) values.

    `sinks` are (H,), one for each head. One query of many keys sees them all.
    """
    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    with torch.autocast(query.device.type, enabled=False):
        return _Tiled.apply(query.to(dtype), key.to(dtype), value.to(dtype), sinks, how)


def _sum_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _in_tiles(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None, how: Scores
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output (D, H, S, V), and (D, H, S) logarithms of the sums of each query's exponentials."""
    documents, heads, length, _ = query.shape
    keys, output = key.shape[2], query.new_empty(documents, heads, length, value.shape[-1])
    normaliser = query.new_empty(documents, heads, length, dtype=_sum_dtype(query))
    is_causal = how.mask is None and length > 1
    for rows in memory_tracker.tiles(length, how.tile_rows(query, keys), query):
        columns = how.seen(rows, keys, is_causal)
        scores = _products(query[:, :, rows], key[:, :, columns]).mul_(how.scaling)
        if how.cap is not None:
            scores.div_(how.cap).tanh_().mul_(how.cap)
        how.hide(scores, rows, columns, is_causal)
        total = scores.logsumexp(-1)
        total.masked_fill_(total == -torch.inf, 0.0)  # a query that sees nothing is padding, and comes to nothing
        if sinks is not None:
            total = torch.logaddexp(total, sinks.to(total.dtype)[:, None])
        weights = scores.sub_(total[..., None]).exp_()
        output[:, :, rows] = _of_groups(weights.to(value.dtype), value[:, :, columns])
        normaliser[:, :, rows] = total
        del scores, weights  # or the next tile's are made beside them
    return output, normaliser


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        how: Scores,
    ) -> torch.Tensor:
        is_causal = how.mask is None and query.shape[2] > 1
        run = functools.partial(_in_tiles, query, key, value, sinks, how)
        output, normaliser = kept_attention.once("tiles", run)
        ctx.save_for_backward(query, key, value, sinks, output, normaliser)
        ctx.how, ctx.is_causal = how, is_causal
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, sinks, output, normaliser = ctx.saved_tensors
        how, keys, dtype = ctx.how, key.shape[2], normaliser.dtype
        through = (gradient.to(dtype) * output).sum(-1)  # (D, H, S): what each weight's gradient is held against
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros(tensor.shape, dtype=dtype, device=tensor.device) for tensor in (key, value))
        for rows in memory_tracker.tiles(query.shape[2], how.tile_rows(query, keys), query):
            columns = how.seen(rows, keys, ctx.is_causal)
            asked, seen, out = query[:, :, rows], key[:, :, columns], gradient[:, :, rows]
            scores = _products(asked, seen).mul_(how.scaling)
            bent = None
            if how.cap is not None:
                scores.div_(how.cap).tanh_()
                bent = scores.square().neg_().add_(1.0)
                scores.mul_(how.cap)
            how.hide(scores, rows, columns, ctx.is_causal)
            weights = scores.sub_(normaliser[:, :, rows, None]).exp_()
            of_value[:, :, columns] += _over_queries(weights.to(value.dtype), out, value.shape[1])
            slopes = _products(out, value[:, :, columns]).sub_(through[:, :, rows, None]).mul_(weights)
            del scores, weights
            if bent is not None:
                slopes.mul_(bent)
            halved = slopes.mul_(how.scaling).to(query.dtype)
            of_query[:, :, rows] = _of_groups(halved, seen)
            of_key[:, :, columns] += _over_queries(halved, asked, key.shape[1])
            del slopes, halved, bent
        of_sinks = None
        if ctx.needs_input_grad[3]:
            alone = (sinks.to(dtype)[:, None] - normaliser).exp_()  # a sink's own weight
            of_sinks = -(alone * through).sum((0, 2)).to(sinks.dtype)
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), of_sinks, None


def _products(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(D, H, S, N) of (D, H, S, E) and (D, K, N, E), in float32 or better; no key is repeated for its group."""
    documents, heads, length, width = rows.shape
    grouped = rows.reshape(documents, columns.shape[1], -1, width) @ columns.transpose(2, 3)
    return grouped.view(documents, heads, length, columns.shape[2]).to(_sum_dtype(rows))


def _of_groups(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """(D, H, S, V) of (D, H, S, N) weights and (D, K, N, V) values."""
    documents, heads, length, keys = weights.shape
    grouped = weights.view(documents, values.shape[1], -1, keys) @ values
    return grouped.view(documents, heads, length, values.shape[-1])


def _over_queries(weights: torch.Tensor, rows: torch.Tensor, groups: int) -> torch.Tensor:
    """(D, K, N, V) of (D, H, S, N) weights and (D, H, S, V) rows, summed over the queries and heads of a group."""
    documents, _, _, keys = weights.shape
    grouped = weights.view(documents, groups, -1, keys).transpose(2, 3)
    return grouped @ rows.reshape(documents, groups, -1, rows.shape[-1])
