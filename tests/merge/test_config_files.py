"""What stands beside the weights: the base's bytes, and only the edits that a plain model needs."""

import json

import pytest

from qtune.errors import ModelError
from qtune.merge.config_files import write_small_files
from qtune.recipe.chat_templates import BUILT_IN
from qtune.recipe.schema import Model


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text('{"eos_token_id": 2,\n  "torch_dtype": "bfloat16", "odd": [1,2]}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 9],   "top_p": 0.8}')
    (folder / "tokenizer_config.json").write_text('{"chat_template":"old",  "x": 1}')
    licence = ("LICENSE", "LICENSE.md", "NOTICE")  # who passes on what is under Apache 2.0 passes on its NOTICE
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", *licence):
        (folder / name).write_bytes(f"{name}\r\n\x00".encode())
    for name in ("pytorch_model.bin", "run.py", "model.safetensors", "model.safetensors.index.json", "x.pt"):
        (folder / name).write_text("must stay behind")
    (tmp_path / "out").mkdir()
    return folder


def read(path):
    return json.loads(path.read_text())


def test_files_are_copied_byte_for_byte_and_nothing_that_can_run(base, tmp_path) -> None:
    out = tmp_path / "out"
    write_small_files(base, out, Model(base=str(base)), [9], "bfloat16")
    names = {path.name for path in out.iterdir()}
    assert not names & {"pytorch_model.bin", "run.py", "x.pt", "model.safetensors", "model.safetensors.index.json"}
    assert {
        "tokenizer.json",
        "LICENSE",
        "LICENSE.md",
        "NOTICE",
        "merges.txt",
        "tokenizer.model",
        "config.json",
    } <= names
    for name in names:  # config and generation settings too, as there was nothing to change
        assert (out / name).read_bytes() == (base / name).read_bytes(), name


def test_code_goes_along_where_it_was_trusted(base, tmp_path) -> None:
    write_small_files(base, tmp_path / "out", Model(base=str(base), trust_remote_code=True), [], "bfloat16")
    assert (tmp_path / "out" / "run.py").exists()


def test_the_configuration_is_plain_and_says_its_dtype(base, tmp_path) -> None:
    (base / "config.json").write_text('{"torch_dtype": "bfloat16", "quantization_config": {"bits": 4}, "odd": [1, 2]}')
    write_small_files(base, tmp_path / "out", Model(base=str(base)), [], "float16")
    assert read(tmp_path / "out" / "config.json") == {"torch_dtype": "float16", "odd": [1, 2]}


def test_the_newer_key_for_the_dtype_is_kept(base, tmp_path) -> None:
    (base / "config.json").write_text('{"dtype": "bfloat16"}')
    write_small_files(base, tmp_path / "out", Model(base=str(base)), [], "float16")
    assert read(tmp_path / "out" / "config.json") == {"dtype": "float16"}


@pytest.mark.parametrize(
    ("generation", "config", "stop", "expected"),
    [
        ({"eos_token_id": 2}, {}, [9], [2, 9]),
        ({"eos_token_id": [2, 9]}, {}, [9, 11], [2, 9, 11]),
        ({"eos_token_id": [9, 2]}, {}, [2], [9, 2]),
        ({"eos_token_id": 9}, {}, [9], 9),
        ({}, {"eos_token_id": 2}, [9], [2, 9]),
        ({"eos_token_id": None}, {"eos_token_id": None}, [9], 9),
        (None, {"eos_token_id": [2]}, [9], [2, 9]),
        (None, {}, [9], 9),
    ],
)
def test_every_trained_stop_token_ends_generation(base, tmp_path, generation, config, stop, expected) -> None:
    (base / "config.json").write_text(json.dumps(config))
    (base / "generation_config.json").unlink()
    if generation is not None:
        (base / "generation_config.json").write_text(json.dumps({**generation, "top_p": 0.8}))
    write_small_files(base, tmp_path / "out", Model(base=str(base)), stop, "float32")
    written = read(tmp_path / "out" / "generation_config.json")
    assert written["eos_token_id"] == expected
    assert written.get("top_p") == (None if generation is None else 0.8)


def test_the_runs_own_template_replaces_the_bases_in_both_places(base, tmp_path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages }}\n")
    write_small_files(base, tmp_path / "out", Model(base=str(base), chat_template=str(template)), [], "bfloat16")
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == template.read_bytes()
    assert read(tmp_path / "out" / "tokenizer_config.json") == {"chat_template": "{{ messages }}\n", "x": 1}


def test_a_template_of_qtunes_own_is_written_for_who_reads_the_folder(base, tmp_path) -> None:
    write_small_files(base, tmp_path / "out", Model(base=str(base), chat_template="alpaca"), [], "bfloat16")
    text = BUILT_IN["alpaca"].text
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == text
    assert read(tmp_path / "out" / "tokenizer_config.json") == {"chat_template": text, "x": 1}


def test_a_template_that_is_gone_is_named(base, tmp_path) -> None:
    with pytest.raises(ModelError, match=r"model.chat_template: .*gone.jinja cannot be read"):
        write_small_files(base, tmp_path / "out", Model(base=str(base), chat_template="/gone.jinja"), [], "bfloat16")


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_broken_configuration_is_named(base, tmp_path, text) -> None:
    (base / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        write_small_files(base, tmp_path / "out", Model(base=str(base)), [], "bfloat16")
