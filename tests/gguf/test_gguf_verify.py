"""llama.cpp's verdict on files that are wrong in ways that load."""

import dataclasses
from pathlib import Path

import pytest
from gguf import GGUFReader
from made_bases import byte_level, make_base
from made_runs import make_run, token_rows

from qtune.errors import ModelError, UserError
from qtune.gguf.contents import Draft, model_draft
from qtune.gguf.export import export
from qtune.gguf.tokenizer_check import Reference
from qtune.gguf.verify import judge
from qtune.merge.merged_weights import Fold
from qtune.merge.verify import Live
from qtune.rundir import RunDir

pytest.importorskip("llama_cpp")
ROWS = token_rows(300, rows=2, tokens=30)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("verdict")
    ends = byte_level().convert_tokens_to_ids(["<|assistant|>", "<|end|>"])
    base = make_base(folder / "base", "llama")
    run = make_run(folder / "run", base, compute_dtype="float32", stop_token_ids=tuple(ends))
    export(run, folder / "out", "gguf", "f32")
    return run


@pytest.fixture(scope="module")
def live_and_file(run) -> tuple[Live, Path]:
    return Live.open(run), run.path.parent / "out" / "model.gguf"


@pytest.fixture
def draft(run) -> Draft:
    """What the file was made from."""
    return model_draft(run, Fold.open(run, "float32"), "f32", "dequantised")


def spoiled(file: Path, copy: Path, offset: int, content: bytes) -> Path:
    data = bytearray(file.read_bytes())
    data[offset : offset + len(content)] = content
    copy.write_bytes(data)
    return copy


def test_a_right_file_has_no_faults(live_and_file, draft) -> None:
    verdict = judge(*live_and_file, ROWS, draft)
    assert verdict.weights.strays == 0
    assert verdict.faults == ()
    assert verdict.rows == len(ROWS)
    assert verdict.positions == sum(map(len, ROWS))
    assert all(answer.same for answer in verdict.greedy)


def test_ends_are_where_the_live_model_stops(live_and_file, draft) -> None:
    live, file = live_and_file
    deaf = dataclasses.replace(live, stop_token_ids=tuple(range(10, 300)))
    verdict = judge(deaf, file, ROWS, draft)
    assert verdict.ends > verdict.ends_found == 0
    assert len(verdict.deaf_to) == 290


def test_a_layer_that_is_another_is_noticed(live_and_file, draft, tmp_path) -> None:
    live, file = live_and_file
    tensor = next(tensor for tensor in GGUFReader(file).tensors if tensor.name == "blk.1.attn_q.weight")
    copy = spoiled(file, tmp_path / "x.gguf", tensor.data_offset, bytes(tensor.n_bytes))
    in_weights, in_answers = judge(live, copy, ROWS, draft).faults
    assert in_weights.endswith("not those that were trained, most in model.layers.1.self_attn.q_proj.weight")
    assert in_answers.startswith("same next token")
    (fault,) = judge(live, copy, ROWS, dataclasses.replace(draft, quant="q4_0")).faults
    assert fault == in_weights  # of the answers of 4 bits nothing is asked


def test_a_stop_token_it_does_not_stop_at_is_noticed(live_and_file, draft, tmp_path) -> None:
    live, file = live_and_file
    field = GGUFReader(file).get_field("tokenizer.ggml.eot_token_id")
    copy = spoiled(file, tmp_path / "x.gguf", field.offset + 8 + len(field.name) + 4, (4).to_bytes(4, "little"))
    faults = judge(live, copy, ROWS, draft).faults
    assert faults == ("llama.cpp does not stop at <|assistant|>",)


def test_other_tokens_are_noticed(live_and_file, draft) -> None:
    verdict = judge(*live_and_file, ROWS, dataclasses.replace(draft, references=(Reference("Hello", (1, 2)),)))
    assert verdict.faults == ("'Hello' becomes other tokens than in training",)


def test_onto_the_original_base_the_loss_must_hold(live_and_file, draft) -> None:
    verdict = judge(*live_and_file, ROWS, dataclasses.replace(draft, onto="original"))
    assert verdict.agreement_bound_fraction is None
    assert verdict.loss_rise_bound == 0.1


def test_a_file_that_does_not_load_is_named(live_and_file, draft, tmp_path) -> None:
    live, file = live_and_file
    copy = spoiled(file, tmp_path / "x.gguf", 0, b"NOPE")
    with pytest.raises(ModelError, match=r"x\.gguf: does not load in llama\.cpp"):
        judge(live, copy, ROWS, draft)
    with pytest.raises(UserError, match="no held-out row"):
        judge(live, file, [[1]], draft)
