"""The base in NF4: how it is asked for, and parts of a weight dequantised alone, rows that start and end on a block."""

import inspect
import math
import re
import warnings
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch.library import Library, get_kernel
from transformers import BitsAndBytesConfig, PreTrainedConfig

from qtune.lock import Quantization

HEAD = "lm_head"  # which transformers leaves as it is by itself, unless it is told what else to leave
BLOCK, OUTER_BLOCK = 64, 256  # bitsandbytes' own: weights to one scale, and scales to one of double quantisation


def config(is_double: bool, compute_dtype: torch.dtype, kind: type | None = None) -> BitsAndBytesConfig:
    """What transformers is told to load linear layers in NF4, with double quantisation if `is_double`.

    Of the model class `kind` those stay as they are whose weights it multiplies by itself.
    """
    by_hand = sorted(multiplied_by_hand(kind)) if kind is not None else []
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=[*by_hand, HEAD] if by_hand else None,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=is_double,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def given(config: PreTrainedConfig) -> Quantization | None:
    """How the files of a base hold its linears in 4 bits already; None where they do not."""
    settings = getattr(config, "quantization_config", None)
    if not settings:
        return None
    return Quantization(
        settings.get("bnb_4bit_quant_type", "fp4"),  # what bitsandbytes takes where nothing is said
        bool(settings.get("bnb_4bit_use_double_quant")),
        is_given=True,
    )


BY_HAND = (
    r"\bself\.(\w+)\.weight @ ",
    r"\blinear\([^\n]*\bself\.(\w+)\.weight\b",
    r"\bself\.(\w+)\([^\n]*\.to\((?:dtype=)?self\.\1\.weight\.dtype\)",
    r"\bself\.(\w+)\.weight(?:\.data)?\.clamp",
)
REGROUPED = r"^class (\w+)\(nn\.Linear\):(?:(?!^class ).)*?\bself\.weight\.view\("  # a linear that is many in one


def multiplied_by_hand(kind: Any) -> frozenset[str]:
    """Names of the linear layers whose weights the code of a model class multiplies by or clamps, where others call
    the layer, or to whose dtype it casts what it calls the layer with.

    Such a weight cannot be packed, and an adapter on its layer would not be asked. Mamba's `dt_proj` is one, and
    LongCat's `classifier`, Gemma 3n's `prediction_coefs`; `weights_proj` of sparse attention's indexers would be given
    whole numbers of 8 bits.
    """
    try:
        code = inspect.getsource(inspect.getmodule(kind) or kind)
    except (OSError, TypeError):  # no source to read
        return frozenset()
    own = [rf"\bself\.(\w+) = {kind}\(" for kind in re.findall(REGROUPED, code, re.MULTILINE | re.DOTALL)]
    return frozenset(name for pattern in (*BY_HAND, *own) for name in re.findall(pattern, code))


def _read_rows_by_blocks() -> Library:
    """Have bitsandbytes' processor kernel restore any matrix, in whatever calls it.

    It takes every row to begin a block (bitsandbytes 0.50, backends/cpu/ops.py), and misreads rows that are no whole
    number of them: of 96 wide ones most weights come out with another block's scale. Read flat they come out right.
    """
    name = "bitsandbytes::dequantize_4bit"
    theirs = get_kernel(name, "CPU")

    def restore(
        keys: Any, packed: torch.Tensor, absmax: torch.Tensor, block: int, kind: str, shape: Any, dtype: Any
    ) -> Any:
        if shape[-1] % block == 0:
            return theirs.call_boxed(keys, packed, absmax, block, kind, shape, dtype)
        return theirs.call_boxed(keys, packed, absmax, block, kind, [math.prod(shape)], dtype).view(shape)

    library = Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings(action="ignore"):  # that a kernel is overridden, which is meant
        library.impl(name, restore, "CPU", with_keyset=True)
    return library


_restoring = _read_rows_by_blocks()  # which ends with what is returned


def keep_weights_as_quantised(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking NF4 weights on processors with AVX-512 BF16.

    In eval mode `Linear4bit.forward` rewrites its weight in place for an inference kernel (bitsandbytes 0.50,
    `_convert_weight_packed_for_cpu`). That kernel has no backward, so training after an evaluation would silently
    lose the gradients that pass through the base, and it refuses widths that 32 does not divide.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def is_quantized(module: Any) -> bool:
    return getattr(module.weight, "quant_state", None) is not None


def rows_fall_on_blocks(module: Any, rows: int) -> bool:
    """Whether every multiple of `rows` rows of a linear layer starts a block; without NF4 there are none."""
    return not is_quantized(module) or rows * int(module.weight.quant_state.shape[1]) % BLOCK == 0


def weight_rows(module: Any, rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """Rows (R, in) of a linear layer's weight in `dtype`; of one in NF4, R times `in` must be a multiple of 64."""
    if not is_quantized(module):
        whole: torch.Tensor = module.weight
        return whole[rows].to(dtype)
    state = module.weight.quant_state
    if rows.start == 0 and rows.stop == state.shape[0]:
        return dequantize_4bit(module.weight.data, state).to(dtype)
    columns = state.shape[1]
    weights = slice(rows.start * columns, rows.stop * columns)
    scales = _block_scales(state, slice(weights.start // BLOCK, -(-weights.stop // BLOCK)))
    return dequantised(module.weight, weights, scales, dtype).view(-1, columns)


def dequantised(parameter: Any, weights: slice, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Some of a packed parameter's weights, flat, by the float32 `scales` of their blocks; the first starts a block.

    Flat, as bitsandbytes' CPU kernel misreads rows of, say, 1.5 blocks.
    """
    state = parameter.quant_state
    part = QuantState(
        absmax=scales,
        shape=torch.Size((weights.stop - weights.start,)),
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=dtype,
    )
    flat: torch.Tensor = dequantize_4bit(parameter.data[weights.start // 2 : -(-weights.stop // 2)], part)
    return flat


def _block_scales(state: QuantState, blocks: slice) -> torch.Tensor:
    """Scales (float32) of the blocks, which double quantisation keeps as codes of their own."""
    if not state.nested:
        return state.absmax[blocks]
    outer = torch.arange(blocks.start, blocks.stop, device=state.absmax.device) // state.state2.blocksize
    return state.state2.code[state.absmax[blocks].int()].mul_(state.state2.absmax[outer]).add_(state.offset)


def empty_packed(shape: tuple[int, ...], dtype: torch.dtype, is_double: bool) -> Any:
    """An NF4 weight of `shape` as bitsandbytes lays it out, made of empty tensors."""
    elements = math.prod(shape)
    blocks = -(-elements // BLOCK)
    outer: Any = None
    if is_double:
        outer = QuantState(
            absmax=torch.empty(-(-blocks // OUTER_BLOCK)),
            blocksize=OUTER_BLOCK,
            code=torch.empty(256),
            dtype=torch.float32,
        )
    weight: Any = torch.nn.Parameter(torch.empty(-(-elements // 2), 1, dtype=torch.uint8), requires_grad=False)
    weight.quant_state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8 if is_double else torch.float32),
        shape=torch.Size(shape),
        dtype=dtype,
        blocksize=BLOCK,
        quant_type="nf4",
        code=torch.empty(16),
        offset=torch.empty(()) if is_double else None,
        state2=outer,
    )
    return weight
