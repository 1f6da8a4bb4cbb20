"""llama.cpp's verdict on files that are wrong in ways that load."""

import dataclasses
from pathlib import Path

import pytest
from gguf import GGUFReader
from made_bases import make_base
from made_runs import make_run, token_rows

from qtune.deploy.export import export
from qtune.deploy.gguf_tokens import Reference
from qtune.deploy.gguf_verdict import judge
from qtune.deploy.verify import Live
from qtune.errors import ModelError, UserError

pytest.importorskip("llama_cpp")
ROWS = token_rows(300, rows=2, tokens=30)


@pytest.fixture(scope="module")
def live_and_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Live, Path]:
    folder = tmp_path_factory.mktemp("verdict")
    run = make_run(folder / "run", make_base(folder / "base", "llama"), compute_dtype="float32", stop_token_ids=(5, 1))
    export(run, folder / "out", "gguf", "f32")
    return Live.open(run), folder / "out" / "model.gguf"


def spoiled(file: Path, copy: Path, offset: int, content: bytes) -> Path:
    data = bytearray(file.read_bytes())
    data[offset : offset + len(content)] = content
    copy.write_bytes(data)
    return copy


def test_a_right_file_has_no_faults(live_and_file) -> None:
    verdict = judge(*live_and_file, ROWS, (), "f32", "dequantised")
    assert verdict.faults == ()
    assert verdict.rows == len(ROWS)
    assert verdict.positions == sum(map(len, ROWS))
    assert all(answer.same for answer in verdict.greedy)


def test_ends_are_where_the_live_model_stops(live_and_file) -> None:
    live, file = live_and_file
    deaf = dataclasses.replace(live, stop_token_ids=tuple(range(10, 300)))
    verdict = judge(deaf, file, ROWS, (), "f32", "dequantised")
    assert verdict.ends > verdict.ends_found == 0
    assert len(verdict.deaf_to) == 290


def test_a_layer_that_is_another_is_noticed(live_and_file, tmp_path) -> None:
    live, file = live_and_file
    tensor = next(tensor for tensor in GGUFReader(file).tensors if tensor.name == "blk.1.attn_q.weight")
    copy = spoiled(file, tmp_path / "x.gguf", tensor.data_offset, bytes(tensor.n_bytes))
    (fault,) = judge(live, copy, ROWS, (), "f32", "dequantised").faults
    assert fault.startswith("same next token")
    assert judge(live, copy, ROWS, (), "q4_0", "dequantised").faults == ()  # 4 bits have no bound


def test_a_stop_token_it_does_not_stop_at_is_noticed(live_and_file, tmp_path) -> None:
    live, file = live_and_file
    field = GGUFReader(file).get_field("tokenizer.ggml.eot_token_id")
    copy = spoiled(file, tmp_path / "x.gguf", field.offset + 8 + len(field.name) + 4, (4).to_bytes(4, "little"))
    faults = judge(live, copy, ROWS, (), "f32", "dequantised").faults
    assert faults == ("llama.cpp does not stop at <|assistant|>",)


def test_other_tokens_are_noticed(live_and_file) -> None:
    verdict = judge(*live_and_file, ROWS, [Reference("Hello", (1, 2))], "f32", "dequantised")
    assert verdict.faults == ("'Hello' becomes other tokens than in training",)


def test_onto_the_original_base_the_loss_must_hold(live_and_file) -> None:
    verdict = judge(*live_and_file, ROWS, (), "f32", "original")
    assert verdict.agreement_bound_fraction is None
    assert verdict.loss_rise_bound == 0.1


def test_a_file_that_does_not_load_is_named(live_and_file, tmp_path) -> None:
    live, file = live_and_file
    copy = spoiled(file, tmp_path / "x.gguf", 0, b"NOPE")
    with pytest.raises(ModelError, match=r"x\.gguf: does not load in llama\.cpp"):
        judge(live, copy, ROWS, (), "f32", "dequantised")
    with pytest.raises(UserError, match="no held-out row"):
        judge(live, file, [[1]], (), "f32", "dequantised")
