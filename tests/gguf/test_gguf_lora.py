"""A and B as llama.cpp multiplies them, beside the base's own file."""

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFWriter, Keys
from made_bases import byte_level, make_base
from made_runs import make_run, token_rows
from tokenizers import normalizers

from qtune import cli
from qtune.errors import ModelError
from qtune.gguf import contents, llama_cpp
from qtune.gguf.contents import refuse_what_is_no_lora
from qtune.gguf.export import ExportReport, export
from qtune.gguf.layout import Layout
from qtune.merge.lora_delta import AdapterWeights, LoraDelta
from qtune.merge.output_folder import SPARE_DISK_BYTES
from qtune.model.lora_variants.dora import DORA, MAGNITUDE
from qtune.rundir import RunDir, read_json, write_json

Usage = namedtuple("Usage", "total used free")
ROWS = token_rows(300, rows=2, tokens=30)
LORAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    "rslora with patterns": {
        "use_rslora": True,
        "rank_pattern": {"k_proj": 2, "up_proj": 9},
        "alpha_pattern": {"q_proj": 5, "layers.1.mlp.down_proj": 3},
    },
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A LoRA that matters, on a base whose queries and keys are arranged anew."""
    folder = tmp_path_factory.mktemp("adapter")
    run = make_run(folder / "run", make_base(folder / "base", "llama"), compute_dtype="float32", strength=0.3)
    write_json(run.probe, ROWS)
    return run


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
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


def asked_of_llama_cpp(run: RunDir, output: Path) -> ExportReport:
    pytest.importorskip("llama_cpp")
    return export(run, output, "adapter-gguf", rows=ROWS)


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_llama_cpp_computes_what_was_trained(tmp_path, kind, lora) -> None:
    base = make_base(tmp_path / "base", kind)
    run = make_run(tmp_path / "run", base, lora, compute_dtype="float32", strength=0.3)
    report = asked_of_llama_cpp(run, tmp_path / "out")
    assert report.faults == report.notes == ()
    assert report.verdict is not None
    assert report.verdict.base_kl is not None
    assert report.verdict.mean_kl < 1e-4 < 0.1 < report.verdict.base_kl


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_base_beside_it_is_the_one_the_run_held(tmp_path, quantization) -> None:
    """A base in bfloat16 that was float32 on the disk is another model by its rounding."""
    base = make_base(tmp_path / "base", "llama")
    run = make_run(tmp_path / "run", base, strength=0.3, quantization=quantization)
    verdict = asked_of_llama_cpp(run, tmp_path / "out").verdict
    assert verdict is not None
    assert verdict.mean_kl < 1e-4


def test_the_base_is_gone_when_it_was_asked(run, tmp_path) -> None:
    heard = []
    pytest.importorskip("llama_cpp")
    export(run, tmp_path / "out", "adapter-gguf", rows=ROWS, progress=lambda *event: heard.append(event))
    assert [name for _, _, name in heard if name == "token_embd.weight"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == ["adapter.gguf", "export_report.json"]


def double_alpha(writer: GGUFWriter, adapter: AdapterWeights) -> None:
    first = next(iter(adapter.changes.values()))
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, 2 * first.scale * first.a.shape[0])


SPOILED = {
    "another scale": (contents, "describe_lora", double_alpha),
    "rows in the order of transformers": (Layout, "arranged", lambda layout, name, tensor: tensor),
}


@pytest.mark.parametrize("spoiled", SPOILED.values(), ids=SPOILED)
def test_a_file_that_says_another_adapter_is_a_fault(run, tmp_path, monkeypatch, capsys, spoiled) -> None:
    """Written and read back as it was meant to be, and meant wrongly: nothing but running it can tell."""
    pytest.importorskip("llama_cpp")
    monkeypatch.setattr(*spoiled)
    assert cli.main(["export", str(run.path), "--to", "adapter-gguf", "--output", str(tmp_path / "out")]) == 1
    assert "same next token" in capsys.readouterr().err
    report = read_json(tmp_path / "out" / "export_report.json")
    assert report["read_back"]["worst_fraction"] <= 1
    assert not report["passed"]


def test_an_adapter_that_changes_little_is_still_held_to_its_scale(run, tmp_path, monkeypatch) -> None:
    """The same next tokens at twice the scale: the bound of agreement would pass it, and one that is not there."""
    base = Path(read_json(run.lock)["base"]["folder"])
    faint = make_run(tmp_path / "run", base, compute_dtype="float32", strength=0.01)
    right = asked_of_llama_cpp(faint, tmp_path / "right")
    monkeypatch.setattr(contents, "describe_lora", double_alpha)
    in_weights, in_answers = asked_of_llama_cpp(faint, tmp_path / "out").faults
    assert right.faults == ()
    assert "not those that were trained" in in_weights
    assert in_answers.startswith("mean KL")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has llama.cpp, for what is found before it is asked."""
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: True)


def exported_unasked(run: RunDir, output: Path, **settings: Any) -> str:
    """An export without a verdict, that leaves nothing beside itself; the note that says why."""
    report = export(run, output, "adapter-gguf", rows=ROWS, **settings)
    assert report.verdict is None
    assert report.faults == ()
    assert [path.name for path in output.parent.glob("*out*")] == ["out"]
    assert sorted(path.name for path in output.iterdir()) == ["adapter.gguf", "export_report.json"]
    (note,) = report.notes
    return note


def test_a_disk_without_room_for_the_base_still_gets_the_adapter(run, tmp_path, installed, monkeypatch) -> None:
    free = SPARE_DISK_BYTES + 100_000  # the adapter has 92 kB, its base 313 kB
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free, 0, free))
    note = exported_unasked(run, tmp_path / "out")
    assert note.startswith("Not verified with llama.cpp: ")
    assert "the base that the LoRA is verified on needs 64 MiB" in note


def test_a_disk_that_fills_up_with_the_base_still_gets_the_adapter(run, tmp_path, installed) -> None:
    def fill_up(done: int, total: int, name: str) -> None:
        if name == "blk.2.attn_q.weight":
            raise OSError(28, "No space left on device")

    note = exported_unasked(run, tmp_path / "out", progress=fill_up)
    assert note == "Not verified with llama.cpp: its base could not be written (No space left on device)."


def test_an_export_that_is_stopped_at_the_base_leaves_nothing(run, tmp_path, installed) -> None:
    def stop(done: int, total: int, name: str) -> None:
        if name == "blk.2.attn_q.weight":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(run, tmp_path / "out", "adapter-gguf", rows=ROWS, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_has_no_file_of_its_own_still_gives_the_adapter(tmp_path, installed) -> None:
    """Its tokenizer cuts as nothing in llama.cpp does, which matters to a whole model alone."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    run = make_run(tmp_path / "run", make_base(tmp_path / "base", "llama", tokenizer), compute_dtype="float32")
    note = exported_unasked(run, tmp_path / "out")
    assert note.startswith("Not verified with llama.cpp: the base's tokenizer rewrites text (Lowercase)")


def test_without_llama_cpp_it_says_so(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    assert (
        exported_unasked(run, tmp_path / "out")
        == "Not verified with llama.cpp: pip install '.[verify]', in the folder that qtune was cloned into"
    )


def test_an_adapter_of_another_base_is_named(run, tmp_path) -> None:
    """What is not loaded is a null pointer, which is not None, and the base alone would answer."""
    pytest.importorskip("llama_cpp")
    other = make_run(tmp_path / "run", make_base(tmp_path / "base", "qwen2"), compute_dtype="float32")
    export(other, tmp_path / "adapter", "adapter-gguf")
    export(run, tmp_path / "whole", "gguf", "f32")
    lora = tmp_path / "adapter" / "adapter.gguf"
    taken = llama_cpp.GgufModel.loaded(tmp_path / "whole" / "model.gguf", 64, lora)
    with pytest.raises(ModelError, match=r"adapter\.gguf: llama\.cpp does not take it"), taken:
        pass


def test_more_than_a_and_b_is_refused() -> None:
    a, b = torch.ones(2, 4), torch.ones(4, 2)
    with pytest.raises(ModelError, match=r"DoRA, which llama\.cpp does not have\. Use --to gguf"):
        refuse_what_is_no_lora(AdapterWeights({"x": LoraDelta(a, b, 1.0, {MAGNITUDE: torch.ones(4)}, (DORA,))}, {}))
    with pytest.raises(ModelError, match=r"the run trained lm_head\.weight whole"):
        refuse_what_is_no_lora(AdapterWeights({"x": LoraDelta(a, b, 1.0)}, {"lm_head.weight": a}))
