"""A base's weights as they lie in safetensors files, read one tensor at a time, and those of its text model alone."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qtune.errors import ModelError
from qtune.recipe.base_kind import INDEX_NAME, SINGLE_NAME, read_index
from qtune.recipe.text_part import TextPart, files_without_text

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
    """The weights in a Hugging Face folder; `index` is the shard index as JSON, None for a single file, and `text`
    tells the tensors of the text model from what stands beside it."""

    folder: Path
    shards: tuple[Shard, ...]
    index: dict[str, Any] | None
    text: TextPart

    @classmethod
    def open(cls, folder: Path, is_text_alone: bool = False) -> "BaseCheckpoint":
        """Read every header, or of the files that hold some of the text model.

        Raises ModelError for a folder without weights, and for a damaged or missing shard.
        """
        single, index_path, text = folder / SINGLE_NAME, folder / INDEX_NAME, TextPart.in_folder(folder)
        if single.is_file():
            return cls(folder, (_read_header(single),), None, text)
        if not index_path.is_file():
            raise ModelError(f"{folder}: has neither {SINGLE_NAME} nor {INDEX_NAME}, so there are no weights to merge.")
        index = read_index(index_path)
        names = set(index["weight_map"].values()) - (files_without_text(folder) if is_text_alone else set())
        return cls(folder, tuple(_read_header(folder / name) for name in sorted(names)), index, text)

    @contextmanager
    def text_tensors(self) -> Iterator[dict[str, Any]]:
        """The text model's tensors by its own names, each a slice of a file that is read when it is indexed."""
        with ExitStack() as files:
            opened = {
                shard.file_name: files.enter_context(safe_open(self.folder / shard.file_name, framework="pt"))
                for shard in self.shards
            }
            shards = self.shard_by_name
            yield {own: opened[shards[name].file_name].get_slice(name) for own, name in self.stored_as.items()}

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor by name."""
        return {spec.name: spec for shard in self.shards for spec in shard.tensors}

    def text_specs(self) -> dict[str, TensorSpec]:
        """Every tensor of the text model, by the name that it has there."""
        specs = self.specs()
        return {own: specs[name] for own, name in self.stored_as.items()}

    @cached_property
    def stored_as(self) -> dict[str, str]:
        """What the checkpoint calls each tensor of the text model."""
        return {own: name for name in self.specs() if (own := self.text.name(name)) is not None}

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
