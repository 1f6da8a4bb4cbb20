"""A weight through 4 bits and back, with bitsandbytes' values to the bit.

On a card bitsandbytes' kernels do it, and the weight is restored whole. On a CPU they need five float32 copies of the
weight and a binary search for each of its values, so there the scales of all blocks are found first, and rows are
rounded as they are asked for, by compiled `kernels`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, quantize_4bit, quantize_blockwise

from qtune import accelerator
from qtune.lock import Quantization
from qtune.memory import packed_experts

WEIGHTS_AT_ONCE = 1 << 19  # 2 MiB in float32, which stay in a processor's cache
WEIGHTS_AT_ONCE_ON_CARD = 1 << 22  # chosen, not measured on a card: enough for its cores, and little of its memory
OUTER_BLOCK = 256

SAFE_SCALE = 2.0**-120  # below, a weight may be restored to less than 2**-126: see `restored_rows`

Index = slice | torch.Tensor  # which rows, and in which order
Rows = Callable[[Index], torch.Tensor]


def rows_at_once(weight: torch.Tensor) -> int:
    """How many rows of a matrix are worked on together."""
    most = WEIGHTS_AT_ONCE_ON_CARD if accelerator.is_card(weight.device) else WEIGHTS_AT_ONCE
    return max(1, most // max(1, weight.shape[1]))


def restored_rows(weight: torch.Tensor, dtype: torch.dtype, quantization: Quantization) -> Rows:
    """Rows of `weight` (O, I) as a run held it: in `dtype`, through 4 bits and back. They may come in float32.

    `quantization` is the lock's record of how. Two things are left to bitsandbytes, whose CPU kernels have their own
    way with them: rows that do not end on a block, and restored weights too small for normal floats, which are 0 on
    some processors and not on others.
    """
    block = quantization.blocksize
    if not accelerator.is_card(weight.device) and quantization.type == "nf4" and weight.shape[1] % block == 0:
        nf4 = NF4Rows.of(weight, dtype, block, quantization.double)
        if not ((nf4.scales != 0) & (nf4.scales.abs() < SAFE_SCALE)).any():
            return nf4.restored
    return restore_quantized(weight.to(dtype), quantization).__getitem__


def restored_experts(
    matrices: Iterator[torch.Tensor], shape: tuple[int, ...], quantization: Quantization
) -> Callable[[Index], torch.Tensor]:
    """Some experts (G, O, I) of a stack of `shape` as a run held it, which is packed as a whole: all scales of a stack
    share one offset. `matrices` are the experts', in the dtype that the run had."""
    packed = packed_experts.pack(matrices, torch.Size(shape), quantization.double)
    scales = packed_experts.block_scales(packed)

    def restored(experts: Index) -> torch.Tensor:
        assert isinstance(experts, slice)
        return packed_experts.matrices(packed, scales, experts, packed.quant_state.dtype)

    return restored


def piled(rows_of: Sequence[Rows], heights: Sequence[int]) -> Rows:
    """Rows of weights that stand on top of each other, each with its `heights` of them."""
    borders = [0, *accumulate(heights)]

    def rows(index: Index) -> torch.Tensor:
        assert isinstance(index, slice)
        first, last, _ = index.indices(borders[-1])
        cuts = [slice(max(first, low) - low, min(last, high) - low) for low, high in pairwise(borders)]
        return torch.cat([own(cut) for own, cut in zip(rows_of, cuts, strict=True) if cut.start < cut.stop])

    return rows


def restore_quantized(weight: torch.Tensor, quantization: Quantization) -> torch.Tensor:
    """`weight` by bitsandbytes through 4 bits and back, in its own dtype.

    Blocks run over the flattened tensor, and with double quantisation all block scales share one offset, so that it
    takes the whole weight.
    """
    packed, state = quantize_4bit(
        weight.contiguous(),
        blocksize=quantization.blocksize,
        compress_statistics=quantization.double,
        quant_type=quantization.type,
        quant_storage=getattr(torch, quantization.quant_storage),
    )
    return dequantize_4bit(packed, state)


@dataclass(frozen=True)
class NF4Rows:
    """A weight (O, I) on the CPU and the scales of its blocks, row by row (O, I / block).

    `inverse` is what a block's weights are multiplied by before they are rounded, `scales` what restores them.
    """

    weight: torch.Tensor
    dtype: torch.dtype
    inverse: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, dtype: torch.dtype, block: int, double: bool) -> "NF4Rows":
        from qtune.merge.kernels import largest_sizes  # a card does without numba

        parts = weight.split(rows_at_once(weight))
        largest = torch.cat([largest_sizes(part.to(dtype).view(-1, block)) for part in parts]).float()
        inverse = 1.0 / largest.clamp(min=1e-38)  # bitsandbytes' own floor
        scales = _quantised_and_restored(largest) if double else largest
        return cls(weight, dtype, inverse.view(len(weight), -1), scales.view(len(weight), -1))

    def restored(self, rows: Index) -> torch.Tensor:
        """Float32 that holds values of the dtype."""
        from qtune.merge.kernels import through_nf4

        part = self.weight[rows].to(self.dtype).float()
        inverse, scales = (each[rows].flatten().numpy() for each in (self.inverse, self.scales))
        blocks = part.view(len(inverse), -1).numpy()
        restored = torch.from_numpy(through_nf4(blocks, inverse, scales, self.dtype == torch.bfloat16)).view(part.shape)
        return restored.half().float() if self.dtype == torch.float16 else restored


def _quantised_and_restored(scales: torch.Tensor) -> torch.Tensor:
    """Block scales through the 8 bits that double quantisation keeps of them."""
    offset = scales.mean()
    return dequantize_blockwise(*quantize_blockwise(scales - offset, blocksize=OUTER_BLOCK)).add_(offset)
