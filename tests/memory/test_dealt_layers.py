"""Each rank reads and quantises the layers that are its turn, and no rank ever has them all."""

import ctypes
import gc
import json
import os
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from made_models import LAYERS, assert_equal, batch, made, on_cpu, one_pass, trained
from made_ranks import all_well, launch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from qtune import cache_dir
from qtune.distributed.ranks import ALONE, Ranks
from qtune.memory import packed_attention
from qtune.memory.engine import Engine
from qtune.memory.gradient_checkpointing import find_layers
from qtune.memory.memory_tracker import storage_sizes
from qtune.memory.techniques import Techniques
from qtune.memory.weight_streaming import frozen_tensors
from qtune.model import adapter, nf4_cache
from qtune.model.base import load_base
from qtune.recipe.schema import Lora, Model
from qtune.units import MIB

IN_PARTS = Techniques(recomputed_layers=LAYERS, sharded_layers=LAYERS)


def loaded(folder: str, ranks: Ranks, double: bool = True) -> PeftModel:
    techniques = IN_PARTS if ranks.size > 1 else Techniques()
    model = load_base(Model(base=folder, double_quantization=double), "cpu", "float32", techniques, ranks)
    tuned = adapter.attach(model, Lora(rank=4), seed=0)
    generator = torch.Generator().manual_seed(1)
    for weight in trained(tuned):
        weight.data = torch.randn(weight.shape, generator=generator) * 0.1
    return tuned


def layer_bytes(model: PeftModel) -> int:
    return storage_sizes(tensor for layer in find_layers(model) for tensor, _ in frozen_tensors(layer))


def dealt(ranks: Ranks, folders: list[str], double: bool) -> None:
    """A base read by turns computes what one read whole does, to the bit."""
    for folder in folders:
        whole = loaded(folder, ALONE, double)
        Engine(whole)
        expected = one_pass(whole, batch())
        ours = loaded(folder, ranks, double)
        assert layer_bytes(ours) < 0.75 * layer_bytes(whole), folder
        Engine(ours, ranks).switch_to(IN_PARTS)
        with on_cpu(ours).passes_together():
            assert_equal(one_pass(ours, batch()), expected)


def bases(tmp_path: Path, *kinds: str) -> list[str]:
    packed_attention.register()
    for kind in kinds:
        torch.manual_seed(0)
        made(kind).save_pretrained(tmp_path / kind)
    return [str(tmp_path / kind) for kind in kinds]


@pytest.mark.long  # a whole run of ranks with parts is in tests/test_runs_of_ranks.py
def test_layers_are_read_by_turns(tmp_path) -> None:
    all_well(launch(2, dealt, bases(tmp_path, "llama", "qwen3 moe"), True))


@pytest.mark.long  # as above
def test_also_from_the_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(nf4_cache, "LEAST_BYTES", 0)
    monkeypatch.setenv(cache_dir.VARIABLE, str(tmp_path / "cache"))
    folders = bases(tmp_path, "llama")
    load_base(Model(base=folders[0]), "cpu", "float32")
    assert cache_dir.folder(nf4_cache.KIND).is_dir()
    all_well(launch(2, dealt_from_cache, folders, str(tmp_path / "cache")))


def dealt_from_cache(ranks: Ranks, folders: list[str], cache: str) -> None:
    nf4_cache.LEAST_BYTES, os.environ[cache_dir.VARIABLE] = 0, cache
    read: list[str] = []
    original = nf4_cache.put

    def put(model: torch.nn.Module, name: str, weight: torch.Tensor) -> None:
        read.extend([name] * ("layers." in name and weight.untyped_storage().nbytes() > 64))
        original(model, name, weight)

    nf4_cache.put = put
    ours = loaded(folders[0], ranks)
    nf4_cache.put = original
    wide = {int(re.search(r"layers\.(\d+)", name)[1]) for name in read if "proj" in name}
    assert wide == {layer for layer in range(LAYERS) if layer % ranks.size == ranks.rank}
    Engine(ours, ranks).switch_to(IN_PARTS)
    whole = loaded(folders[0], ALONE)
    Engine(whole)
    with on_cpu(ours).passes_together():
        assert_equal(one_pass(ours, batch()), one_pass(whole, batch()))


@pytest.mark.long
@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("double", [True, False])
def test_more_ranks(tmp_path, size, double) -> None:
    all_well(launch(size, dealt, bases(tmp_path, "llama", "qwen3 moe", "gated delta net"), double))


def own_memory(field: str = "RssAnon") -> int:
    """Bytes of this process that are no file's, and that its allocator has not merely kept."""
    ctypes.CDLL(None).malloc_trim(0)
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measured(ranks: Ranks, folder: str, told: str, is_alone: bool) -> None:
    """Bytes that a model of 156 MB in 4 bits takes: the most while it is loaded, and when it is there."""
    tiny = loaded(folder.replace("base", "llama"), ALONE)  # whatever is imported for it
    tiny = Engine(tiny)
    del tiny
    gc.collect()
    start, most, is_there = own_memory(), [0], threading.Event()

    def watch() -> None:
        while not is_there.wait(0.02):
            most[0] = max(most[0], own_memory() - start)

    threading.Thread(target=watch, daemon=True).start()
    ours = ALONE if is_alone else ranks
    layers = 8
    in_parts = Techniques(recomputed_layers=layers, sharded_layers=layers, streamed_layers=layers)
    model = load_base(Model(base=folder), "cpu", "bfloat16", Techniques() if is_alone else in_parts, ours)
    tuned = adapter.attach(model, Lora(rank=1, targets=("q_proj",)), seed=0)
    engine = Engine(tuned, ours)
    if not is_alone:
        engine.switch_to(in_parts)
    is_there.set()
    time.sleep(0.1)
    gc.collect()
    held = storage_sizes([*engine.runner.stream.homes("host")]) if engine.runner.stream else layer_bytes(tuned)
    result = {"most": most[0], "held": own_memory() - start, "layers": held}
    Path(told).joinpath(f"{ranks.rank}-{is_alone}.json").write_text(json.dumps(result))
    ranks.gather(0)


@pytest.mark.long
def test_memory_of_real_processes(tmp_path) -> None:
    """Of 4 ranks each holds 0.25 of the layers, and has at no time much more."""
    sizes = {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 8, "num_attention_heads": 12}
    torch.manual_seed(0)
    config = LlamaConfig(**{**tiny_config().to_dict(), **sizes, "num_key_value_heads": 12, "head_dim": 128})
    bases(tmp_path, "llama")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    alone = launch(1, measured, str(tmp_path / "base"), str(tmp_path), True)
    all_well(alone)
    all_well(launch(4, measured, str(tmp_path / "base"), str(tmp_path), False))
    whole = json.loads((tmp_path / "0-True.json").read_text())
    parts = [json.loads((tmp_path / f"{rank}-False.json").read_text()) for rank in range(4)]
    for each in parts:
        assert each["layers"] <= 0.27 * whole["layers"]
        assert each["held"] <= 0.27 * whole["held"] + 24 * MIB  # and what libraries keep: 0 to 18 seen
        assert each["most"] <= whole["most"] - 0.6 * whole["layers"]  # beside the matrices on their way to 4 bits
