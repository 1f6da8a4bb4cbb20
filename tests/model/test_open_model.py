"""Models opened to answer: with and without the adapter, unpacked for a chat, merged, and too large."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from made_runs import edit_json, make_run, token_rows

from qtune.errors import MachineError, ModelError
from qtune.hardware import find_device
from qtune.merge.merge import merge
from qtune.model import base, open_model
from qtune.model.loaded import Loaded
from qtune.model.open_model import model_of, open_merged, open_run
from qtune.model.tokenizer import load_tokenizer
from qtune.recipe import chat_templates
from qtune.rundir import RunDir, write_json


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = make_run(tmp_path_factory.mktemp("opened") / "run", tiny_base, compute_dtype="float32", strength=0.3)
    write_json(run.plan, {"techniques": {"host_embedding": False, "streamed_layers": 0}})
    return run


def logits(loaded: Loaded) -> torch.Tensor:
    with torch.no_grad(), loaded.autocast():
        found: torch.Tensor = loaded.model(input_ids=torch.tensor(token_rows(rows=1))).logits
    return found


def test_a_run_answers_with_its_adapter_and_as_its_base_without(run: RunDir) -> None:
    opened = open_run(run)
    plain = base.load_base(model_of(run), find_device().name, "float32").eval()
    with opened.as_base():
        alone = logits(opened)
    torch.testing.assert_close(alone, logits(Loaded(plain, opened.tokenizer, "cpu", "float32")))
    assert (logits(opened) - alone).abs().max() > 0.1
    assert not opened.model.training
    assert opened.without_peft is opened.model.get_base_model()


def test_for_talk_its_weights_are_unpacked_and_the_answers_are_the_same(run: RunDir, monkeypatch) -> None:
    opened, talking = open_run(run), open_run(run, is_for_talk=True)
    assert any(isinstance(module, Linear4bit) for module in opened.model.modules())
    assert not any(isinstance(module, Linear4bit) for module in talking.model.modules())
    torch.testing.assert_close(logits(talking), logits(opened), rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(open_model, "host_memory", lambda: (2**30, 1024))
    packed = open_run(run, is_for_talk=True)
    assert any(isinstance(module, Linear4bit) for module in packed.model.modules())


def test_a_merged_folder_answers_as_the_run_and_has_no_base_beside_it(run: RunDir, tmp_path: Path) -> None:
    merge(run, tmp_path / "out", "dequantised", "float32")
    merged = open_merged(tmp_path / "out", run.read_lock())
    torch.testing.assert_close(logits(merged), logits(open_run(run)), rtol=1e-3, atol=1e-3)
    with merged.as_base():
        assert torch.equal(logits(merged), logits(merged))
    assert merged.without_peft is merged.model
    assert merged.compute_dtype == "float32"


def test_a_folder_that_is_too_large_or_no_model_is_said(run: RunDir, tmp_path: Path, tiny_base, monkeypatch) -> None:
    with pytest.raises(ModelError):
        open_merged(tmp_path)

    def run_out(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(base.AutoModelForCausalLM, "from_pretrained", run_out)
    with pytest.raises(MachineError, match=r"does not fit into what is free of the memory of cpu\. Close"):
        open_merged(tiny_base)


def test_the_chat_template_is_the_one_that_the_run_was_trained_with(tiny_base: Path, tmp_path: Path) -> None:
    """A recipe's file that was edited after the run, or is gone, was what the merged model had."""
    run, own = make_run(tmp_path / "run", tiny_base), tmp_path / "own.jinja"
    edit_json(run.lock, model={**run.read_lock().model, "chat_template": str(own)})
    (run.adapter / chat_templates.FILE).write_text("{{ messages }}")
    own.write_text("something else")
    assert load_tokenizer(model_of(run)).chat_template == "{{ messages }}"
    merge(run, tmp_path / "merged", "dequantised")
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "{{ messages }}"
