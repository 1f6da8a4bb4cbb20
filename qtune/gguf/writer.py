"""How weights are stored in a GGUF file, how far that may move them, and the file itself, written as a stream.

Blocks are of 32 weights in a row. The quantisers are the gguf package's, which follow llama.cpp's to the bit or nearly;
that of 8 bits is our own, and the same to the bit.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, ReaderTensor, quants
from numpy.typing import NDArray
from xxhash import xxh3_128

from qtune.errors import ModelError
from qtune.merge.kernels import from_steps, in_steps, largest_error, largest_sizes
from qtune.merge.merged_tensor import all_finite
from qtune.merge.parallel_writer import Put, as_bytes, in_order, written_beside

Quant = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
QUANTS: tuple[Quant, ...] = get_args(Quant)
TYPE_BY_QUANT = {quant: GGMLQuantizationType[quant.upper()] for quant in QUANTS}
FILE_TYPE_BY_QUANT = {
    quant: LlamaFileType.ALL_F32 if quant == "f32" else LlamaFileType[f"MOSTLY_{quant.upper()}"] for quant in QUANTS
}
F32, F16, Q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0
TORCH_TYPE = {F32: torch.float32, F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}
BELOW_8_BITS = ("q5_1", "q5_0", "q4_1", "q4_0")
BLOCK, SCALE_BYTES = 32, 2
BYTES_AT_ONCE = 1 << 20
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
class TensorEntry:
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
    """One tensor as it was written: its worst error over what its type may cost, and the XXH3 of its bytes.

    That finds what a disk does to a file, at the speed of memory; it is no proof against who means to deceive.
    """

    fraction: float
    xxh3: str


@dataclass(frozen=True)
class Stored:
    """Some rows of the tensor at `place` as they are stored, and their worst error over what their type may cost."""

    place: str
    content: NDArray[np.uint8]
    fraction: float


def stored(entry: TensorEntry, rows: torch.Tensor) -> Stored:
    """`rows` (O, I), float32 on the host, of `entry`. Raises ModelError for a weight that float16 cannot hold."""
    content = packed(entry, rows)
    return Stored(entry.place, content, worst_fraction(content.reshape(len(rows), -1), rows, entry.kind))


def write(
    writer: GGUFWriter, path: Path, entries: Sequence[TensorEntry], parts: Iterable[Stored]
) -> dict[str, Written]:
    """Everything `writer` was told and where each entry will stand, then `parts`, which follow each other as the
    entries do; by place. The file is on the disk on return."""
    for entry in entries:
        writer.add_tensor_info(entry.place, entry.shape, np.dtype(np.float32), entry.bytes, raw_dtype=entry.kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    by_place = groupby(parts, lambda part: part.place)
    written: dict[str, tuple[float, Any]] = {}
    with path.open("ab") as file, written_beside(file) as put:
        put(_padding(writer, file.tell()))
        for entry, (place, group) in zip(entries, by_place, strict=True):
            assert place == entry.place, place
            written[place] = _put_one(put, entry, group)
            put(_padding(writer, entry.bytes))
    return {place: Written(fraction, digest.hexdigest()) for place, (fraction, digest) in written.items()}


def _put_one(put: Put, entry: TensorEntry, parts: Iterable[Stored]) -> tuple[float, Any]:
    """Its worst fraction, and the digest, which is that of its bytes once they are written."""
    fraction, missing, digest = 0.0, entry.bytes, xxh3_128()
    for part in parts:
        put(part.content.data, digest)
        fraction, missing = max(fraction, part.fraction), missing - part.content.nbytes
    assert not missing, entry.place
    return fraction, digest


def _padding(writer: GGUFWriter, count: int) -> bytes:
    """What brings `count` bytes to where a tensor may begin."""
    return bytes(-count % writer.data_alignment)


def packed(entry: TensorEntry, rows: torch.Tensor) -> NDArray[np.uint8]:
    """The bytes of `rows` as stored. Raises ModelError for a weight that float16 cannot hold."""
    if entry.kind == Q8_0:
        return _in_8_bits(rows)
    if entry.kind not in TORCH_TYPE:
        return quants.quantize(rows.numpy(), entry.kind)
    rounded = rows.to(TORCH_TYPE[entry.kind])
    if entry.kind == F16 and not all_finite(rounded):
        raise ModelError(f"{entry.source}: has weights beyond the range of f16; --quant bf16 and f32 reach further.")
    return as_bytes(rounded)


def _in_8_bits(rows: torch.Tensor) -> NDArray[np.uint8]:
    """Q8_0 as the gguf package makes it, to the bit, in a small part of its time: most files are of this type.

    A block is its scale, the largest size over 127 in float16, and 32 bytes.
    """
    scales, content = in_steps(rows.reshape(-1, BLOCK).numpy(), np.float32(127), SCALE_BYTES)
    content[:, :SCALE_BYTES] = scales.astype(np.float16)[:, None].view(np.uint8)
    return content


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


def read_back(path: Path, reader: GGUFReader, entries: Sequence[TensorEntry], written: dict[str, Written]) -> ReadBack:
    """Every tensor of the file at `path` against what was written, byte by byte, and so against its weights."""
    found = {tensor.name: tensor for tensor in reader.tensors}
    are_right = in_order(
        partial(_is_as_written, path, found.get(entry.place), entry, written[entry.place]) for entry in entries
    )
    fractions = dict.fromkeys(found, math.inf)
    for entry, is_right in zip(entries, are_right, strict=True):
        fractions[entry.place] = written[entry.place].fraction if is_right else math.inf
    worst = max(fractions, key=lambda place: fractions[place])
    return ReadBack(len(fractions), fractions[worst], worst)


def _is_as_written(path: Path, found: ReaderTensor | None, entry: TensorEntry, written: Written) -> bool:
    if found is None or (tuple(found.shape[::-1]), found.tensor_type) != (entry.shape, entry.kind):
        return False
    return _xxh3(path, int(found.data_offset), int(found.n_bytes)) == written.xxh3


def _xxh3(path: Path, start: int, count: int) -> str:
    """Of `count` bytes, read and not mapped: the pages of a mapped file stay this process's until it is closed."""
    digest = xxh3_128()
    with path.open("rb") as file:
        file.seek(start)
        while count and (block := file.read(min(count, BYTES_AT_ONCE))):
            digest.update(block)
            count -= len(block)
    return digest.hexdigest()


def worst_fraction(content: NDArray[np.uint8], wanted: torch.Tensor, kind: GGMLQuantizationType) -> float:
    """The largest error of any weight over its bound; `content` has a line of bytes for each row of `wanted` (O, I)."""
    found, tiny = restored(content, kind), torch.finfo(torch.float32).tiny
    if kind.name in ROUNDING:
        bounds = np.float32(ROUNDING[kind.name]), np.float32(LEAST_F16 if kind == F16 else tiny)
        return float(largest_error(found.flatten().numpy(), wanted.flatten().numpy(), *bounds))
    wanted = wanted.reshape(-1, BLOCK)
    error = largest_sizes(found.view(wanted.shape).sub_(wanted))
    return float(error.div_(_block_bound(wanted, kind.name).add_(tiny)).amax())


def restored(content: NDArray[np.uint8], kind: GGMLQuantizationType) -> torch.Tensor:
    """Float32 that may be written to."""
    if kind in TORCH_TYPE:
        return torch.from_numpy(content).view(TORCH_TYPE[kind]).to(torch.float32, copy=True)
    if kind == Q8_0:
        content = content.reshape(-1, SCALE_BYTES + BLOCK)
        scales = content[:, :SCALE_BYTES].copy().view(np.float16)[:, 0].astype(np.float32)
        return torch.from_numpy(from_steps(scales, content, SCALE_BYTES))
    return torch.from_numpy(quants.dequantize(content, kind))


def _block_bound(blocks: torch.Tensor, kind: str) -> torch.Tensor:
    """How far each weight of a block may move: a rounded step, and the rounding of the block's scale and offset."""
    steps, cost = STEPS[kind]
    largest = largest_sizes(blocks)
    span = blocks.amax(-1) - blocks.amin(-1) if kind.endswith("_1") else largest
    return span * (cost / steps + ROUNDING["F16"]) + largest * ROUNDING["F16"] + (steps + 1) * LEAST_F16
