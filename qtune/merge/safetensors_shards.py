"""A checkpoint of safetensors files, read and written one tensor at a time.

The shapes of a merge are known beforehand, so a file's header is written first and its tensors follow, a few rows at a
time: memory holds less than one tensor, whatever the size of the model. The format, from the safetensors documentation:
8 bytes with the length of the header (little-endian), the header as JSON padded with spaces to a multiple of 8, and the
bytes of the tensors in the header's order without gaps.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qtune.errors import ModelError
from qtune.merge.parallel_writer import as_bytes, written_beside
from qtune.recipe.base_kind import INDEX_NAME, SINGLE_NAME, read_index

DTYPE_BY_CODE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODE_BY_DTYPE = {dtype: code for code, dtype in DTYPE_BY_CODE.items()}


@dataclass(frozen=True)
class TensorSpec:
    """What a header says of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numbers * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One file of a checkpoint: its tensors in the order their bytes stand in."""

    file_name: str
    metadata: dict[str, str]
    tensors: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class BaseCheckpoint:
    """The weights in a Hugging Face folder; `index` is the shard index as JSON, None for a single file."""

    folder: Path
    shards: tuple[Shard, ...]
    index: dict[str, Any] | None

    @classmethod
    def open(cls, folder: Path) -> "BaseCheckpoint":
        """Read every header. Raises ModelError for a folder without weights, and for a damaged or missing shard."""
        single, index_path = folder / SINGLE_NAME, folder / INDEX_NAME
        if single.is_file():
            return cls(folder, (_read_header(single),), None)
        if not index_path.is_file():
            raise ModelError(f"{folder}: has neither {SINGLE_NAME} nor {INDEX_NAME}, so there are no weights to merge.")
        index = read_index(index_path)
        names = sorted(set(index["weight_map"].values()))
        return cls(folder, tuple(_read_header(folder / name) for name in names), index)

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor by name."""
        return {spec.name: spec for shard in self.shards for spec in shard.tensors}

    def called(self, name: str) -> torch.Tensor:
        """The tensor `name`, whichever file it is in."""
        return self.tensor(self.shard_by_name[name], name)

    @cached_property
    def shard_by_name(self) -> dict[str, Shard]:
        return {spec.name: shard for shard in self.shards for spec in shard.tensors}

    def tensor(self, shard: Shard, name: str) -> torch.Tensor:
        """One tensor, mapped from the file; its pages are given back with it."""
        with safe_open(self.folder / shard.file_name, framework="pt") as file:
            return file.get_tensor(name)


def _read_header(path: Path) -> Shard:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            tensors = tuple(
                TensorSpec(name, _dtype_of(path, name, part.get_dtype()), tuple(part.get_shape()))
                for name, part in slices.items()
            )
            return Shard(path.name, dict(file.metadata() or {}), tensors)
    except FileNotFoundError:
        raise ModelError(f"{path}: is named in {INDEX_NAME} and is missing. Download the base again.") from None
    except (SafetensorError, OSError) as fault:
        raise ModelError(f"{path}: cannot be read ({fault}). Download the base again.") from None


def _dtype_of(path: Path, name: str, code: str) -> torch.dtype:
    if code not in DTYPE_BY_CODE:
        raise ModelError(f"{path}: {name} is of type {code}, which cannot be merged.")
    return DTYPE_BY_CODE[code]


def write_shard(
    path: Path, metadata: dict[str, str], specs: Iterable[TensorSpec], parts: Iterable[torch.Tensor]
) -> None:
    """Write the header for `specs`, then their tensors, each in `parts` that follow each other in it; the file is on
    the disk on return."""
    specs = tuple(specs)
    with path.open("wb") as file, written_beside(file) as put:
        put(_header(metadata, specs))
        for part in _fitting(specs, (part for part in parts if part.numel())):
            put(as_bytes(part).data)


def _fitting(specs: tuple[TensorSpec, ...], parts: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """`parts`, which are the tensors of `specs` and nothing else."""
    for spec in specs:
        missing = spec.bytes
        while missing:
            part = next(parts, None)
            assert part is not None, f"{spec.name} is not whole"
            assert part.dtype == spec.dtype, spec.name
            missing -= part.nbytes
            assert missing >= 0, spec.name
            yield part
    assert next(parts, None) is None


def _header(metadata: dict[str, str], specs: tuple[TensorSpec, ...]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    start = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": CODE_BY_DTYPE[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, start + spec.bytes],
        }
        start += spec.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_index(folder: Path, index: dict[str, Any], total_bytes: int) -> None:
    """The base's shard index with the `total_size` of what was written; names and the weight map stay as they were."""
    changed = {**index, "metadata": {**index.get("metadata", {}), "total_size": total_bytes}}
    write_synced(folder / INDEX_NAME, (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode())


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
