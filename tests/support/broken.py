"""Merges that are wrong on purpose: what each does to the tensors of a right one."""

import dataclasses
import math
from collections.abc import Callable

import torch

from qtune.merge.lora_delta import AdapterWeights, LoraDelta
from qtune.merge.merged_weights import Fold, Onto

Tensors = dict[str, torch.Tensor]
Adapted = Callable[[dict[str, LoraDelta]], dict[str, LoraDelta]]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def module_of(changes: dict[str, LoraDelta], projection: str, layer: int = 1) -> str:
    (name,) = [name for name in changes if name.endswith(projection) and f"layers.{layer}." in name]
    return name


def scaled(factor: float) -> Adapted:
    return lambda changes: {
        name: dataclasses.replace(change, scale=change.scale * factor) for name, change in changes.items()
    }


def without_root(changes: dict[str, LoraDelta]) -> dict[str, LoraDelta]:
    """As if rsLoRA had been missed."""
    rank = len(next(iter(changes.values())).a)
    return scaled(1 / math.sqrt(rank))(changes)


def swapped(projection: str) -> Adapted:
    """The adapters of two layers, each on the other."""

    def swap(changes: dict[str, LoraDelta]) -> dict[str, LoraDelta]:
        first, second = (module_of(changes, projection, layer) for layer in (0, 1))
        return {**changes, first: changes[second], second: changes[first]}

    return swap


def unfolded(projection: str) -> Adapted:
    def leave_out(changes: dict[str, LoraDelta]) -> dict[str, LoraDelta]:
        return {name: change for name, change in changes.items() if name != module_of(changes, projection)}

    return leave_out


def mixed_up(changes: dict[str, LoraDelta]) -> dict[str, LoraDelta]:
    """A and B of a square weight, each for the other."""
    name = module_of(changes, "o_proj")
    change = changes[name]
    return {**changes, name: dataclasses.replace(change, a=change.b.T.contiguous(), b=change.a.T.contiguous())}


ADAPTERS: dict[str, Adapted] = {
    "scale x 0.9": scaled(0.9),
    "scale x 1.1": scaled(1.1),
    "scale x 2": scaled(2.0),
    "scale x 0.999": scaled(0.999),
    "rslora missed": without_root,
    "adapters of two layers swapped": swapped("v_proj"),
    "A and B mixed up": mixed_up,
    **{f"{projection} not folded": unfolded(projection) for projection in PROJECTIONS},
}


def with_adapter(fold: Fold, adapted: Adapted) -> Fold:
    return dataclasses.replace(fold, adapter=AdapterWeights(adapted(fold.adapter.changes), fold.adapter.replaced))


def folded(fold: Fold, name: str, onto: Onto) -> torch.Tensor:
    shard = fold.checkpoint.shard_by_name[name]
    rows = torch.cat([job().rows for job in fold.jobs(shard, name, onto)])
    return rows.view(fold.checkpoint.specs()[name].shape)


def refolded(tensors: Tensors, fold: Fold, adapted: Adapted, onto: Onto) -> Tensors:
    """`tensors` of a right merge with those folded anew whose adapter is another."""
    wrong = with_adapter(fold, adapted)
    before, after = fold.adapter.changes, wrong.adapter.changes
    names = [f"{name}.weight" for name, change in before.items() if after.get(name) is not change]
    return {**tensors, **{name: folded(wrong, name, onto) for name in names}}


def edited(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    """The first tensor whose name has `part` in it, changed."""

    def edit(tensors: Tensors) -> Tensors:
        name = next(name for name in sorted(tensors) if part in name)
        return {**tensors, name: change(tensors[name].clone()).contiguous()}

    return edit


def lost(part: str) -> Callable[[Tensors], Tensors]:
    def lose(tensors: Tensors) -> Tensors:
        name = next(name for name in sorted(tensors) if part in name)
        return {other: tensor for other, tensor in tensors.items() if other != name}

    return lose


def nudged(tensor: torch.Tensor) -> torch.Tensor:
    """One weight of it, to the next number of its dtype."""
    bits = tensor.view({2: torch.int16, 4: torch.int32}[tensor.itemsize])
    bits.view(-1)[7] += 1
    return tensor


TENSORS: dict[str, Callable[[Tensors], Tensors]] = {
    "a weight zeroed": edited("layers.1.mlp.up_proj", torch.zeros_like),
    "a weight transposed": edited("layers.1.self_attn.o_proj", torch.t),
    "a weight lost": lost("layers.1.mlp.up_proj"),
    "a norm lost": lost("layers.1.input_layernorm"),
    "a norm of ones": edited("layers.1.input_layernorm", torch.ones_like),
    "the embedding a row off": edited("embed_tokens", lambda tensor: tensor.roll(1, 0)),
    "one weight a step off": edited("layers.1.self_attn.v_proj", nudged),
}


def truncated(tensors: Tensors, fold: Fold, onto: Onto, part: str = "layers.1.mlp.up_proj") -> Tensors:
    """A weight rounded towards zero to bfloat16 and not to the nearest."""
    name = next(name for name in sorted(tensors) if part in name)
    exact = folded(dataclasses.replace(fold, dtype=torch.float32), name, onto)
    return {**tensors, name: (exact.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)}
