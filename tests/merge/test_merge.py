"""A merge from the run folder to a folder anyone can load, or nothing at all."""

import errno
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import END
from crossed import crossed
from made_bases import make_base
from made_runs import make_run, token_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtune.errors import DiskFull, MachineError, ModelError, RunFolderError, UserError
from qtune.merge import greedy_answers
from qtune.merge.merge import _refusing_bad_disk, merge
from qtune.merge.merged_weights import Fold
from qtune.merge.verify import FOLD_KL, verify
from qtune.rundir import read_json

LORAS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
}
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole ones is `test_verify`."""
    monkeypatch.setattr(greedy_answers, "ANSWER_TOKENS", 6)


def left_beside(output: Path) -> list[str]:
    return sorted(path.name for path in output.parent.iterdir() if path.name != "run")


@pytest.mark.parametrize(
    ("lora", "compute_dtype", "dtype"), crossed([*LORAS], [("bfloat16", "float32"), ("float32", "float16")])
)
def test_onto_the_dequantised_base_it_is_the_trained_model(tiny_base, tmp_path, lora, compute_dtype, dtype) -> None:
    run, output = make_run(tmp_path / "run", tiny_base, LORAS[lora], compute_dtype), tmp_path / "out"
    merge(run, output, "dequantised", dtype)
    verdict = verify(run, output, token_rows())
    assert verdict.passed
    assert verdict.mean_kl <= 1e-8  # far below the 1e-5 it is held to
    assert verdict.agreement_fraction == 1
    assert all(answer.same for answer in verdict.greedy)


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float32"])
def test_whole_modules_that_were_trained_are_reproduced(tiny_base, tmp_path, compute_dtype) -> None:
    """Merged they keep every bit of the adapter's file; loaded beside a bfloat16 base, peft rounds them to it."""
    lora = {"modules_to_save": ["embed_tokens", "lm_head"]}
    run, output = make_run(tmp_path / "run", tiny_base, lora, compute_dtype), tmp_path / "out"
    merge(run, output, "dequantised", "float32")
    verdict = verify(run, output, token_rows())
    assert verdict.passed
    assert verdict.mean_kl <= (1e-5 if compute_dtype == "bfloat16" else 1e-8)


@pytest.mark.parametrize(
    ("compute_dtype", "dtype", "bound"),
    crossed(["bfloat16", "float32"], [("float32", 1e-5), ("float16", 1e-5), ("bfloat16", 1e-4)]),
)
def test_a_tied_base_is_reproduced_in_every_dtype(tmp_path, compute_dtype, dtype, bound) -> None:
    folder = make_base(tmp_path / "base", "llama tied", initializer_range=0.05)
    run, output = make_run(tmp_path / "run", folder, compute_dtype=compute_dtype), tmp_path / "out"
    merge(run, output, "dequantised", dtype)
    verdict = verify(run, output, token_rows())
    assert verdict.passed
    assert verdict.mean_kl <= bound
    assert verdict.fold_kl <= FOLD_KL / 100


@pytest.mark.parametrize("base_settings", [{"double_quantization": False}, {"quantization": "none"}], ids=str)
def test_other_ways_to_hold_the_base_are_reproduced_too(tiny_base, tmp_path, base_settings) -> None:
    run, output = make_run(tmp_path / "run", tiny_base, compute_dtype="float32", **base_settings), tmp_path / "out"
    onto = "original" if "quantization" in base_settings else "dequantised"
    assert merge(run, output, onto).onto == onto
    assert verify(run, output, token_rows()).mean_kl <= 1e-9


def test_auto_measures_both_bases_and_keeps_the_closer(tiny_base, tmp_path) -> None:
    run, output = make_run(tmp_path / "run", tiny_base), tmp_path / "out"
    heard = []
    report = merge(run, output, "auto", "float32", token_rows(), lambda *event: heard.append(event))
    kl = {verdict.onto: verdict.mean_kl for verdict in report.measured}
    assert report.onto == "dequantised"
    assert kl["dequantised"] < 1e-8 < 1e-5 < kl["original"]
    assert report.verdict is not None
    assert report.verdict.onto == "dequantised"
    assert [done for done, _, _ in heard] == list(range(1, 2 * report.tensors + 1))
    assert {total for _, total, _ in heard} == {2 * report.tensors}
    assert left_beside(output) == ["out"]


def test_auto_folds_into_the_original_where_nothing_was_quantised(tiny_base, tmp_path) -> None:
    run = make_run(tmp_path / "run", tiny_base, quantization="none")
    report = merge(run, tmp_path / "out")
    assert report.onto == "original"
    assert report.measured == ()


def test_the_report_is_kept_in_the_run_and_in_the_folder(tiny_base, tmp_path) -> None:
    run, output = make_run(tmp_path / "run", tiny_base), tmp_path / "out"
    report = merge(run, output, "dequantised")
    assert read_json(run.merge) == json.loads(json.dumps(report.as_json())) == read_json(output / "merge_report.json")
    assert report.bytes == sum(tensor.nbytes for tensor in load_file(output / "model.safetensors").values())
    assert (report.tensors, report.shards, report.dtype, len(report.layers)) == (21, 1, "float32", 14)
    verdict = verify(run, output, token_rows())
    for path in (run.merge, output / "merge_report.json"):
        kept = read_json(path)
        assert kept["verdict"]["mean_kl"] == verdict.mean_kl
        assert kept["verdict"]["passed"] is True
        assert kept["onto"] == "dequantised"


def test_the_output_is_a_plain_folder(tiny_base, tmp_path) -> None:
    run, output = make_run(tmp_path / "run", tiny_base, stop_token_ids=(END, 5)), tmp_path / "new" / "out"
    merge(run, output, "dequantised")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (output / name).read_bytes() == (tiny_base / name).read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(output)
    assert "Linear4bit" not in {type(module).__name__ for module in loaded.modules()}
    assert loaded.generation_config.eos_token_id == [END, 5]
    assert AutoTokenizer.from_pretrained(output).chat_template is not None


def test_an_output_that_holds_anything_is_refused_and_an_empty_one_is_used(tiny_base, tmp_path) -> None:
    run, output = make_run(tmp_path / "run", tiny_base), tmp_path / "out"
    output.mkdir()
    merge(run, output, "dequantised")
    before = (output / "model.safetensors").read_bytes()
    with pytest.raises(RunFolderError, match=r"out: exists already"):
        merge(run, output, "original")
    assert (output / "model.safetensors").read_bytes() == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunFolderError, match="exists already"):
        merge(run, tmp_path / "file", "dequantised")


def test_a_small_disk_is_noticed_before_anything_is_written(tiny_base, tmp_path, monkeypatch) -> None:
    run, output = make_run(tmp_path / "run", tiny_base), tmp_path / "out"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**30, 2**30, 5 * 2**20))
    with pytest.raises(MachineError, match=r"needs 6\d MiB and .* has 5\.0 MiB free"):
        merge(run, output, "dequantised")
    assert left_beside(output) == []


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(28, "No space left on device"), RuntimeError("boom")])
def test_a_merge_that_breaks_off_leaves_nothing(tiny_base, tmp_path, fault) -> None:
    run, output = make_run(tmp_path / "run", tiny_base), tmp_path / "out"

    def stop_midway(done: int, total: int, name: str) -> None:
        if done == total // 2:
            raise fault

    expected = MachineError if isinstance(fault, OSError) else type(fault)
    with pytest.raises(expected, match="No space left" if expected is MachineError else None):
        merge(run, output, "dequantised", progress=stop_midway)
    assert left_beside(output) == []
    assert not run.merge.exists()


def test_auto_without_held_out_rows_says_what_to_use(tiny_base, tmp_path) -> None:
    run = make_run(tmp_path / "run", tiny_base)
    with pytest.raises(UserError, match="--onto dequantised"):
        merge(run, tmp_path / "out", rows=[[7]])


def test_a_base_that_was_not_quantised_has_no_dequantised_form(tiny_base, tmp_path) -> None:
    run = make_run(tmp_path / "run", tiny_base, quantization="none")
    with pytest.raises(UserError, match="--onto original"):
        merge(run, tmp_path / "out", "dequantised")


def test_a_refused_adapter_leaves_nothing(tiny_base, tmp_path) -> None:
    run, output = make_run(tmp_path / "run", tiny_base), tmp_path / "out"
    (run.adapter / "adapter_model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ModelError, match="cannot be read"):
        merge(run, output, "dequantised")
    assert left_beside(output) == []


@pytest.mark.parametrize(
    ("name", "dtype", "bound"),
    crossed(
        ["stories260K-llama", "TinyStories-656K-llama"], [("float32", 1e-9), ("float16", 1e-5), ("bfloat16", 1e-4)]
    ),
)
def test_real_checkpoints_are_reproduced(material, tmp_path, name, dtype, bound) -> None:
    """One of them stores its tied embedding under the name of the head only."""
    folder = material / "models" / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["Once upon a time there was a little girl named Lily. She loved to play.", "The dog ran home to his mom."]
    run, output = make_run(tmp_path / "run", folder, strength=0.02, stop_token_ids=(2,)), tmp_path / "out"
    report = merge(run, output, "auto", dtype, [tokenizer(text)["input_ids"] for text in texts])
    assert report.onto == "dequantised"
    assert report.verdict is not None
    assert report.verdict.mean_kl <= bound
    assert report.verdict.passed
    before = Fold.open(run, "auto").checkpoint
    assert set(load_file(output / "model.safetensors")) == set(before.specs())
    assert (output / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(output).lm_head.weight).all()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (OSError(errno.EIO, "Input/output error"), r"Input/output error"),
        (OSError("the library said no more"), r"the library said no more"),
        (DiskFull("m: cannot be written, the disk is full."), r"m: cannot be written, the disk is full\."),
    ],
)
def test_why_writing_failed_is_said_whoever_says_it(fault: Exception, reason: str, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=rf"writing failed \({reason}\)"), _refusing_bad_disk(tmp_path):
        raise fault
