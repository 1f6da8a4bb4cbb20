"""The same text, the same ids: tokenizers of a few families, rebuilt from what a GGUF file says of them."""

import dataclasses
import json
from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFWriter, TokenType
from made_bases import byte_level, sentencepiece
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoTokenizer

from qtune.errors import ModelError
from qtune.gguf.tokenizer import Vocabulary
from qtune.gguf.tokenizer_check import TEXTS, Reference, differing, matching
from qtune.model.base_files import DEMO_BASE

CASES = {"Llama-3": "llama-bpe", "Qwen2.5-0.5B-Instruct": "qwen2"}


def encoding(vocabulary: Vocabulary):
    made = vocabulary.tokenizer()
    return lambda text: made.encode(text, add_special_tokens=False).ids


def test_the_demo_base() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_BASE)
    vocabulary, references = matching(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    assert (vocabulary.model, vocabulary.pre, vocabulary.adds_bos) == ("gpt2", "smollm", True)
    assert vocabulary.ids == {"bos": 0, "eos": 1, "pad": 2}
    assert len(references) == len(TEXTS) + 4
    assert vocabulary.chat_template == tokenizer.chat_template


def test_types_and_padding() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens(["<word>"])
    rows = len(tokenizer) + 2
    vocabulary, _ = matching(tokenizer, rows, [tokenizer.eos_token_id])
    assert len(vocabulary.tokens) == len(vocabulary.types) == rows
    assert vocabulary.tokens[-2:] == (f"[PAD{rows - 2}]", f"[PAD{rows - 1}]")
    assert vocabulary.types[-9:-3] == (TokenType.CONTROL,) * 6
    assert vocabulary.types[-3:] == (TokenType.USER_DEFINED, TokenType.UNUSED, TokenType.UNUSED)
    assert set(vocabulary.types[:-9]) == {TokenType.NORMAL}
    with pytest.raises(ModelError, match=r"and its embedding \d+ rows"):
        matching(tokenizer, rows - 3, [tokenizer.eos_token_id])


def test_another_end_of_turn_is_the_files_too() -> None:
    end, turn = byte_level().convert_tokens_to_ids(["<|end|>", "<|assistant|>"])
    vocabulary, _ = matching(byte_level(), 400, [turn, end])
    assert (vocabulary.ids["eos"], vocabulary.ids["eot"]) == (end, turn)
    assert "eot" not in matching(byte_level(), 400, [end])[0].ids


def test_sentencepiece_has_scores_bytes_and_a_space_in_front() -> None:
    tokenizer = sentencepiece()
    vocabulary, references = matching(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    assert (vocabulary.model, vocabulary.pre, vocabulary.begins_with_space) == ("llama", "default", True)
    assert vocabulary.types.count(TokenType.BYTE) == 256
    assert vocabulary.types[vocabulary.ids["unk"]] == TokenType.UNKNOWN
    assert len(references) == len(TEXTS) + 4
    first = vocabulary.scores.index(0.0)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert vocabulary.tokens[first] == "".join(merges[0])


def test_a_space_in_front_of_the_text_alone_is_left_out() -> None:
    """Mistral's puts no space behind a special token; llama.cpp puts one at both places, or at neither."""
    tokenizer = sentencepiece()
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    assert matching(tokenizer, 500, [tokenizer.eos_token_id])[0].begins_with_space is False


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_fields_survive_the_file(tmp_path, make) -> None:
    tokenizer = make()
    ends = tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|end|>"])
    vocabulary, references = matching(tokenizer, 450, ends)
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    vocabulary.write_to(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    read = Vocabulary.read(GGUFReader(tmp_path / "x.gguf"))
    assert read == vocabulary
    assert differing(references, encoding(read)) == []


def test_another_way_to_cut_is_noticed() -> None:
    """A file that names the wrong way loads in llama.cpp, and tokenises otherwise without a word."""
    tokenizer = byte_level()
    known, _ = matching(tokenizer, 320, [tokenizer.eos_token_id])
    with_merge = dataclasses.replace(
        known, tokens=(*known.tokens, "_c"), types=(*known.types, 1), merges=(*known.merges, "_ c")
    )
    right = encoding(with_merge)
    references = [Reference(text, tuple(right(text))) for text in TEXTS]
    wrong = dataclasses.replace(with_merge, pre="qwen2")
    assert differing(references, encoding(wrong)) == ["camelCase snake_case SCREAMING_CASE"]


def test_a_tokenizer_that_cuts_in_an_unknown_way_is_refused() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(ModelError, match=r"cuts text in a way that has no name there.*qtune merge"):
        matching(tokenizer, 400, [tokenizer.eos_token_id])
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ModelError, match="rewrites text"):
        matching(tokenizer, 400, [tokenizer.eos_token_id])


def llama_cpps_cases(folder: Path, pre: str) -> list[Reference]:
    """llama.cpp's own: texts and ids, without a BOS."""
    texts = (folder / f"ggml-vocab-{pre}.gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = (folder / f"ggml-vocab-{pre}.gguf.out").read_text(encoding="utf-8").split("\n")
    return [Reference(text, tuple(map(int, line.split()))) for text, line in zip(texts, lines, strict=False) if text]


@pytest.mark.parametrize("name", CASES)
def test_llama_cpps_own_cases(material, name) -> None:
    tokenizer = AutoTokenizer.from_pretrained(material / "tokenizers" / name)
    vocabulary, _ = matching(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    assert vocabulary.pre == CASES[name]
    references = llama_cpps_cases(material / "tokenizer_cases", CASES[name])
    assert len(references) > 40
    assert differing(references, encoding(vocabulary)) == []


def test_mistrals_tokenizer(material) -> None:
    tokenizer = AutoTokenizer.from_pretrained(material / "tokenizers" / "Mistral-7B-Instruct-v0.3")
    vocabulary, references = matching(tokenizer, 32768, [2])
    assert (vocabulary.model, vocabulary.begins_with_space) == ("llama", False)
    assert len(references) == len(TEXTS) + 4
