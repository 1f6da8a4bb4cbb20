"""An adapter whose A lies along the directions in which its layer's inputs vary most.

Held: of every input, which queries, keys and values share, as gate and up do, (R + 16, I) in float32, while there are
no gradients and no optimizer yet. Costs: up to 32 forward passes before the first step, in each of which `POSITIONS`
inputs of every layer go through one decomposition of (R + 16 + `POSITIONS`, I); not measured on a card.

Variance is that around the mean, summed up over passes without keeping them (Ross, Lim, Lin and Yang 2008, Incremental
learning for robust visual tracking, section 2.1), as in peft's EVA.

Letters: N rows of inputs, I inputs, R rank.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from qtune.data.rows import NOT_TRAINED
from qtune.memory.layer_ops import GatedProduct
from qtune.model import adapter
from qtune.model.lora_inits import Pass

SPARE = 16  # directions kept beside those wanted, as one that is dropped early may be among them in the end; chosen
POSITIONS = 256  # of a pass, evenly spread over those that are trained; chosen
FLAT = 1e-6  # of the longest direction: a shorter one is rounding's


class Directions:
    """Those of all rows so far, each one long, in the order of variance; the first `most` are meant."""

    def __init__(self, most: int):
        self._most, self._rows = most + SPARE, 0
        self._mean = self._axes = self._lengths = torch.empty(0)

    def add(self, rows: Tensor) -> None:
        """`rows` (N, I)."""
        mean, count = rows.mean(0), len(rows)
        stacked = rows - mean
        if self._rows:
            total = self._rows + count
            apart = (self._rows * count / total) ** 0.5 * (self._mean - mean)
            stacked = torch.cat([self._lengths[:, None] * self._axes, stacked, apart[None]])
            mean = (self._rows * self._mean + count * mean) / total
        _, lengths, axes = torch.linalg.svd(stacked, full_matrices=False)
        self._rows, self._mean = self._rows + count, mean
        self._lengths, self._axes = lengths[: self._most], axes[: self._most]

    def found(self) -> Tensor:
        """Those in which anything varies."""
        return self._axes[self._lengths > FLAT * self._lengths[:1]] if self._rows else self._axes


@torch.no_grad()
def point_along_inputs(model: PeftModel, packs: Iterable[Any], run: Pass) -> None:
    """Set A of every linear from what `run` passes through it of `packs`; B stays zero. Rows of A for which there is no
    direction, as in few rows there are few, stay as they are."""
    layers = dict(adapter.adapted_layers(model))
    inputs = _Inputs(max(layer.lora_A[layer.active_adapters[0]].weight.shape[0] for layer in layers.values()))
    with inputs.watched(model, layers):
        for pack in packs:
            run(pack)
    for name, layer in layers.items():
        found, low = inputs.of(name), layer.lora_A[layer.active_adapters[0]].weight
        kept = found[: len(low)]
        low[: len(kept)] = kept.to(low)


class _Inputs:
    """The directions of every layer's inputs, one for layers that are called with the same."""

    def __init__(self, most: int):
        self._most, self._same = most, dict[str, str]()
        self._directions = dict[str, Directions]()
        self._positions, self._passed = torch.empty(0, dtype=torch.long), dict[str, int]()
        self._last: tuple[str, Any] = ("", None)

    def of(self, name: str) -> Tensor:
        directions = self._directions.get(self._same.get(name, name))
        return torch.empty(0) if directions is None else directions.found()

    @contextlib.contextmanager
    def watched(self, model: PeftModel, layers: Mapping[str, LoraLayer]) -> Iterator[None]:
        hooks = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for name, layer in layers.items():
            hooks.append(layer.register_forward_pre_hook(lambda _, given, name=name: self._note(name, *given[:1])))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _begin(self, model: torch.nn.Module, given: Any, named: Mapping[str, Any]) -> None:
        trained = (named["labels"].flatten() != NOT_TRAINED).nonzero().flatten()
        spread = torch.arange(min(POSITIONS, len(trained)), device=trained.device) * len(trained) // POSITIONS
        self._positions = trained if len(trained) <= POSITIONS else trained[spread]
        self._passed.clear()
        self._last = ("", None)

    def _note(self, name: str, given: Any = None) -> None:
        """A layer may be called with a few tokens of a pass at a time."""
        if given is self._last[1]:
            self._same[name] = self._last[0]
            return
        self._last = (name, given)
        x = given.value() if isinstance(given, GatedProduct) else given
        rows = x.reshape(-1, x.shape[-1])
        first = self._passed.get(name, 0)
        self._passed[name] = first + len(rows)
        at = self._positions[(self._positions >= first) & (self._positions < first + len(rows))] - first
        chosen = rows[at.to(rows.device)].float()
        chosen = chosen[chosen.isfinite().all(1)]
        if len(chosen):
            self._directions.setdefault(name, Directions(self._most)).add(chosen)
