"""Rows, tokenizer and generation_config.json must end an answer alike."""

import json
from pathlib import Path

import pytest
from conftest import BOS, END, PAD, byte_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qtune.data.chat_template import ChatTemplate
from qtune.data.stop_tokens import stop_chain

TURN_ENDS_WITH_PAD = "{% for m in messages %}{{ '<|user|>' + m['content'] + '<|pad|>' }}{% endfor %}"


def tokenizer(folder: Path, eos_token_id: object = None, template: str | None = None) -> PreTrainedTokenizerBase:
    made = byte_tokenizer()
    made.chat_template = template or made.chat_template
    made.save_pretrained(folder)
    if eos_token_id is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_token_id}))
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("eos_token_id", [END, [BOS, END]])
def test_where_all_agree_there_is_no_doubt(tmp_path: Path, eos_token_id: object) -> None:
    made = tokenizer(tmp_path, eos_token_id)
    chain = stop_chain(ChatTemplate.of(made), made)
    assert (chain.learned, chain.tokenizer_eos, chain.served_by) == ("<|end|>", "<|end|>", "generation_config.json")
    assert "<|end|>" in chain.served
    assert chain.doubts == ()


def test_generation_that_stops_elsewhere_is_doubted_with_the_id_to_add(tmp_path: Path) -> None:
    made = tokenizer(tmp_path, BOS)
    (doubt,) = stop_chain(ChatTemplate.of(made), made).doubts
    assert "generation_config.json stops at '<s>'" in doubt
    assert f"Add {END} to eos_token_id" in doubt


def test_without_a_file_the_turn_must_end_with_the_end_of_sequence(tmp_path: Path) -> None:
    made = tokenizer(tmp_path, template=TURN_ENDS_WITH_PAD)
    (doubt,) = stop_chain(ChatTemplate.of(made), made).doubts
    assert f"eos_token_id = {PAD}" in doubt
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": PAD}))
    chain = stop_chain(ChatTemplate.of(made), made)
    assert (chain.served, chain.served_by, chain.doubts) == (("<|pad|>",), "config.json", ())


def test_documents_end_with_the_end_of_sequence(tmp_path: Path) -> None:
    assert stop_chain(None, tokenizer(tmp_path)).learned == "<|end|>"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"eos_token_id": null}', '{"eos_token_id": []}', "{broken"])
def test_a_file_that_says_nothing_is_passed_over(tmp_path: Path, text: str) -> None:
    made = tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    assert stop_chain(ChatTemplate.of(made), made).served_by == ""
