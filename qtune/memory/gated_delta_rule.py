"""The gated delta rule of Qwen3.5, Qwen3-Next and OLMo-Hybrid, and Kimi's (KDA), by chunks, in few operations.

Held less of: copies of a layer's whole output, of which transformers' own way makes one for each chunk in the backward
pass; of a row longer than a segment, all that the rule makes on its way but for one segment. Of Kimi's a quarter of
what stands between two tokens of a chunk in every channel.
Costs: the same arithmetic in float32, whose sums are taken in another order. Of rows longer than a segment the forward
pass again in the backward pass. Not measured on a card.
Refuses: nothing. Where flash-linear-attention is installed, transformers calls its kernel and this is not used.

A head keeps a state S (K, V) that every token decays by exp(g), corrects by what it predicts wrongly, and reads:
S <- exp(g) S; S <- S + k (beta (v - k' S))'; o = S' q. In Kimi's every row of S decays by a g of its own (Kimi Linear,
arXiv 2510.26692). Within a chunk of C tokens the corrections are a triangular
system (the UT transform of Yang et al. 2024, arXiv 2412.06464), solved for all chunks at once; between chunks the state
is carried by two products. What reads the states is done for all chunks at once again, behind the loop. "All" are those
of a segment: so many chunks of so many rows as a backward pass has room for. Of those before, the state is all that the
next one needs.

A decay by channel stands within the product of two tokens: sum over k of q[k] k[k] exp(G - G')[k], G the sum of g so
far. Over tokens of one block it is taken as that says, in (R, R, K); over an earlier block it comes apart at the start
of the later one, exp(G - G'') exp(G'' - G'), both at most 1, and is a product of matrices (Yang et al. 2023, arXiv
2312.06635, section 4.3).

Letters: B rows, T tokens, H heads of the values, N chunks of C tokens, M blocks of R tokens in a chunk, K width of a
key, V width of a value.
"""

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.functional import pad

from qtune.units import MIB

SEGMENT_BYTES = 192 * MIB  # of what a segment holds in the backward pass; less would leave a card too little at a time
CHUNK = 64  # tokens; what transformers and flash-linear-attention take
BLOCK = 16  # tokens; what flash-linear-attention takes for Kimi's
# of the functions in modules of transformers that this stands in for
NAMES = frozenset(("torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention"))
L2_EPSILON = 1e-6  # of flash-linear-attention, which checkpoints were trained with


def install(model: torch.nn.Module) -> None:
    """Let the modules of `model` that would call transformers' function call the one below; no other model does.

    Before whatever wraps their forward.
    """
    if find_spec("fla") is not None:
        return
    for part in model.modules():
        forward = inspect.unwrap(type(part).forward)
        names = getattr(getattr(forward, "__code__", None), "co_names", ())
        if not NAMES.isdisjoint(names):
            known = forward.__globals__ | dict.fromkeys(NAMES, chunk_gated_delta_rule)
            own = types.FunctionType(
                forward.__code__, known, forward.__name__, forward.__defaults__, forward.__closure__
            )
            part.forward = types.MethodType(functools.wraps(forward)(own), part)


def chunk_gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The outputs (B, T, H, V) in the queries' dtype, and the last state (B, H, K, V) with `output_final_state`.

    With `use_qk_l2norm_in_kernel` queries and keys are brought to length 1 first.

    `query` and `key` are (B, T, G, K), where G divides H and serves H / G heads each, `value` (B, T, H, V), `g` (the
    decay's logarithm, at most 0) (B, T, H), or (B, T, H, K) where channels decay apart, and `beta` (B, T, H). Names are
    those of flash-linear-attention.
    """
    is_normed = bool(settings.get("use_qk_l2norm_in_kernel"))
    given = (query, key, value, g, beta, initial_state)
    many, tokens = _segment(value.shape, key.shape[-1], g.ndim == key.ndim)
    with torch.autocast(query.device.type, enabled=False):
        if many >= len(value) and tokens >= value.shape[1]:
            outputs, state = _outputs(given, is_normed)
        else:
            outputs, state = _InSegments.apply(*given, is_normed, many, tokens)
    return outputs, state if settings.get("output_final_state") else None


def _segment(shape: torch.Size, width: int, by_channel: bool) -> tuple[int, int]:
    """How many rows go at once, and how many of their tokens, of values (B, T, H, V) and keys of `width`."""
    rows, _, heads, height = shape
    of_a_chunk = 4 * CHUNK * heads * (9 * (width + height) + 8 * CHUNK) + 4 * 3 * heads * width * height  # as counted
    if by_channel:
        of_a_chunk += 4 * CHUNK * heads * width * 4 * (BLOCK + CHUNK // BLOCK)
    many = max(1, min(rows, SEGMENT_BYTES // of_a_chunk))
    return many, CHUNK * max(1, SEGMENT_BYTES // (of_a_chunk * many))


class _InSegments(torch.autograd.Function):
    """`_outputs` of `many` rows and `tokens` of each at a time. Kept are what it is given and a state for each segment,
    from which the backward pass makes the rest again."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        *inputs, first, is_normed, many, tokens = given
        query, key, value, *_ = inputs
        segments = _slices(value.shape[1], tokens)
        state_shape = (len(value), value.shape[2], key.shape[3], value.shape[3])
        states = value.new_empty(len(segments) - 1, *state_shape, dtype=torch.float32)
        outputs, last = value.new_empty(value.shape, dtype=query.dtype), states.new_empty(state_shape)
        for rows in _slices(len(value), many):
            state = None if first is None else first[rows]
            for before, part in enumerate(segments):
                here = [*(each[rows, part] for each in inputs), state]
                outputs[rows, part], state = _outputs(here, is_normed)
                (states[before] if before < len(states) else last)[rows] = state
        ctx.save_for_backward(*inputs, first, states)
        ctx.how = is_normed, many, tokens
        return outputs, last

    @staticmethod
    def backward(ctx: Any, of_outputs: torch.Tensor, of_last: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *inputs, first, states = ctx.saved_tensors
        is_normed, many, tokens = ctx.how
        made, of_first = [torch.empty_like(each) for each in inputs], None if first is None else torch.empty_like(first)
        for rows in _slices(len(of_outputs), many):
            of_state = of_last[rows]
            for segment, part in reversed(list(enumerate(_slices(of_outputs.shape[1], tokens)))):
                start = states[segment - 1] if segment else first
                here = [*(each[rows, part] for each in inputs), None if start is None else start[rows]]
                *gradients, of_state = _gradients(here, is_normed, (of_outputs[rows, part], of_state))
                for whole, gradient in zip(made, gradients, strict=True):
                    whole[rows, part] = gradient
            if of_first is not None:
                of_first[rows] = of_state
        return *made, of_first, None, None, None


def _gradients(given: list[Any], is_normed: bool, of_results: tuple[torch.Tensor, ...]) -> list[Any]:
    """Of what `_outputs` is given, by those of what it returns. It is run once more for that."""
    leaves = [None if each is None else each.detach().requires_grad_() for each in given]
    wanted = [each for each in leaves if each is not None]
    with torch.enable_grad(), torch.autocast(wanted[0].device.type, enabled=False):
        results = _outputs(leaves, is_normed)
    made = iter(torch.autograd.grad(results, wanted, of_results))
    return [None if each is None else next(made) for each in leaves]


def _outputs(given: Sequence[Any], is_normed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs (B, T, H, V) in the queries' dtype, and the state (B, H, K, V) that the first one, or none, has become.

    `given` are queries, keys, values, `g`, `beta` and a state or None, as `chunk_gated_delta_rule` has them.
    """
    query, key, value, g, beta, first = given
    batch, tokens, heads, _ = value.shape
    dtype = query.dtype
    if is_normed:
        query, key = _normed(query), _normed(key)
    query = query.float() * key.shape[-1] ** -0.5
    query, key, value, rate, decay = (  # (B H, N, C, K or V or 1)
        _by_chunk(each.float(), heads // each.shape[2])
        for each in (query, key, value, beta[..., None], g if g.ndim == key.ndim else g[..., None])
    )
    decay = decay.cumsum(2)
    products = _products_by_head(key, decay) if decay.shape[-1] == 1 else _products_by_channel(key, decay)
    keys_by_rate = key * rate
    corrected, read = torch.linalg.solve_triangular(
        products(keys_by_rate),
        torch.cat((value * rate, keys_by_rate * decay.exp()), 3),
        upper=False,
        unitriangular=True,
    ).split((value.shape[-1], key.shape[-1]), 3)
    last = decay[:, :, -1:]
    if first is None:
        state = value.new_zeros(len(value), key.shape[-1], value.shape[-1])
    else:
        state = first.float().flatten(0, 1)
    states, news, state = _Carried.apply(corrected, read, key * (last - decay).exp(), last.exp().mT, state)
    outputs = products(query) @ news + (query * decay.exp()) @ states
    outputs = outputs.flatten(1, 2)[:, :tokens].unflatten(0, (batch, heads)).transpose(1, 2)
    return outputs.to(dtype), state.unflatten(0, (batch, heads))


def _products_by_head(key: torch.Tensor, decay: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """From queries (.., C, K) to their products (.., C, C) with decayed keys until then; `decay` is (.., C, 1)."""
    between = (decay - decay.transpose(2, 3)).masked_fill(_is_later(CHUNK, key.device), float("-inf")).exp()
    return lambda rows: (rows @ key.transpose(2, 3)) * between


def _products_by_channel(key: torch.Tensor, decay: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same for a `decay` (.., C, K)."""
    blocks = (CHUNK // BLOCK, BLOCK)
    keys, decays = key.unflatten(2, blocks), decay.unflatten(2, blocks)
    start = decays[:, :, :, :1]
    later = _is_later(BLOCK, key.device)[:, :, None]
    near = (decays.unsqueeze(4) - decays.unsqueeze(3)).masked_fill(later, float("-inf")).exp() * keys.unsqueeze(3)
    block = torch.arange(blocks[0], device=key.device)
    not_before = (block <= block.repeat_interleave(BLOCK)[:, None]).mT[:, :, None]  # (M, C, 1)
    far = (start - decay.unsqueeze(2)).masked_fill(not_before, float("-inf")).exp() * key.unsqueeze(2)
    since = (decays - start).exp()

    def products(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.unflatten(2, blocks)
        within = (near @ rows.unsqueeze(5)).squeeze(5)  # (.., M, R, R)
        before = ((rows * since) @ far.mT).unflatten(4, blocks)  # (.., M, R, M, R)
        return before.diagonal_scatter(within.movedim(2, 4), 0, 2, 4).flatten(4, 5).flatten(2, 3)

    return products


class _Carried(torch.autograd.Function):
    """From chunk to chunk: the state before each (B H, N, K, V), what each adds to it (B H, N, C, V), the last state.

    Three operations a chunk each way: the gradients of what every chunk is given are made for all at once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        corrected: torch.Tensor,
        read: torch.Tensor,
        keys: torch.Tensor,
        decays: torch.Tensor,
        first: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        state, states, news = first, [], []
        for values, reads, keys_across, decay in _each(corrected, read, keys.transpose(2, 3), decays):
            states.append(state)
            news.append(torch.baddbmm(values, reads, state, alpha=-1))
            state = torch.baddbmm(state * decay, keys_across, news[-1])
        before, added = torch.stack(states, 1), torch.stack(news, 1)
        ctx.save_for_backward(read, keys, decays, before, added)
        return before, added, state

    @staticmethod
    def backward(
        ctx: Any, of_states: torch.Tensor, of_news: torch.Tensor, of_last: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        read, keys, decays, before, added = ctx.saved_tensors
        of_state, behind, corrections = of_last, [], []
        chunks = list(_each(of_states, of_news, read.transpose(2, 3), keys, decays))
        for own, of_new, reads_across, own_keys, decay in reversed(chunks):
            behind.append(of_state)
            corrections.append(torch.baddbmm(of_new, own_keys, of_state))
            of_state = torch.baddbmm(torch.addcmul(own, of_state, decay), reads_across, corrections[-1], alpha=-1)
        of_corrected, of_states_behind = (torch.stack(each[::-1], 1) for each in (corrections, behind))
        of_read = of_corrected @ before.transpose(2, 3).neg()
        of_keys = added @ of_states_behind.transpose(2, 3)
        of_decays = (before * of_states_behind).sum_to_size(decays.shape)
        return of_corrected, of_read, of_keys, of_decays, of_state


def _slices(length: int, step: int) -> list[slice]:
    """All of them for fake tensors, too: a plan counts what each moves."""
    return [slice(start, min(length, start + step)) for start in range(0, length, step)]


def _each(*by_chunk: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(each.unbind(1) for each in by_chunk), strict=True)


def _normed(vectors: torch.Tensor) -> torch.Tensor:
    vectors = vectors.float()
    return vectors * torch.rsqrt(vectors.square().sum(-1, keepdim=True) + L2_EPSILON)


def _by_chunk(row: torch.Tensor, shared: int) -> torch.Tensor:
    """(B, T, G, E) as (B G shared, N, C, E), zeros behind the last token."""
    tokens = row.shape[1]
    if shared > 1:
        row = row.repeat_interleave(shared, 2)
    row = pad(row.transpose(1, 2).flatten(0, 1), (0, 0, 0, -tokens % CHUNK))
    return row.unflatten(1, (-1, CHUNK))


def _is_later(tokens: int, device: torch.device) -> torch.Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu(1)
