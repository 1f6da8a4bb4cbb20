"""Where the tensors of a checkpoint are in the model that transformers makes of them.

transformers renames tensors as it loads them, stacks the experts of a layer, puts gate on top of up, and cuts fused
linears apart (its `WeightConverter`s). A merge goes the other way: it writes what the file has, from what the model
holds. So what is done on loading is followed here by name, tensor by tensor; what is neither quantised nor adapted
needs no place, and a way of converting that is not known is only refused where it matters.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, WeightConverter
from transformers.pytorch_utils import Conv1D

from qtune.memory.packed_experts import expert_modules

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Place:
    """Some of the model's `tensor`: `rows` of it, or of the matrix of one `expert` in it."""

    tensor: str
    expert: int | None = None
    rows: slice = field(default_factory=lambda: slice(None))

    @property
    def is_whole(self) -> bool:
        return self.expert is None and self.rows == slice(None)

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        if self.is_whole:  # a single number has no rows
            return whole
        return (whole if self.expert is None else whole[self.expert])[self.rows]


Places = tuple[Place, ...]


@dataclass(frozen=True)
class Stack:
    """A parameter with a matrix for every expert: its `name` in the module, its shape (E, N, K), and whether a matrix
    is multiplied from the right, (E, K, N)."""

    name: str
    shape: tuple[int, ...]
    is_transposed: bool


@dataclass(frozen=True)
class CheckpointNames:
    """`places` in the model that each tensor of the checkpoint has, one on top of the other, by its name; `shapes` of
    the model's tensors; its `stacks` of experts by module, in the order in which the module has them; and which tensors
    are `transposed`, (I, O), as those of the Conv1D of GPT-2 are, which 4 bits and an adapter take for a linear."""

    places: Mapping[str, Places]
    shapes: Shapes
    stacks: Mapping[str, tuple[Stack, ...]]
    transposed: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: PreTrainedModel, checkpoint: Shapes) -> "CheckpointNames":
        """For a `model` that may be without weights, and the shapes in its checkpoint."""
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        conversions = get_model_conversion_mapping(model)
        converters = [each for each in conversions if isinstance(each, WeightConverter)]
        renamings = [each for each in conversions if not isinstance(each, WeightConverter)]
        places: dict[str, Places] = {}
        joined: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        for stored in sorted(checkpoint, key=_by_number):
            name, pattern = _renamed(stored, renamings), None
            for converter in converters:
                name, pattern = converter.rename_source_key(name)
                if pattern is not None:
                    break
            name = _with_prefix(name, model.base_model_prefix, shapes)
            if name not in shapes and (own := _with_prefix(stored, model.base_model_prefix, shapes)) in shapes:
                name, pattern = own, None
            if pattern is not None:
                joined[name][pattern].append(stored)
            elif name in shapes:
                places[stored] = (Place(name),)
        for name, sources in joined.items():
            places |= _converted(name, sources, by_pattern[next(iter(sources))], shapes, checkpoint)
        transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
        stacks = {name: _stacks(experts) for name, experts in _experts(model)}
        return cls(places, shapes, stacks, frozenset(transposed))

    def called(self, stored_as: Mapping[str, str]) -> "CheckpointNames":
        """The same for a checkpoint that calls by another name what was given here by the text model's."""
        return replace(self, places={stored: self.of_tensor(own) for own, stored in stored_as.items()})

    def of_tensor(self, stored: str) -> Places:
        return self.places.get(stored, (Place(stored),))

    def is_transposed(self, stored: str) -> bool:
        return any(place.tensor in self.transposed for place in self.of_tensor(stored))

    def stored_of(self, tensor: str) -> list[str]:
        """The checkpoint's tensors that the model's `tensor` is made of, in the order in which they lie in it."""
        found = [
            (place.expert or 0, place.rows.start or 0, name)
            for name, places in self.places.items()
            for place in places
            if place.tensor == tensor
        ]
        return [name for _, _, name in sorted(found)]

    def assembled(self, tensor: str, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The model's `tensor` with two dimensions, of what `read` gives of the checkpoint's tensors by name."""
        found = [self._part_of(tensor, stored, read(stored)) for stored in self.stored_of(tensor) or [tensor]]
        return torch.cat(found).t() if tensor in self.transposed else torch.cat(found)

    def _part_of(self, tensor: str, stored: str, whole: torch.Tensor) -> torch.Tensor:
        """What of the checkpoint's tensor, which others may lie in too, is of `tensor`."""
        places = [place.tensor for place in self.of_tensor(stored)]
        if len(places) == 1:
            return whole
        return whole.split([self.shapes[place][0] for place in places])[places.index(tensor)]


def _renamed(name: str, renamings: Sequence[Any]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def _with_prefix(name: str, prefix: str, shapes: Shapes) -> str:
    """A checkpoint of the model without its head lacks the prefix that all but the head has, or the other way about."""
    without = name.removeprefix(f"{prefix}.")
    return next((each for each in (name, without, f"{prefix}.{name}") if each in shapes), name)


def _by_number(name: str) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _converted(
    name: str, sources: Mapping[str, Sequence[str]], converter: WeightConverter, shapes: Shapes, stored: Shapes
) -> Iterator[tuple[str, Places]]:
    """What `converter` makes of `sources`, by pattern, which is the model's `name` or what begins with that."""
    steps = [(type(step), getattr(step, "dim", None)) for step in converter.operations]
    in_order = [sources[pattern] for pattern in converter.source_patterns if pattern in sources]
    if steps == [(Chunk, 0)] and len(in_order) == 1:
        first, targets = converter.target_patterns[0], converter.target_patterns
        whole = tuple(Place(name.replace(first, target)) for target in targets)
        yield from ((each, whole) for each in in_order[0] if all(place.tensor in shapes for place in whole))
    elif name in shapes and steps in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
        for names, rows in zip(in_order, _one_after_another([stored[names[0]][0] for names in in_order]), strict=True):
            yield from ((each, (Place(name, expert, rows),)) for expert, each in enumerate(names))
    elif name in shapes and steps == [(Concatenate, 0)]:
        flat = [each for names in in_order for each in names]
        for each, rows in zip(flat, _one_after_another([stored[each][0] for each in flat]), strict=True):
            yield each, (Place(name, None, rows),)


def _one_after_another(sizes: Sequence[int]) -> Iterator[slice]:
    """Where parts of these sizes lie; one alone is all."""
    if len(sizes) == 1:
        return iter([slice(None)])
    return (slice(start, end) for start, end in pairwise([0, *accumulate(sizes)]))


def _experts(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    names = {id(module): name for name, module in model.named_modules()}
    return ((names[id(experts)], experts) for experts in expert_modules(model))


def _stacks(experts: Any) -> tuple[Stack, ...]:
    is_transposed = bool(getattr(experts, "is_transposed", False))
    return tuple(
        Stack(name, tuple(parameter.shape), is_transposed)
        for name, parameter in experts.named_parameters(recurse=False)
        if parameter.ndim == 3
    )
