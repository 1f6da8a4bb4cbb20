"""Weights as they are stored, and a file that is not what was written."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter, quants

from qtune.errors import ModelError
from qtune.gguf.writer import (
    F16,
    F32,
    Q8_0,
    QUANTS,
    TYPE_BY_QUANT,
    Quant,
    TensorEntry,
    packed,
    read_back,
    restored,
    stored,
    stored_bytes,
    stored_type,
    worst_fraction,
    write,
)

SHAPE = (48, 96)
SCALES = {"usual": 0.02, "tiny": 1e-6, "large": 3e3}


def weights(scale: float = 0.02) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * scale


def entry(quant: Quant, name: str = "a.weight") -> TensorEntry:
    return TensorEntry(f"model.{name}", name, SHAPE, TYPE_BY_QUANT[quant])


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES.keys())
@pytest.mark.parametrize("quant", QUANTS)
def test_no_type_costs_more_than_it_may(quant, scale) -> None:
    tensor, kind = weights(scale), TYPE_BY_QUANT[quant]
    content = packed(entry(quant), tensor).reshape(SHAPE[0], -1)
    assert content.nbytes == stored_bytes(kind, SHAPE)
    assert worst_fraction(content, tensor, kind) <= 1


def awkward_blocks() -> torch.Tensor:
    """Nothing, one weight, halves of a step to both sides, and sizes that float16 holds badly or not at all."""
    rows = torch.zeros(8, 64)
    rows[1, 3] = -0.7
    rows[2] = torch.cat([torch.tensor([127.0, -127.0]), torch.arange(-31, 31) + 0.5])
    rows[3] = -rows[2]
    rows[4] = torch.linspace(-1e-9, 1e-9, 64)
    rows[5] = torch.linspace(-6e4, 6e4, 64)
    rows[6] = torch.full((64,), -0.0)
    rows[7] = torch.nextafter(rows[2], torch.full((64,), 200.0))
    return rows


@pytest.mark.parametrize("rows", [weights(), weights(3e3), awkward_blocks()], ids=["usual", "large", "awkward"])
def test_8_bits_are_the_gguf_packages_to_the_bit(rows) -> None:
    content = packed(TensorEntry("model.a", "a", tuple(rows.shape), Q8_0), rows)
    assert np.array_equal(content.reshape(len(rows), -1), quants.quantize(rows.numpy(), Q8_0))
    assert np.array_equal(restored(content, Q8_0).numpy(), quants.dequantize(content, Q8_0))


@pytest.mark.parametrize("quant", [quant for quant in QUANTS if quant != "f32"])
def test_the_bound_notices_weights_that_are_others(quant) -> None:
    """Half again as large, or moved by one row: nothing that rounding does."""
    tensor, kind = weights(), TYPE_BY_QUANT[quant]
    content = packed(entry(quant), tensor).reshape(SHAPE[0], -1)
    for other in (1.5 * tensor, tensor.roll(1, 0)):
        assert worst_fraction(content, other, kind) > 1


def test_what_is_stored_otherwise_than_asked() -> None:
    assert stored_type("q4_0", (64,), is_head=False) == F32
    assert stored_type("q8_0", (64, 172), is_head=False) == F16
    assert stored_type("f32", (64, 172), is_head=False) == F32
    assert stored_type("q4_0", SHAPE, is_head=True) == Q8_0
    assert stored_type("f16", SHAPE, is_head=True) == F16


def test_a_weight_that_float16_cannot_hold_is_named() -> None:
    with pytest.raises(ModelError, match=r"model\.a\.weight: .*--quant bf16 and f32 reach further"):
        packed(entry("f16"), weights() + 1e5)
    assert packed(entry("bf16"), weights() + 1e5).nbytes == stored_bytes(TYPE_BY_QUANT["bf16"], SHAPE)


def two_tensors(path: Path) -> tuple[list[TensorEntry], dict]:
    entries = [entry("q8_0", "a.weight"), TensorEntry("model.n", "b.weight", (5,), F32)]
    halves = [stored(entries[0], rows) for rows in weights().split(SHAPE[0] // 2)]
    return entries, write(GGUFWriter(None, "llama"), path, entries, [*halves, stored(entries[1], torch.ones(5))])


def test_a_file_is_read_back(tmp_path) -> None:
    entries, written = two_tensors(tmp_path / "x.gguf")
    found = read_back(tmp_path / "x.gguf", GGUFReader(tmp_path / "x.gguf"), entries, written)
    assert found.passed
    assert (found.tensors, found.worst_tensor) == (2, "a.weight")


def test_one_changed_bit_is_found(tmp_path) -> None:
    path = tmp_path / "x.gguf"
    entries, written = two_tensors(path)
    data = bytearray(path.read_bytes())
    data[GGUFReader(path).tensors[1].data_offset] ^= 1
    path.write_bytes(data)
    found = read_back(path, GGUFReader(path), entries, written)
    assert not found.passed
    assert found.worst_tensor == "b.weight"


def test_a_missing_or_added_tensor_is_found(tmp_path) -> None:
    entries, written = two_tensors(tmp_path / "x.gguf")
    other = TensorEntry("model.c", "c.weight", (5,), F32)
    more = {**written, "c.weight": written["b.weight"]}
    assert (
        read_back(tmp_path / "x.gguf", GGUFReader(tmp_path / "x.gguf"), [*entries, other], more).worst_tensor
        == "c.weight"
    )
    assert (
        read_back(tmp_path / "x.gguf", GGUFReader(tmp_path / "x.gguf"), entries[:1], written).worst_tensor == "b.weight"
    )
