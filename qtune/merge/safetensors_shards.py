"""A checkpoint of safetensors files, written one tensor at a time.

The shapes of a merge are known beforehand, so a file's header is written first and its tensors follow, a few rows at a
time: memory holds less than one tensor, whatever the size of the model. The format, from the safetensors documentation:
8 bytes with the length of the header (little-endian), the header as JSON padded with spaces to a multiple of 8, and the
bytes of the tensors in the header's order without gaps.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from qtune.merge.parallel_writer import as_bytes, written_beside
from qtune.model.checkpoint import DTYPE_BY_CODE, TensorSpec
from qtune.recipe.base_kind import INDEX_NAME

CODE_BY_DTYPE = {dtype: code for code, dtype in DTYPE_BY_CODE.items()}


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
