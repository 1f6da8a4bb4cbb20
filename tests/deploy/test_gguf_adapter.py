"""A and B as llama.cpp multiplies them, beside the base's own file."""

import pytest
import torch
from gguf import GGUFReader
from made_bases import make_base
from made_runs import make_run, token_rows

from qtune.deploy import gguf_verdict
from qtune.deploy.delta import AdapterWeights, Change
from qtune.deploy.export import export
from qtune.deploy.gguf_adapter import refuse_what_is_no_lora
from qtune.deploy.verify import Live
from qtune.errors import ModelError

LORAS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
}


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS.keys())
def test_what_llama_cpp_adds_is_what_peft_adds(tmp_path, lora) -> None:
    run = make_run(tmp_path / "run", make_base(tmp_path / "base", "llama"), lora, compute_dtype="float32")
    report = export(run, tmp_path / "out", "adapter-gguf")
    assert report.faults == ()
    reader = GGUFReader(tmp_path / "out" / "adapter.gguf")
    alpha = reader.get_field("adapter.lora.alpha").contents()
    assert reader.get_field("general.type").contents() == "adapter"
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    changes = AdapterWeights.read(run.adapter).changes
    assert len(tensors) == 2 * len(changes)
    for module, place in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):
        change = changes[f"model.layers.1.{module}"]
        a, b = (tensors[f"blk.1.{place}.weight.lora_{part}"] for part in "ab")
        torch.testing.assert_close(alpha / a.shape[0] * b @ a, change.scale * change.b @ change.a)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_beside_its_base_it_is_the_trained_model(tmp_path, kind) -> None:
    """The base's file is the export of a run that changed nothing."""
    pytest.importorskip("llama_cpp")
    base = make_base(tmp_path / "base", kind)
    lora = {"use_rslora": True}
    run = make_run(tmp_path / "run", base, lora, compute_dtype="float32", strength=0.3)
    untouched = make_run(tmp_path / "untouched", base, lora, compute_dtype="float32", strength=0.0)
    export(run, tmp_path / "adapter", "adapter-gguf")
    export(untouched, tmp_path / "whole", "gguf", "f32")

    def divergence(lora_file: str | None) -> float:
        lora_path = tmp_path / "adapter" / lora_file if lora_file else None
        file, rows = tmp_path / "whole" / "model.gguf", token_rows(300, rows=2, tokens=30)
        return gguf_verdict.judge(Live.open(run), file, rows, (), "f32", "dequantised", lora_path).mean_kl

    assert divergence("adapter.gguf") < 1e-4 < 0.1 < divergence(None)


def test_more_than_a_and_b_is_refused() -> None:
    a, b = torch.ones(2, 4), torch.ones(4, 2)
    with pytest.raises(ModelError, match=r"DoRA, which llama\.cpp does not have\. Use --to gguf"):
        refuse_what_is_no_lora(AdapterWeights({"x": Change(a, b, 1.0, torch.ones(4))}, {}))
    with pytest.raises(ModelError, match=r"the run trained lm_head\.weight whole"):
        refuse_what_is_no_lora(AdapterWeights({"x": Change(a, b, 1.0)}, {"lm_head.weight": a}))
