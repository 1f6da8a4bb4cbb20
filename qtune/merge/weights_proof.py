"""Every number of what was written, held against what the live model computes with.

Of an adapted or quantised weight it must be the rounding of the live model's own in float32; of any other it must be
the base's, to the byte where the live model has no part in it. So a wrong scale, a layer in another's place or a tensor
that was left out is found whatever it does to the answers, and how deep a model is makes no difference.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel

from qtune.memory import trained_rows
from qtune.merge.checkpoint_names import CheckpointNames, Place
from qtune.merge.live_weights import LiveExperts, device_of, held, is_folded, layer_called, noise, tuned
from qtune.merge.merged_weights import Onto
from qtune.merge.nf4_round_trip import rows_at_once
from qtune.merge.parallel_writer import as_bytes
from qtune.model.checkpoint import BaseCheckpoint


@dataclass(frozen=True)
class WeightsProof:
    """`strays` of all `weights` are not what they must be, most of them in `worst_tensor` (empty for none)."""

    tensors: int
    weights: int
    strays: int
    worst_tensor: str

    @classmethod
    def of(cls, counted: Mapping[str, tuple[int, int]]) -> "WeightsProof":
        """From how many numbers each tensor has, and how many of them are strays."""
        total = sum(off for _, off in counted.values())
        worst = max(counted, key=lambda name: counted[name][1]) if total else ""
        return cls(len(counted), sum(count for count, _ in counted.values()), total, worst)

    @property
    def faults(self) -> tuple[str, ...]:
        """What does not hold, a clause each."""
        if not self.strays:
            return ()
        return (
            f"{self.strays:,} of {self.weights:,} weights are not those that were trained, most in {self.worst_tensor}",
        )


Rounded = Callable[[torch.Tensor], torch.Tensor]
Ends = Callable[[torch.Tensor, torch.Tensor], Sequence[torch.Tensor]]


def both_sides(wanted: torch.Tensor, noise: torch.Tensor) -> Sequence[torch.Tensor]:
    """What each number may be at the least and at the most."""
    return wanted - noise, wanted + noise


@dataclass(frozen=True)
class Wanted:
    """What one tensor must be, and by how much its numbers may differ before they are rounded; None for not at all."""

    weight: torch.Tensor
    noise: torch.Tensor | None = None

    def strays(self, found: torch.Tensor, rounded: Rounded, ends: Ends = both_sides, slack: float = 0.0) -> int:
        """How many numbers of `found` are no rounding of this one; `rounded` takes and gives rows (O, I) in float32.

        Rounding keeps order, so that what lies within the noise is rounded to something between what its `ends` are
        rounded to. Without noise that is one number, and neither the next one nor NaN is it. `slack` is what a row may
        be off by besides, over the largest of it: rounded in blocks, a row has a scale, which is rounded too.
        """
        if found.shape != self.weight.shape:
            return found.numel()
        at_once = rows_at_once(_as_matrix(found))
        parts, wanted = (_as_matrix(each).split(at_once) for each in (found, self.weight))
        noise = [None] * len(parts) if self.noise is None else _as_matrix(self.noise).split(at_once)
        return sum(_strays(*rows, rounded, ends, slack) for rows in zip(parts, wanted, noise, strict=True))


def _strays(
    found: torch.Tensor, wanted: torch.Tensor, noise: torch.Tensor | None, rounded: Rounded, ends: Ends, slack: float
) -> int:
    wanted, found = wanted.float(), found.to(wanted.device).float()
    others = found != rounded(wanted)
    if noise is None or not others.any():
        return int(others.sum())
    rows = others.any(1)
    found, wanted, noise = found[rows], wanted[rows], noise[rows]
    rounded_ends = torch.stack([rounded(end) for end in ends(wanted, noise)])
    off = wanted.abs().amax(1, keepdim=True) * slack
    return found.numel() - int(((rounded_ends.amin(0) - off <= found) & (found <= rounded_ends.amax(0) + off)).sum())


@dataclass(frozen=True)
class Trained:
    """What a checkpoint's tensors must be once the adapter on `model` is folded `onto` one base.

    `base` is the checkpoint that was trained on, whose tensors are in the model where `names` says, and which it holds
    in `compute_dtype` where it is not quantised; `replaced` are the tensors that the adapter's file has whole.
    """

    model: PeftModel
    base: BaseCheckpoint
    names: CheckpointNames
    replaced: Mapping[str, torch.Tensor]
    onto: Onto
    compute_dtype: torch.dtype

    def prove(self, written: BaseCheckpoint) -> WeightsProof:
        """Go through all of `written`; a tensor that it lacks, or has too many, is strays alone."""
        needed, there = self.base.specs(), written.specs()
        counted = {name: (needed[name].numbers, needed[name].numbers) for name in needed.keys() - there.keys()}
        for name, spec in there.items():
            off = self._strays(name, written.called(name)) if name in needed else spec.numbers
            counted[name] = spec.numbers, off
        return WeightsProof.of(counted)

    def _strays(self, name: str, found: torch.Tensor) -> int:
        if self.base.text.name(name) is None:
            return 0 if _are_the_same(found, self.base.called(name)) else found.numel()
        wanted = self.wanted(name)
        if not (found.is_floating_point() and wanted.weight.is_floating_point()):
            return 0 if torch.equal(found, wanted.weight) else found.numel()
        return wanted.strays(found, lambda rows: rows.to(found.dtype).float())

    def wanted(self, name: str) -> Wanted:
        """What the checkpoint's tensor `name` must be."""
        places, base = self.names.of_tensor(name), self.base.called(name)
        if len(places) == 1 and self.names.is_transposed(name):
            linear = self._wanted(places[0], base.t())
            return Wanted(linear.weight.t(), None if linear.noise is None else linear.noise.t())
        if len(places) == 1:
            return self._wanted(places[0], base)
        heights = [self.names.shapes[place.tensor][0] for place in places]
        each = [self._wanted(place, rows) for place, rows in zip(places, base.split(heights), strict=True)]
        noise = [torch.zeros_like(one.weight) if one.noise is None else one.noise for one in each]
        return Wanted(torch.cat([one.weight for one in each]), torch.cat(noise))

    def _wanted(self, place: Place, base: torch.Tensor) -> Wanted:
        """What `place` of the live model makes of the checkpoint's own."""
        layer = layer_called(self.model, place.tensor.removesuffix(".weight"))
        if place.tensor in self.replaced:
            return Wanted(place.of(self.replaced[place.tensor]))
        if place.tensor.endswith(".weight") and place.is_whole and layer is not None and is_folded(layer):
            start = held(layer) if self.onto == "dequantised" else base.to(device_of(layer)).float()
            return Wanted(tuned(layer, start), noise(layer, start))
        if (stack := LiveExperts.called(self.model, place.tensor)) is not None:
            return self._of_experts(stack, place, base)
        is_cast = self.onto == "dequantised" and base.is_floating_point()
        whole = self._as_held(place, base) if is_cast else base
        rows = trained_rows.place_of(layer) if place.tensor.endswith(".weight") else None
        return Wanted(whole if rows is None else rows.in_table(whole))

    def _of_experts(self, stack: LiveExperts, place: Place, base: torch.Tensor) -> Wanted:
        experts = slice(None) if place.expert is None else slice(place.expert, place.expert + 1)
        if self.onto == "dequantised":
            start = stack.held(experts)[:, place.rows]
        else:
            start = (base if place.expert is None else base[None]).to(stack.device).float()
        weight = stack.tuned(start, experts, place.rows)
        unsure = stack.noise(weight, experts, place.rows)
        return Wanted(weight.view(base.shape), None if unsure is None else unsure.view(base.shape))

    def _as_held(self, place: Place, base: torch.Tensor) -> torch.Tensor:
        """A tensor that was not quantised as the live model has it; cast where that calls it otherwise."""
        module, _, leaf = place.tensor.rpartition(".")
        own = getattr(layer_called(self.model, module), leaf, None)
        held = None if own is None else own.data
        if held is not None and held.shape == self.names.shapes.get(place.tensor, base.shape):
            held = place.of(held)
        return held if held is not None and held.shape == base.shape else base.to(self.compute_dtype)


def _are_the_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """To the byte, NaN among them."""
    return one.dtype == other.dtype and one.shape == other.shape and bool((as_bytes(one) == as_bytes(other)).all())


def _as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """(O, I) of any shape; a vector as one row."""
    return tensor.flatten(1) if tensor.dim() > 1 else tensor.view(1, -1)
