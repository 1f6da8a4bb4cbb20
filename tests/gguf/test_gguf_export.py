"""From a run folder to a file that llama.cpp serves, or nothing at all."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from gguf import GGUFReader
from made_bases import KINDS, byte_level, make_base, sentencepiece
from made_runs import edit_json, make_run, token_rows
from safetensors.torch import load_file, save_file

from qtune import cli
from qtune.errors import MachineError, ModelError, UserError
from qtune.gguf import llama_cpp
from qtune.gguf.export import export
from qtune.rundir import RunDir, read_json, write_json

Usage = namedtuple("Usage", "total used free")
ROWS = token_rows(vocabulary=300)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("export")
    run = make_run(folder / "run", make_base(folder / "base", "llama tied"), compute_dtype="float32")
    write_json(run.probe, ROWS)
    return run


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without llama.cpp."""
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)


def values(path: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_what_was_trained(tmp_path, kind) -> None:
    """Permutation, RoPE and its stretching, biases, tied heads: one mistake and KL is of the order of 1."""
    pytest.importorskip("llama_cpp")
    run = make_run(tmp_path / "run", make_base(tmp_path / "base", kind), compute_dtype="float32")
    report = export(run, tmp_path / "out", "gguf", "f32", rows=token_rows(vocabulary=300, tokens=300, rows=2))
    assert report.faults == ()
    assert report.verdict is not None
    assert report.verdict.mean_kl < 1e-5
    assert report.verdict.agreement_fraction > 0.99


@pytest.mark.parametrize("quant", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_every_type_is_read_back_within_what_it_may_cost(run, tmp_path, alone, quant) -> None:
    report = export(run, tmp_path / "out", "gguf", quant)
    assert report.read_back.passed
    assert 0.5 < report.read_back.worst_fraction <= 1  # a bound that is far off proves nothing
    assert report.stored[quant.upper()] > 20
    assert report.stored.get("Q8_0") == (1 if quant.startswith(("q4", "q5")) else 29 if quant == "q8_0" else None)
    assert report.bytes == (tmp_path / "out" / "model.gguf").stat().st_size


def test_without_llama_cpp_it_says_so_and_proves_the_rest(run, tmp_path, alone) -> None:
    report = export(run, tmp_path / "out", "gguf", "f16", rows=ROWS)
    assert report.verdict is None
    assert report.notes == (
        "Not verified with llama.cpp: pip install '.[verify]', in the folder that qtune was cloned into",
    )
    assert report.read_back.tensors == sum(report.stored.values()) == 38
    assert report.texts > 50
    kept = read_json(tmp_path / "out" / "export_report.json")
    assert kept == json.loads(json.dumps(report.as_json()))
    assert kept["passed"]


def test_the_file_says_what_it_is(run, tmp_path, alone) -> None:
    export(run, tmp_path / "out", "gguf", "q8_0")
    said = values(tmp_path / "out" / "model.gguf")
    assert {key: said[key] for key in said if key.startswith(("general.", "llama.")) and "base_model" not in key} == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "run",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "llama.block_count": 4,
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "llama.vocab_size": 317,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
    }
    assert said["general.base_model.0.name"] == "base"
    assert str(tmp_path) not in json.dumps(said, default=str)


def test_ollama_gets_a_modelfile(run, tmp_path, alone) -> None:
    export(run, tmp_path / "out", "ollama", "q8_0")
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """')
    assert text.endswith('PARAMETER stop "<|end|>"\n')


def test_a_sentencepiece_base_is_exported_too(tmp_path) -> None:
    run = make_run(tmp_path / "run", make_base(tmp_path / "base", "llama", sentencepiece()), compute_dtype="float32")
    report = export(run, tmp_path / "out", "gguf", "f32", rows=ROWS)
    assert report.faults == ()
    assert values(tmp_path / "out" / "model.gguf")["tokenizer.ggml.model"] == "llama"


@pytest.mark.parametrize(("asked", "merged", "used"), [(None, None, "dequantised"), (None, "original", "original")])
def test_the_base_is_the_last_merges_or_the_one_trained_on(run, tmp_path, alone, asked, merged, used) -> None:
    mine = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    if merged:
        write_json(mine.merge, {"onto": merged})
    assert export(mine, tmp_path / "out", "gguf", "f32", asked).onto == used


def test_onto_the_original_is_another_file(run, tmp_path, alone) -> None:
    files = [tmp_path / onto / "model.gguf" for onto in ("dequantised", "original")]
    for path in files:
        export(run, path.parent, "gguf", "f32", path.parent.name)
    assert files[0].read_bytes() != files[1].read_bytes()


def test_progress_counts_tensors(run, tmp_path, alone) -> None:
    heard = []
    export(run, tmp_path / "out", "gguf", "f16", progress=lambda *event: heard.append(event))
    assert [done for done, _, _ in heard] == list(range(1, 39))
    assert {total for _, total, _ in heard} == {38}


def said(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that is refused says, in one line."""
    assert cli.main(["export", *command]) == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    return message


def test_what_is_refused_is_refused_in_a_sentence(run, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    folder = str(run.path)
    assert "exists already" in said([folder, "--output", "full"], capsys)
    assert "leave out --quant" in said([folder, "--to", "adapter-gguf", "--quant", "f16"], capsys)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**30, 2**30, 5 * 2**20))
    assert "export needs 64 MiB" in said([folder, "--output", "out"], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_an_adapter_that_is_gone_or_was_edited_is_refused(run, tmp_path, alone) -> None:
    mine = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    path = mine.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(dict(list(tensors.items())[1:]), path)
    with pytest.raises(ModelError, match="every adapted module needs"):
        export(mine, tmp_path / "out", "gguf")
    shutil.rmtree(mine.adapter)
    with pytest.raises(ModelError, match="holds no adapter"):
        export(mine, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused(run, tmp_path, alone) -> None:
    mine = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    lock = read_json(mine.lock)
    edit_json(mine.lock, base={**lock["base"], "sha256": "0" * 64})
    with pytest.raises(ModelError, match="is not the base of"):
        export(mine, tmp_path / "out", "gguf")


def test_a_base_that_was_not_quantised_has_no_dequantised_form(tmp_path, alone) -> None:
    run = make_run(
        tmp_path / "run", make_base(tmp_path / "base", "qwen2"), compute_dtype="float32", quantization="none"
    )
    with pytest.raises(UserError, match="--onto original"):
        export(run, tmp_path / "out", "gguf", onto="dequantised")
    assert export(run, tmp_path / "out", "gguf").onto == "original"


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_export_that_breaks_off_leaves_nothing(run, tmp_path, alone, fault) -> None:
    def stop_midway(done: int, total: int, name: str) -> None:
        if done == total // 4:
            raise fault

    expected = MachineError if isinstance(fault, OSError) else type(fault)
    with pytest.raises(expected):
        export(run, tmp_path / "out", "gguf", progress=stop_midway)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["stories260K-llama", "TinyStories-656K-llama"])
@pytest.mark.parametrize("quant", ["f16", "q8_0"])
def test_real_checkpoints_are_served_as_they_were_trained(material, tmp_path, name, quant) -> None:
    """One stores its tied embedding under the name of the head only, and has rows that no block divides the other."""
    pytest.importorskip("llama_cpp")
    run = make_run(tmp_path / "run", material / "models" / name, strength=0.02, stop_token_ids=(2,))
    texts = ["Once upon a time there was a little girl named Lily. She loved to play.", "The dog ran home to his mom."]
    tokenizer = byte_level().from_pretrained(material / "models" / name)
    report = export(run, tmp_path / "out", "gguf", quant, rows=[tokenizer(text)["input_ids"] for text in texts])
    assert report.faults == ()
    assert report.verdict is not None
    assert all(answer.same for answer in report.verdict.greedy)
