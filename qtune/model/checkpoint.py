"""A base's weights as they lie in safetensors files, read one tensor at a time, and those of its text model alone.

Weights published in FP8 (codes, and a scale for every block of rows and columns, for every row, or for all) or MXFP4
(gpt-oss: experts in blocks of 32 codes of 4 bits with one exponent) are read as what they stand for, in bfloat16. To
those who read, a checkpoint holds no more than that: codes and scales have no names of their own. The arithmetic is
that of transformers' `Fp8Dequantize` and `convert_moe_packed_tensors`, to the bit; here a last block may be a part.

Held less of: while loading, one tensor in bfloat16, and of one block of rows, or one expert, twice that.
Costs: the product with the scales, once when a tensor is read.
Refuses: codes without scales, and scales of another shape.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.utils import unpack_tensor_to_dict
from safetensors import SafetensorError, safe_open

from qtune.errors import ModelError
from qtune.recipe.base_kind import (
    INDEX_NAME,
    SINGLE_NAME,
    is_in_4_bits,
    is_read_from_codes,
    quantization_of,
    read_index,
)
from qtune.recipe.text_part import CONFIG, TextPart, files_without_text, json_in

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

if hasattr(torch, "float8_e8m0fnu"):  # in torch since 2.7
    DTYPE_BY_CODE["F8_E8M0"] = torch.float8_e8m0fnu
CODES, EXPONENTS = "_blocks", "_scales"  # of MXFP4
SCALES = ("_scale_inv", "_scale")  # of FP8, what codes are multiplied by, whatever it is called
STATE = ".quant_state.bitsandbytes__"  # in the name of what says of a weight in 4 bits how it is made
ACTIVATIONS = (".activation_scale", ".input_scale")  # for activations in FP8, which these have not
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of codes without sign, in the OCP Microscaling format


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
    tells the tensors of the text model from what stands beside it. `packed` are those that are read from codes."""

    folder: Path
    shards: tuple[Shard, ...]
    index: dict[str, Any] | None
    text: TextPart
    packed: Mapping[str, "Packed"] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, is_text_alone: bool = False, keeps_4_bits: bool = False) -> "BaseCheckpoint":
        """Read every header, or of the files that hold some of the text model. Weights that bitsandbytes has in 4 bits
        are tensors as any, or stay the parts that they are made of with `keeps_4_bits`.

        Raises ModelError for a folder without weights, and for a damaged or missing shard.
        """
        single, index_path, text = folder / SINGLE_NAME, folder / INDEX_NAME, TextPart.in_folder(folder)
        if single.is_file():
            return cls(folder, (_read_header(single),), None, text)._unpacked(keeps_4_bits)
        if not index_path.is_file():
            raise ModelError(f"{folder}: has neither {SINGLE_NAME} nor {INDEX_NAME}, so there are no weights to merge.")
        index = read_index(index_path)
        names = set(index["weight_map"].values()) - (files_without_text(folder) if is_text_alone else set())
        return cls(folder, tuple(_read_header(folder / name) for name in sorted(names)), index, text)._unpacked(
            keeps_4_bits
        )

    def _unpacked(self, keeps_4_bits: bool) -> "BaseCheckpoint":
        """The same, with what codes and scales stand for in their place. Raises ModelError for half of them."""
        described = json_in(self.folder / CONFIG)
        settings, specs = quantization_of(described), self.specs()
        packed: dict[str, Packed] = {}
        if is_in_4_bits(described):
            if keeps_4_bits:
                return self
            states = {name.partition(STATE)[0]: name for name in specs if STATE in name}
            packed = {name: self._in_4_bits(name, state) for name, state in states.items()}
        elif not is_read_from_codes(described):
            return self
        for name, spec in specs.items():
            if name.endswith(CODES) and spec.dtype == torch.uint8:
                meant = name.removesuffix(CODES)
                packed[meant] = self._packed(name, f"{meant}{EXPONENTS}", settings)
            elif spec.dtype == torch.float8_e4m3fn:
                scales = next((f"{name}{end}" for end in SCALES if f"{name}{end}" in specs), f"{name}{SCALES[0]}")
                packed[name] = self._packed(name, scales, settings)
        if not packed:
            raise ModelError(
                f"{self.folder / CONFIG}: quantization_config says {settings['quant_method']}, and no tensor in the"
                f" files is. Take the {CONFIG} that came with the weights."
            )
        return self._as_meant(packed)

    def _packed(self, codes: str, scales: str, settings: Mapping[str, Any]) -> "Packed":
        specs, shards = self.specs(), self.shard_by_name
        path = self.folder / shards[codes].file_name
        if scales not in specs:
            raise ModelError(
                f"{path}: {codes} is in {settings['quant_method']}, and {scales}, which scales it, is in no file."
                " Download the base again."
            )
        files = {name: shards[name].file_name for name in (codes, scales)}
        return Packed.of(specs[codes], specs[scales], files, settings.get("weight_block_size"))

    def _in_4_bits(self, name: str, state: str) -> "Packed":
        """A weight by bitsandbytes: beside its codes lie `name`.absmax and others, and a text that says the shape."""
        shards = self.shard_by_name
        if name not in shards:
            raise ModelError(
                f"{self.folder / shards[state].file_name}: {state} belongs to {name}, which is in no file. Download the"
                " base again."
            )
        files = {each: shard.file_name for each, shard in shards.items() if each == name or each.startswith(f"{name}.")}
        said = unpack_tensor_to_dict(self.called(state))
        return Packed(name, state, files, tuple(said["shape"]), None, getattr(torch, said["dtype"]))

    def _as_meant(self, packed: Mapping[str, "Packed"]) -> "BaseCheckpoint":
        gone = {name for each in packed.values() for name in each.files if name != each.codes}
        gone |= {name for name in self.specs() if name.endswith(ACTIVATIONS)}
        by_codes = {each.codes: TensorSpec(name, each.dtype, each.shape) for name, each in packed.items()}
        shards = (
            replace(shard, tensors=tuple(by_codes.get(s.name, s) for s in shard.tensors if s.name not in gone))
            for shard in self.shards
        )
        kept = tuple(shard for shard in shards if shard.tensors)
        held = {spec.name: shard.file_name for shard in kept for spec in shard.tensors}
        index = None if self.index is None else {**self.index, "weight_map": held}
        return replace(self, shards=kept, index=index, packed=packed)

    @contextmanager
    def text_tensors(self) -> Iterator[dict[str, Any]]:
        """The text model's tensors by its own names, each a slice of a file that is read when it is indexed."""
        with ExitStack() as files:
            names = {shard.file_name for shard in self.shards}
            names |= {name for each in self.packed.values() for name in each.files.values()}
            opened = {
                name: files.enter_context(safe_open(self.folder / name, framework="pt")) for name in sorted(names)
            }
            shards = self.shard_by_name
            yield {
                own: _Restored(self.packed[name], opened)
                if name in self.packed
                else opened[shards[name].file_name].get_slice(name)
                for own, name in self.stored_as.items()
            }

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
    def spec_by_name(self) -> dict[str, TensorSpec]:
        return self.specs()

    @cached_property
    def shard_by_name(self) -> dict[str, Shard]:
        return {spec.name: shard for shard in self.shards for spec in shard.tensors}

    def tensor(self, shard: Shard, name: str) -> torch.Tensor:
        """One tensor, mapped from the file; its pages are given back with it. One in codes is restored."""
        if name in self.packed:
            packed = self.packed[name]
            with ExitStack() as files:
                opened = {
                    each: files.enter_context(safe_open(self.folder / each, framework="pt"))
                    for each in set(packed.files.values())
                }
                return packed.restored(opened)
        with safe_open(self.folder / shard.file_name, framework="pt") as file:
            return file.get_tensor(name)


@dataclass(frozen=True)
class Packed:
    """A tensor of `shape` and `dtype` that lies in the files as `codes` and `scales`, by name; `files` says which file
    holds these and what else it is made of.

    `block` are the rows and columns of FP8 that have a scale in common; of others it is None.
    """

    codes: str
    scales: str
    files: Mapping[str, str]
    shape: tuple[int, ...]
    block: tuple[int, int] | None
    dtype: torch.dtype = torch.bfloat16

    @classmethod
    def of(cls, codes: TensorSpec, scales: TensorSpec, files: Mapping[str, str], block: Any) -> "Packed":
        """Raises ModelError for scales that are not those of the codes."""
        if codes.name.endswith(CODES):
            fits = len(codes.shape) == 4 and scales.shape == codes.shape[:3]
            experts, rows, columns = codes.shape[0], codes.shape[1], prod(codes.shape[2:]) * 2
            made = cls(codes.name, scales.name, files, (experts, columns, rows), None)
        else:
            rows, columns = codes.shape[-2:]
            across = scales.shape[-2:] if len(scales.shape) >= 2 and scales.numbers > 1 else (1, 1)
            whole = (rows if across[0] == 1 else 1, columns)
            high, wide = whole if across[1] == 1 else map(int, block or (128, 128))
            grid = (-(-rows // high), -(-columns // wide))
            fits = across == grid and scales.numbers in (1, prod(codes.shape[:-2]) * prod(grid))
            made = cls(codes.name, scales.name, files, codes.shape, (high, wide))
        if not fits:
            raise ModelError(
                f"{files[scales.name]}: {scales.name} has the shape {list(scales.shape)}, which does not scale"
                f" {codes.name} of {list(codes.shape)}. Download the base again."
            )
        return made

    def restored(self, opened: Mapping[str, Any]) -> torch.Tensor:
        """From open files, by name. In float32 where it is to be rounded as a run held it, which is of 4 bits."""
        parts = {name: opened[file].get_tensor(name) for name, file in self.files.items()}
        codes, scales = parts.pop(self.codes), parts[self.scales]
        if STATE in self.scales:
            state = QuantState.from_dict(parts, device=torch.device("cpu"))
            state.dtype = torch.float32
            return dequantize_4bit(codes, state)
        return _from_mxfp4(codes, scales) if self.block is None else _from_fp8(codes, _plain(scales), self.block)


@dataclass(frozen=True)
class _Restored:
    """What can be indexed as safetensors' slices are, to be read whole."""

    packed: Packed
    opened: Mapping[str, Any]

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.packed.restored(self.opened)[index]


def _plain(scales: torch.Tensor) -> torch.Tensor:
    """Float32; bytes are exponents of 2, less 127."""
    return (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()


def _from_fp8(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """(..., O, I) in bfloat16, from codes of that shape and a scale for every block of rows and columns."""
    rows, columns = codes.shape[-2:]
    restored = torch.empty(codes.shape, dtype=torch.bfloat16)
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    each = scales.reshape(-1, *grid).expand(prod(codes.shape[:-2]), *grid)
    parts = zip(codes.view(-1, rows, columns), each, restored.view(-1, rows, columns), strict=True)
    for matrix, by_block, to in parts:
        for scale, some, out in zip(by_block, matrix.split(block[0]), to.split(block[0]), strict=True):
            out.copy_(some.float() * scale.repeat_interleave(block[1])[:columns])
    return restored


def _from_mxfp4(codes: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """(E, I, O) in bfloat16, from codes (E, O, G, 16), two to a byte, the first in its low half, and exponents
    (E, O, G) of the OCP Microscaling format: 2 to the power of the byte less 127."""
    experts, rows, groups, size = codes.shape
    values = torch.tensor([*FP4_VALUES, *(-value for value in FP4_VALUES)], dtype=torch.bfloat16)
    restored = torch.empty(experts, 2 * groups * size, rows, dtype=torch.bfloat16)
    for packed, exponent, to in zip(codes, exponents, restored, strict=True):
        pairs = torch.stack([values[(packed & 15).long()], values[(packed >> 4).long()]], -1)
        scaled = torch.ldexp(pairs.view(rows, groups, 2 * size), exponent.int()[..., None] - 127)
        to.copy_(scaled.view(rows, -1).T)
    return restored


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
