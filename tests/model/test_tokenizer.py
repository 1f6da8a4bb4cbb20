"""The tokenizer is the one that AutoTokenizer takes, and comes without the model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_tokenizer
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoTokenizer

from qtune.errors import MachineError, ModelError
from qtune.model import base, base_files
from qtune.model.tokenizer import load_tokenizer
from qtune.recipe.schema import Model

TYPES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "olmo2")  # each with a class of its own for tokenizers


@pytest.mark.parametrize("model_type", TYPES)
def test_a_plain_configuration_has_the_same_tokenizer_read_as_the_model_s_own(tmp_path, model_type) -> None:
    """transformers chooses the class that reads a tokenizer by tokenizer_config.json and the model's type, and some
    classes change what is read."""
    assert_read_as_the_model_s_own(tmp_path, base_files.DEMO_BASE, model_type)


@pytest.mark.parametrize("model_type", [TYPES[0], *(pytest.param(name, marks=pytest.mark.long) for name in TYPES[1:])])
def test_a_published_tokenizer_is_read_as_the_model_s_own(tmp_path, material, model_type) -> None:
    for source in sorted((material / "tokenizers").iterdir()):
        if (source / "tokenizer_config.json").is_file():
            assert_read_as_the_model_s_own(tmp_path / source.name, source, model_type)


def assert_read_as_the_model_s_own(folder: Path, tokenizer: Path, model_type: str) -> None:
    folder.mkdir(exist_ok=True)
    for path in tokenizer.glob("*token*"):
        shutil.copy(path, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    wanted, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(Model(base=str(folder)))
    assert type(ours) is type(wanted)
    assert ours.backend_tokenizer.to_str() == wanted.backend_tokenizer.to_str()


def test_a_folder_with_a_tokenizer_and_no_config_will_do(tmp_path) -> None:
    for path in base_files.DEMO_BASE.glob("*token*"):
        shutil.copy(path, tmp_path)
    assert load_tokenizer(Model(base=str(tmp_path))).eos_token_id is not None


@pytest.mark.parametrize("text", ["{ not json", "[]", '{"tokenizer_class": 7}'])
def test_a_broken_tokenizer_config_is_one_sentence(tiny_base, tmp_path, text) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    (folder / "tokenizer_config.json").write_text(text)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(Model(base=str(folder)))


def test_of_a_hub_model_no_weights_are_fetched(monkeypatch, tmp_path) -> None:
    """`data check` of a base on the hub downloaded its weights, 15 GB for a tokenizer of 10 MB."""
    asked: list[list[str]] = []

    def snapshot(name: str, allow_patterns: list[str], **others: Any) -> str:
        asked.append(allow_patterns)
        if "*.safetensors" not in allow_patterns and len(asked) > 1:
            return str(tmp_path)
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(base_files, "snapshot_download", snapshot)
    for read in (load_tokenizer, base.base_folder):
        with pytest.raises(MachineError, match="cannot be reached"):
            read(Model(base="some/model"))
    assert ["*.safetensors" in patterns for patterns in asked] == [False, False, True]
    assert all("*.json" in patterns for patterns in asked)


@pytest.mark.parametrize(("is_text_alone", "left"), [(True, ["tower.safetensors"]), (False, None)])
def test_files_that_hold_nothing_of_the_text_are_not_fetched(monkeypatch, tmp_path, is_text_alone, left) -> None:
    text = {"model_type": "qwen3", "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["SomeVLM"], "text_config": text}))
    shards = {"model.visual.w": "tower.safetensors", "mtp.w": "tower.safetensors", "lm_head.weight": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    asked: list[Any] = []

    def snapshot(name: str, allow_patterns: list[str], ignore_patterns: Any, **others: Any) -> str:
        asked.append(ignore_patterns)
        return str(tmp_path)

    monkeypatch.setattr(base_files, "snapshot_download", snapshot)
    base_files.whole(Model(base="some/model"), is_text_alone)
    assert asked[-1] == left


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_the_template_of_a_processor_is_taken(name: str, tmp_path: Path) -> None:
    """Models that also see keep it there, as transformers 4 wrote it."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / name).write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert load_tokenizer(Model(base=str(tmp_path))).chat_template == "{{ messages }}"


def test_a_missing_chat_template_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.chat_template: .*none\.jinja cannot be read"):
        load_tokenizer(Model(base="demo", chat_template=str(tmp_path / "none.jinja")))
