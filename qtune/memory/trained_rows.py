"""Rows of the embedding, and of the output head, that are trained beside a table that is frozen.

Held less of: a table that is trained whole, with its gradient and an optimizer's state, (V, H) each, and the copy of
it that peft makes in every pass. What is held is (N, H) in float32, once where the head is the embedding's own table.
Costs: the embedding's output once more, for a moment; N more columns of every tile of logits.
Refuses: heads that the fused cross-entropy cannot stand in for, and heads in host memory or in NF4.

The rows are values, not changes of values, as peft has them in `trainable_token_indices`: what is looked up and what is
multiplied by is the trained row in place of the table's.

Letters: B rows of a batch, T tokens, N trained rows, H hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

ROWS = "trained_rows"  # a parameter (N, H) of the embedding, or of the head
PLACE = "trained_in"


@dataclass(frozen=True)
class Place:
    """The module that has the rows, the tokens (N,) that they are of, and whether they are on: where the adapter is
    disabled, the base is as it was."""

    owner: Any
    ids: Tensor
    is_on: Callable[[], bool]

    @property
    def rows(self) -> Tensor:
        rows: Tensor = getattr(self.owner, ROWS)
        return rows

    def in_table(self, table: Tensor) -> Tensor:
        """`table` (V, H) with the rows in place of its own, in float32."""
        return table.float().index_copy(0, self.ids.to(table.device), self.rows.detach().to(table.device).float())


def put_on(causal: Any, token_ids: Sequence[int], device: torch.device, is_on: Callable[[], bool]) -> None:
    """Let the rows of these tokens be trained, from those that the tables have; they stand on `device`."""
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    owners = [embedding] if is_tied(causal) else [embedding, head]
    ids = torch.tensor(list(token_ids), device="cpu")
    for owner in owners:
        first = owner.weight.detach()[ids.to(owner.weight.device)]
        owner.register_parameter(ROWS, torch.nn.Parameter(first.to(device, torch.float32, copy=True)))
    for module, owner in ((embedding, owners[0]), (head, owners[-1])):
        place = Place(owner, ids if device.type == "meta" else ids.to(device), is_on)
        setattr(module, PLACE, place)
        replace_in(module, place)


def begin_as_mean(causal: Any, token_ids: Sequence[int]) -> None:
    """Have the rows of these of the trained tokens, which the base was never trained on, begin as the mean of all: a
    row of next to nothing is blown up by the first norm. (Hewitt 2021, Initializing new word embeddings.)"""
    for module in (causal.get_input_embeddings(), causal.get_output_embeddings()):
        place: Place = getattr(module, PLACE)
        begun = torch.isin(place.ids, torch.tensor(list(token_ids), device=place.ids.device))
        mean = module.weight.detach().mean(0, dtype=torch.float32)
        place.rows.data[begun] = mean.to(place.rows.device)


def is_tied(causal: Any) -> bool:
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    return head.weight is embedding.weight


def has_rows(causal: Any) -> bool:
    return hasattr(causal.get_input_embeddings(), PLACE)


def place_of(module: Any) -> Place | None:
    """Where the rows of an embedding or a head are; None where none is trained, or the adapter is disabled."""
    place: Place | None = getattr(module, PLACE, None)
    return place if place is not None and place.is_on() else None


def replace_in(module: torch.nn.Module, place: Place) -> RemovableHandle:
    """Have an embedding, or a head, give what it would with the rows of `place` in its table."""
    return module.register_forward_hook(lambda own, given, output: _replaced(own, given[0], output, place))


def _replaced(module: Any, given: Tensor, output: Tensor, place: Place) -> Tensor:
    if not place.is_on():
        return output
    if isinstance(module, torch.nn.Embedding):
        return _looked_up(module, given, output, place)
    if output.shape[-1] != module.weight.shape[0]:  # of a head that only seems to be one, as in `head_logits`
        return output
    own = given @ place.rows.to(given.dtype).t()
    return output.index_copy(-1, place.ids.to(output.device), own.to(output))


def _looked_up(module: Any, ids: Tensor, output: Tensor, place: Place) -> Tensor:
    """A product of 0s and 1s with the rows, which gives each to the bit, and a gradient that is always summed alike."""
    hits = ids.to(output.device)[..., None] == place.ids
    scale = getattr(module, "embed_scale", None)  # Gemma's
    own = hits.to(output.dtype) @ place.rows.to(output.dtype)
    own = own if scale is None else own * torch.as_tensor(scale).to(own)
    return torch.where(hits.any(-1, keepdim=True), own, output)


@dataclass
class HeadRows:
    """The rows as the fused loss needs them: `values` in the head's dtype, and a `gradient` that is added up."""

    ids: Tensor
    values: Tensor
    gradient: Tensor

    @classmethod
    def of(cls, head: Any) -> "HeadRows":
        """Those of a head that has some."""
        place: Place = getattr(head, PLACE)
        rows = place.rows.detach()
        return cls(place.ids, rows.to(head.weight.dtype), torch.zeros_like(rows, dtype=torch.float32))

    def put_into(self, products: Tensor, hidden: Tensor) -> None:
        """The products (T, V) of `hidden` (T, H) with their columns in place of the table's."""
        products[:, self.ids] = hidden @ self.values.t()

    def take_from(self, p: Tensor, hidden: Tensor) -> Tensor:
        """Add up their gradient from that of the products, `p` (T, V), of which their columns become 0; what they give
        to that of `hidden`."""
        own = p[:, self.ids]
        p.index_fill_(1, self.ids, 0)
        self.gradient.addmm_(own.t().float(), hidden.float())
        return own @ self.values
