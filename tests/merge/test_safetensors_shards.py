"""Safetensors files written by hand are the files the library would have read."""

import json

import pytest
import torch
from conftest import tiny_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from qtune.errors import ModelError
from qtune.merge.safetensors_shards import write_index, write_shard
from qtune.model.checkpoint import INDEX_NAME, BaseCheckpoint, TensorSpec

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.weight": torch.randn(3, 5).to(torch.bfloat16),
    "c.position_ids": torch.arange(7),
    "d.mask": torch.tensor([True, False, True]),
    "e.scale": torch.tensor(0.5, dtype=torch.float16),
    "f.empty": torch.zeros(0, 4),
    "g.Größe": torch.randn(2).to(torch.float8_e4m3fn),
}


def specs() -> list[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]


def test_a_written_file_is_read_back_by_safetensors(tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    write_shard(path, {"format": "pt"}, specs(), TENSORS.values())
    read = load_file(path)
    assert set(read) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name].to(torch.float32), tensor.to(torch.float32))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("name", ["t" * length for length in range(1, 9)])
def test_tensors_begin_where_eight_divides_however_long_the_header_is(name: str, tmp_path) -> None:
    """Readers map the file and take numbers of eight bytes out of it as they lie."""
    path = tmp_path / "model.safetensors"
    write_shard(path, {}, [TensorSpec(name, torch.int64, (1,))], [torch.tensor([3])])
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    assert load_file(path)[name].tolist() == [3]


def test_a_transposed_tensor_is_written_in_its_own_order(tmp_path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3).T
    write_shard(tmp_path / "x.safetensors", {}, [TensorSpec("t", tensor.dtype, (3, 2))], [tensor])
    assert torch.equal(load_file(tmp_path / "x.safetensors")["t"], tensor)


def test_a_rewritten_checkpoint_is_byte_for_byte_the_same(tmp_path) -> None:
    save_file({k: v for k, v in TENSORS.items() if v.numel()}, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint = BaseCheckpoint.open(tmp_path)
    (shard,) = checkpoint.shards
    copy = tmp_path / "copy.safetensors"
    tensors = (checkpoint.tensor(shard, spec.name) for spec in shard.tensors)
    write_shard(copy, shard.metadata, shard.tensors, tensors)
    assert copy.read_bytes()[8:] == (tmp_path / "model.safetensors").read_bytes()[8:]


def test_a_shorter_stream_of_tensors_is_our_fault(tmp_path) -> None:
    with pytest.raises(AssertionError, match=r"c\.position_ids is not whole"):
        write_shard(tmp_path / "x.safetensors", {}, specs(), list(TENSORS.values())[:2])


@pytest.fixture
def sharded(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path, max_shard_size="50KB")
    return tmp_path


def test_shards_are_found_through_the_index(sharded) -> None:
    checkpoint = BaseCheckpoint.open(sharded)
    assert len(checkpoint.shards) > 3
    index = json.loads((sharded / INDEX_NAME).read_text())
    assert set(checkpoint.specs()) == set(index["weight_map"])
    for shard in checkpoint.shards:
        assert {index["weight_map"][spec.name] for spec in shard.tensors} == {shard.file_name}


def test_the_index_keeps_its_map_and_counts_the_new_bytes(sharded, tmp_path) -> None:
    before = json.loads((sharded / INDEX_NAME).read_text())
    write_index(tmp_path, before, 4711)
    after = json.loads((tmp_path / INDEX_NAME).read_text())
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"] == {**before["metadata"], "total_size": 4711}


def test_a_missing_shard_is_named(sharded) -> None:
    victim = next(sharded.glob("model-00002-*"))
    victim.unlink()
    with pytest.raises(ModelError, match=f"{victim.name}.*missing"):
        BaseCheckpoint.open(sharded)


def test_a_cut_shard_is_named(sharded) -> None:
    victim = next(sharded.glob("model-00002-*"))
    victim.write_bytes(victim.read_bytes()[:-7])
    with pytest.raises(ModelError, match=f"{victim.name}: cannot be read"):
        BaseCheckpoint.open(sharded)


def test_a_folder_without_weights_says_what_it_lacks(tmp_path) -> None:
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        BaseCheckpoint.open(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_named(tmp_path, text) -> None:
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(ModelError, match="is no shard index"):
        BaseCheckpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd"])
def test_an_index_reads_nothing_outside_its_folder(tmp_path, name) -> None:
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a.weight": name}}))
    with pytest.raises(ModelError, match="outside its folder"):
        BaseCheckpoint.open(tmp_path)
