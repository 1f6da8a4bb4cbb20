"""A base that ranks will hold in parts, read and quantised by turns: of every layer one rank has the weights.

That is its owner. The others have what stands in place of each until it deals out its parts: shapes that no bytes are
behind. What will not be in parts, norms and biases of all layers among it, is read by every rank.

Held less of: while loading, all but every N-th of the layers that will be in parts.
Costs: each such layer once over the link between the ranks. Nothing is kept in the cache of bases in 4 bits, as no rank
has the whole.
Refuses: nothing. Every rank reads all layers of files that are in 4 bits already, and of models that do not call theirs
`layers`.

Letters: N ranks.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors import safe_open
from transformers import PreTrainedModel

from qtune.distributed.ranks import Ranks
from qtune.memory.nf4 import BLOCK, OUTER_BLOCK
from qtune.memory.packed_experts import is_expert_parameter, packed_parameter

IN_A_LAYER = re.compile(r"\blayers\.(\d+)\.")
Put = Callable[[PreTrainedModel, str, Any], None]
Load = Callable[..., Any]


@contextmanager
def files_read_by(load: Load) -> Iterator[None]:
    """Inside, `from_pretrained` reads the weights of its files by `load`, which is given transformers' own function and
    what that is called with."""
    original = PreTrainedModel._load_pretrained_model
    ours = functools.partial(load, original)
    PreTrainedModel._load_pretrained_model = staticmethod(ours)  # of 5.17 and 5.23 alike: private, and tested
    try:
        yield
    finally:
        PreTrainedModel._load_pretrained_model = staticmethod(original)


@dataclass(frozen=True)
class Deal:
    """Which of the ranks reads which of the `layers` in parts, by their numbers: they take turns. `double`: weights in
    4 bits have their scales in 8."""

    ranks: Ranks
    layers: tuple[int, ...]
    double: bool

    def owner(self, layer: int) -> int | None:
        """None for a layer that every rank reads."""
        return self.layers.index(layer) % self.ranks.size if layer in self.layers else None

    def is_elsewhere(self, name: str) -> bool:
        """Whether the tensor of that name is of a layer that another rank reads."""
        found = IN_A_LAYER.search(name)
        return found is not None and self.owner(int(found[1])) not in (None, self.ranks.rank)

    @contextmanager
    def own_layers_alone(self, put: Put) -> Iterator[None]:
        """Inside, `from_pretrained` reads no matrix of a layer that is another rank's. `put` sets a parameter by its
        name, as one that is there."""

        def load(original: Load, model: PreTrainedModel, state: Any, files: Any, *settings: Any, **others: Any) -> Any:
            with ExitStack() as stack:
                tensors = state if state is not None else _slices(stack, files)
                read = {
                    name: each for name, each in tensors.items() if not (self.is_elsewhere(name) and _is_wide(each))
                }
                loading, offloaded = original(model, read, None, *settings, **others)
            for name, parameter in self._absent(model):
                if name in loading.missing_keys:
                    put(model, name, _stand_in(model, name, parameter, self.double))
                    loading.missing_keys.discard(name)
            return loading, offloaded

        with files_read_by(load):
            yield

    def _absent(self, model: PreTrainedModel) -> list[tuple[str, torch.nn.Parameter]]:
        named = list(model.named_parameters())
        return [(name, each) for name, each in named if each.ndim > 1 and self.is_elsewhere(name)]

    def say_whose(self, model: PreTrainedModel, layers: Sequence[torch.nn.Module]) -> None:
        """Have `owner_of` know of each of the layers of `model`, in their order."""
        names = {id(module): name for name, module in model.named_modules()}
        for number, layer in enumerate(layers):
            if IN_A_LAYER.search(f"{names[id(layer)]}."):
                vars(layer)["owner"] = self.owner(number)


def owner_of(layer: torch.nn.Module) -> int | None:
    """The rank that has the weights of `layer`; None where every rank has."""
    return getattr(layer, "owner", None)


def deal(
    layer: torch.nn.Module, ranks: Ranks, owner: int, packed: Callable[[], torch.Tensor], length: int
) -> torch.Tensor:
    """This rank's part of `layer`, whose bytes `packed` puts together at its `owner`; N parts have `length` bytes each.

    What the parts leave out, by how much nested scales are off, comes with it. Raises RankLost.
    """
    part = torch.empty(length, dtype=torch.uint8)
    ranks.deal_parts(owner, packed() if ranks.rank == owner else None, part)
    states = [state for each in layer.parameters() if (state := getattr(each, "quant_state", None)) is not None]
    nested = [state for state in states if state.offset is not None]
    offsets = ranks.gather([float(state.offset) for state in nested] if ranks.rank == owner else None)[owner]
    for state, offset in zip(nested, offsets or (), strict=True):
        state.offset = torch.tensor(offset, dtype=state.offset.dtype, device=state.offset.device)
    vars(layer)["owner"] = None  # nobody has them all from here on
    return part


def _slices(stack: ExitStack, files: list[str | Path]) -> dict[str, Any]:
    """Every tensor in `files`, read when it is indexed."""
    opened = [stack.enter_context(safe_open(file, "pt")) for file in files]
    return {name: file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118  (no mapping)


def _is_wide(tensor: Any) -> bool:
    """Whether it is no vector; one that is restored as it is read is a matrix."""
    return len(tensor.get_shape()) > 1 if hasattr(tensor, "get_shape") else getattr(tensor, "ndim", 2) > 1


def _stand_in(model: PreTrainedModel, name: str, parameter: torch.nn.Parameter, double: bool) -> torch.nn.Parameter:
    """A weight of `parameter`'s kind and shape, as it will be held, without its bytes."""
    device = next((each.device for each in model.parameters() if not each.is_meta), torch.device("cpu"))
    module = model.get_submodule(name.rpartition(".")[0])
    is_packed = isinstance(module, Linear4bit) or is_expert_parameter(model, name)
    if not is_packed:
        return torch.nn.Parameter(_nothing(parameter.shape, parameter.dtype, device), requires_grad=False)
    start = torch.zeros(1, BLOCK, dtype=parameter.dtype, device=device)
    codes, state = quantize_4bit(start, blocksize=BLOCK, compress_statistics=double, quant_type="nf4")
    blocks = -(-math.prod(parameter.shape) // BLOCK)
    state.shape = parameter.shape
    state.absmax = _nothing((blocks,), state.absmax.dtype, device)
    if state.state2 is not None:
        state.state2.absmax = _nothing((-(-blocks // OUTER_BLOCK),), state.state2.absmax.dtype, device)
    codes_elsewhere = _nothing((-(-math.prod(parameter.shape) // 2), 1), codes.dtype, device)
    return packed_parameter(codes_elsewhere, state, double)


def _nothing(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros((), dtype=dtype, device=device).expand(shape)
