"""How weights are stored in a GGUF file, how far that may move them, and the file itself, written as a stream.

Blocks are of 32 weights in a row. The quantisers are the gguf package's, which follow llama.cpp's to the bit or nearly.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, ReaderTensor, quants
from numpy.typing import NDArray

from qtune import sealed
from qtune.errors import ModelError

Quant = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
QUANTS: tuple[Quant, ...] = get_args(Quant)
TYPE_BY_QUANT = {quant: GGMLQuantizationType[quant.upper()] for quant in QUANTS}
FILE_TYPE_BY_QUANT = {
    quant: LlamaFileType.ALL_F32 if quant == "f32" else LlamaFileType[f"MOSTLY_{quant.upper()}"] for quant in QUANTS
}
F32, F16, Q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0
TORCH_TYPE = {F32: torch.float32, F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}
BELOW_8_BITS = ("q5_1", "q5_0", "q4_1", "q4_0")
WEIGHTS_AT_ONCE, BYTES_AT_ONCE = 4 << 20, 1 << 20
# What a block spans, its largest size (_0) or from its smallest to its largest weight (_1), in steps of each type; and
# how many steps rounding may cost. Q4_0 and Q5_0 have no value for the largest weight with its sign turned.
STEPS = {"Q8_0": (127, 0.5), "Q5_0": (16, 1.0), "Q4_0": (8, 1.0), "Q5_1": (31, 0.5), "Q4_1": (15, 0.5)}
ROUNDING = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8}  # of a weight, half its last bit
LEAST_F16 = 2.0**-25  # half the least size that float16, which scales and offsets are in, tells from 0


def stored_type(quant: Quant, shape: tuple[int, ...], is_head: bool) -> GGMLQuantizationType:
    """How one tensor is stored: vectors in full, and in 16 bits what blocks do not divide.

    The head, tied or not, keeps 8 bits where the rest has fewer: every logit passes through it.
    """
    wanted = TYPE_BY_QUANT[quant]
    if len(shape) == 1:
        return F32
    if shape[-1] % GGML_QUANT_SIZES[wanted][0]:
        return F16
    return Q8_0 if is_head and quant in BELOW_8_BITS else wanted


def stored_bytes(kind: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    weights, size = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // weights * size


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `source` is its name in the checkpoint, `place` its name here."""

    source: str
    place: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType

    @property
    def bytes(self) -> int:
        return stored_bytes(self.kind, self.shape)


@dataclass(frozen=True)
class Written:
    """One tensor as it was written: its worst error over what its type may cost, and the SHA-256 of its bytes."""

    fraction: float
    sha256: str


def write(
    writer: GGUFWriter, path: Path, entries: Sequence[Entry], tensors: Iterator[torch.Tensor]
) -> dict[str, Written]:
    """Everything `writer` was told and where each entry will stand, then `tensors`, float32, as they come; by place.

    One tensor is held at a time, as it came and as it is stored. The file is on the disk on return.
    """
    for entry in entries:
        writer.add_tensor_info(entry.place, entry.shape, np.dtype(np.float32), entry.bytes, raw_dtype=entry.kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    # No name holds a tensor while the next one is made.
    written = {entry.place: _write_one(writer, entry, next(tensors)) for entry in entries}
    writer.close()
    sealed.flush(path)
    return written


def _write_one(writer: GGUFWriter, entry: Entry, tensor: torch.Tensor) -> Written:
    assert tuple(tensor.shape) == entry.shape, entry.place
    stored = packed(entry, tensor)
    writer.write_tensor_data(stored)
    lines = stored.reshape(math.prod(entry.shape[:-1]), -1)
    return Written(worst_fraction(lines, tensor.cpu().numpy(), entry.kind), hashlib.sha256(stored.data).hexdigest())


def packed(entry: Entry, tensor: torch.Tensor) -> NDArray[np.uint8]:
    """The bytes of `tensor` as stored. Raises ModelError for a weight that float16 cannot hold."""
    if entry.kind not in TORCH_TYPE:
        return quants.quantize(tensor.cpu().numpy(), entry.kind)
    rounded = tensor.to(TORCH_TYPE[entry.kind]).cpu()
    if entry.kind == F16 and not torch.isfinite(rounded).all():
        raise ModelError(f"{entry.source}: has weights beyond the range of f16; --quant bf16 and f32 reach further.")
    return rounded.contiguous().reshape(-1).view(torch.uint8).numpy()


@dataclass(frozen=True)
class ReadBack:
    """A file as it was read: the worst error of a weight over what its type may cost, and where; infinite where a
    tensor is not the one that was written."""

    tensors: int
    worst_fraction: float
    worst_tensor: str

    @property
    def passed(self) -> bool:
        return self.worst_fraction <= 1


def read_back(path: Path, reader: GGUFReader, entries: Iterable[Entry], written: dict[str, Written]) -> ReadBack:
    """Every tensor of the file at `path` against what was written, byte by byte, and so against its weights."""
    found = {tensor.name: tensor for tensor in reader.tensors}
    fractions = {
        entry.place: written[entry.place].fraction
        if _is_as_written(path, found.pop(entry.place, None), entry, written[entry.place])
        else math.inf
        for entry in entries
    }
    fractions |= dict.fromkeys(found, math.inf)
    worst = max(fractions, key=lambda place: fractions[place])
    return ReadBack(len(fractions), fractions[worst], worst)


def _is_as_written(path: Path, found: ReaderTensor | None, entry: Entry, written: Written) -> bool:
    if found is None or (tuple(found.shape[::-1]), found.tensor_type) != (entry.shape, entry.kind):
        return False
    return _sha256(path, int(found.data_offset), int(found.n_bytes)) == written.sha256


def _sha256(path: Path, start: int, count: int) -> str:
    """Of `count` bytes, read and not mapped: the pages of a mapped file stay this process's until it is closed."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while count and (block := file.read(min(count, BYTES_AT_ONCE))):
            digest.update(block)
            count -= len(block)
    return digest.hexdigest()


def worst_fraction(stored: NDArray[np.uint8], wanted: NDArray[np.float32], kind: GGMLQuantizationType) -> float:
    """The largest error of any weight over its bound, a few rows at a time; `stored` has a line of bytes for each."""
    rows = wanted.reshape(len(stored), -1)
    at_once = max(1, WEIGHTS_AT_ONCE // rows.shape[-1])
    return max(
        _over_bound(quants.dequantize(stored[part], kind), rows[part], kind.name)
        for part in (slice(start, start + at_once) for start in range(0, len(rows), at_once))
    )


def _over_bound(found: NDArray[np.float32], wanted: NDArray[np.float32], kind: str) -> float:
    bound = (
        np.abs(wanted) * ROUNDING[kind] + LEAST_F16 * (kind == "F16")
        if kind in ROUNDING
        else _block_bound(wanted, kind)
    )
    return float(np.max(np.abs(found - wanted) / (bound + np.finfo(np.float32).tiny)))


def _block_bound(wanted: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
    """How far each weight of a block may move: a rounded step, and the rounding of the block's scale and offset."""
    steps, cost = STEPS[kind]
    blocks = wanted.reshape(-1, 32)
    largest = np.abs(blocks).max(-1, keepdims=True)
    span = blocks.max(-1, keepdims=True) - blocks.min(-1, keepdims=True) if kind.endswith("_1") else largest
    bound = span * (cost / steps + ROUNDING["F16"]) + largest * ROUNDING["F16"] + (steps + 1) * LEAST_F16
    return np.broadcast_to(bound, blocks.shape).reshape(wanted.shape)
