"""The verdict: right figures, a broken merge found, float32 arithmetic that does not depend on the kernels."""

import dataclasses
import json
import shutil

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from made_bases import make_base
from made_runs import make_run, token_rows
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM

from qtune.errors import MachineError, ModelError, UserError
from qtune.memory.techniques import Techniques
from qtune.merge import live_weights
from qtune.merge import merge as merge_module
from qtune.merge.live_weights import compute_in_float32
from qtune.merge.logit_distance import in_batches, is_at_most, logits_of, usable_rows
from qtune.merge.merge import merge, merge_and_verify
from qtune.merge.verify import Live, compare, verify
from qtune.model import base
from qtune.recipe.schema import Model
from qtune.report.progress_line import Doing
from qtune.rundir import write_json


@pytest.fixture(scope="module")
def merged(tiny_base, tmp_path_factory):
    """A run and its merge onto the original weights, which is near the trained model and not the same."""
    folder = tmp_path_factory.mktemp("merged")
    run = make_run(folder / "run", tiny_base)
    merge(run, folder / "out", "original")
    return run, folder / "out"


@pytest.fixture(scope="module")
def live(merged) -> Live:
    return Live.open(merged[0])


def test_the_figures_are_those_of_torch(merged, live) -> None:
    _, output = merged
    rows = [*token_rows(rows=2, tokens=70), token_rows(rows=1, tokens=2)[0]]
    verdict = compare(live, output, rows, "original", "float32")
    plain = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    kl, agreed, live_loss, merged_loss = [], [], 0.0, 0.0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row])
            p, q = live.model(input_ids=ids).logits[0], plain(input_ids=ids).logits[0]
            kl.append(
                kl_div(q.double().log_softmax(-1), p.double().log_softmax(-1), reduction="none", log_target=True).sum(
                    -1
                )
            )
            agreed.append(p.argmax(-1) == q.argmax(-1))
            live_loss += float(cross_entropy(p[:-1], ids[0, 1:], reduction="sum"))
            merged_loss += float(cross_entropy(q[:-1], ids[0, 1:], reduction="sum"))
    divergences = torch.cat(kl)
    assert verdict.positions == len(divergences) == 142
    assert verdict.mean_kl == pytest.approx(float(divergences.mean()), rel=1e-4)
    assert verdict.max_kl == pytest.approx(float(divergences.max()), rel=1e-4)
    assert verdict.agreement_fraction == pytest.approx(float(torch.cat(agreed).float().mean()), abs=0.01)
    assert verdict.live_loss == pytest.approx(live_loss / 139, rel=1e-5)
    assert verdict.merged_loss == pytest.approx(merged_loss / 139, rel=1e-5)


def test_the_original_base_is_judged_by_its_loss(merged, live) -> None:
    """It is not what was trained on: its KL is the quantisation error, however right the merge."""
    as_trained = compare(live, merged[1], token_rows(), "dequantised", "float32")
    as_original = compare(live, merged[1], token_rows(), "original", "float32")
    assert as_trained.mean_kl == as_original.mean_kl > 1e-5
    assert as_trained.weights.strays > 0.9 * 14 * 64 * 64  # no 4-bit weight is the checkpoint's
    assert as_original.faults == ()
    worse = dataclasses.replace(as_original, merged_loss=as_original.live_loss + 0.11)
    assert not worse.passed


def test_what_does_not_hold_is_said_beside_its_bound(merged, live) -> None:
    verdict = compare(live, merged[1], token_rows(), "original", "float32")
    settings = {"dtype": "bfloat16", "mean_kl": 2.34e-2, "mean_kl_bound": 2e-3, "base_kl": 0.2, "fold_kl": 3e-5}
    found = dataclasses.replace(verdict, **settings, live_loss=1.5, merged_loss=1.62)
    assert found.faults == (
        "mean KL 3.0e-05 nats before any rounding (at most 1e-05)",
        "mean KL 2.3e-02 nats in bfloat16 (at most 2.0e-03), where tuning changed 2.0e-01: --dtype float32 is finer",
        "held-out loss 1.6200 after 1.5000 (at most 0.1 more)",
    )
    assert not found.passed


def test_what_tuning_changed_is_the_bases_distance(merged, live) -> None:
    verdict = compare(live, merged[1], token_rows(), "original", "float32")
    rows = token_rows()[: verdict.rows]
    with torch.no_grad(), live.model.disable_adapter():
        base_logits = [live.model(input_ids=torch.tensor([row])).logits[0] for row in rows]
    with torch.no_grad():
        tuned_logits = [live.model(input_ids=torch.tensor([row])).logits[0] for row in rows]
    kl = [
        kl_div(q.double().log_softmax(-1), p.double().log_softmax(-1), reduction="sum", log_target=True) / len(p)
        for p, q in zip(tuned_logits, base_logits, strict=True)
    ]
    assert verdict.base_kl == pytest.approx(float(sum(kl) / len(kl)), rel=1e-4)


def test_rounding_that_drowns_what_was_learned_fails_and_names_what_is_finer(tiny_base, tmp_path) -> None:
    """Every weight is the nearest bfloat16 to the right one, and the answers have still moved."""
    base = make_base(tmp_path / "base", "llama", initializer_range=0.26)  # so large that rounding it shows in answers
    run = make_run(tmp_path / "run", base, compute_dtype="float32", strength=1e-4)
    merge(run, tmp_path / "out", "dequantised", "bfloat16")
    verdict = verify(run, tmp_path / "out", token_rows())
    assert verdict.weights.strays == 0
    (fault,) = verdict.faults
    assert fault.endswith("--dtype float16 is finer")
    assert verdict.float16_kl is not None
    assert verdict.float16_kl < verdict.mean_kl / 10


def test_one_damaged_layer_fails(tiny_base, tmp_path) -> None:
    run, output = make_run(tmp_path / "run", tiny_base), tmp_path / "out"
    merge(run, output, "dequantised", "float32")
    tensors = load_file(output / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"] *= 1.5
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    verdict = verify(run, output, token_rows())
    assert not verdict.passed
    assert not all(answer.same for answer in verdict.greedy)


def test_a_model_that_is_not_a_number_fails(tiny_base, tmp_path) -> None:
    run, output = make_run(tmp_path / "run", tiny_base), tmp_path / "out"
    merge(run, output, "dequantised", "float32")
    tensors = load_file(output / "model.safetensors")
    tensors["model.norm.weight"] *= float("nan")
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    assert not verify(run, output, token_rows()).passed


def test_rows_are_added_until_it_is_sure_and_no_longer(merged, live) -> None:
    """A verdict took every row there was, however plain the answer: three minutes for 135 million weights."""
    verdict = compare(live, merged[1], token_rows(rows=70, tokens=9), "original", "float32")
    assert (verdict.rows, verdict.positions, len(verdict.greedy)) == (4, 36, 3)


def test_rows_are_cut_to_what_memory_allows() -> None:
    rows = usable_rows([*token_rows(rows=70, tokens=3), [7]], "out")
    assert len(rows) == 64
    (cut,) = usable_rows(token_rows(rows=1, tokens=600), "out")
    assert len(cut) == 512
    batches = list(in_batches(token_rows(rows=4, tokens=200) + token_rows(rows=1, tokens=512)))
    assert [[len(row) for row in batch] for batch in batches] == [[200, 200], [200, 200], [512]]


def test_rows_of_different_lengths_are_measured_as_they_are_alone(merged, live) -> None:
    rows = [row[:length] for row, length in zip(token_rows(rows=4), (5, 40, 17, 2), strict=True)]
    together = logits_of(live.model, rows, live.device)
    for row, logits in zip(rows, together, strict=True):
        torch.testing.assert_close(logits, *logits_of(live.model, [row], live.device), rtol=0, atol=1e-5)


def test_it_is_sure_where_rows_agree_and_unsure_where_they_do_not() -> None:
    sizes = [10] * 4
    assert is_at_most(1.0, [9.0, 9.1, 8.9, 9.0], sizes) is True
    assert is_at_most(1.0, [11.0, 11.1, 10.9, 11.0], sizes) is False
    assert is_at_most(1.0, [1.0, 20.0, 2.0, 9.0], sizes) is None
    assert is_at_most(1.0, [9.0, 9.0, 9.0], sizes[:3]) is None
    assert is_at_most(1.0, [float("nan")] * 4, sizes) is False


def test_no_row_to_compare_on_is_said(merged, live) -> None:
    with pytest.raises(UserError, match="held_out_fraction"):
        compare(live, merged[1], [[7], []], "original", "float32")


def test_a_folder_that_does_not_load_is_named(merged, live, tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="does not load in transformers"):
        compare(live, tmp_path, token_rows(), "original", "float32")


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float16"])
def test_float32_arithmetic_on_weights_as_they_are_held(tiny_base, compute_dtype) -> None:
    """The same as a float32 model built from the restored weights, which bitsandbytes' own kernels are not."""
    held = base.load_base(Model(base=str(tiny_base)), "cpu", compute_dtype)
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    for name, parameter in held.named_parameters():
        quantized = hasattr(parameter, "quant_state")
        restored = dequantize_4bit(parameter.data, parameter.quant_state) if quantized else parameter
        plain.get_parameter(name).data = restored.detach().float()
    ids = torch.tensor(token_rows(rows=1))
    with torch.no_grad():
        own_kernels = held(input_ids=ids).logits.float()
        expected = plain(input_ids=ids).logits
        found = compute_in_float32(held, "cpu")(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (own_kernels - expected).abs().max() > 1e-4
    assert held.lm_head.weight.dtype == getattr(torch, compute_dtype)  # not widened for good


def test_a_large_head_is_widened_a_part_at_a_time(tiny_base, monkeypatch) -> None:
    """In float32 that of a vocabulary of 128k is 2 GB."""
    model = compute_in_float32(base.load_base(Model(base=str(tiny_base)), "cpu", "bfloat16"), "cpu")
    ids, widened = torch.tensor(token_rows(rows=1)), []
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        monkeypatch.setattr(live_weights, "WIDENED_BYTES", 100 * 64 * 4)
        original = live_weights._widened
        monkeypatch.setattr(live_weights, "_widened", lambda *args: widened.append(args[0].shape) or original(*args))
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-6)
    assert widened == [(100, 64), (100, 64), (62, 64)]


def test_weights_that_waited_in_host_memory_wait_there_again(merged, monkeypatch) -> None:
    """The card that trained it once had to have room for all of it here."""
    run, output = merged
    expected = compare(Live.open(run), output, token_rows(), "original", "float32")
    write_json(run.plan, {"techniques": {"host_embedding": True, "streamed_layers": 2, "head": "host"}})
    asked, original = [], base.load_base
    monkeypatch.setattr(base, "load_base", lambda *args: asked.append(args[3]) or original(*args))
    assert compare(Live.open(run), output, token_rows(), "original", "float32") == expected
    write_json(run.plan, {"techniques": {}})
    assert asked == [Techniques(host_embedding=True, streamed_layers=2)]


def test_memory_that_runs_out_is_said_with_what_would_work(merged, tmp_path, monkeypatch) -> None:
    run, _ = merged
    write_json(run.probe, token_rows())

    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(merge_module, "verify", full)
    with pytest.raises(MachineError, match=r"out: memory ran out.*CUDA_VISIBLE_DEVICES="):
        merge_and_verify(run, tmp_path / "out", "original", "float32", Doing())


@pytest.fixture(scope="module")
def as_trained(tiny_base, tmp_path_factory):
    """A run and a merge of it that nothing is wrong with."""
    folder = tmp_path_factory.mktemp("as_trained")
    run = make_run(folder / "run", tiny_base, compute_dtype="float32")
    merge(run, folder / "out", "dequantised", "float32")
    return run, folder / "out"


@pytest.mark.parametrize(
    ("figures", "clause"),
    [
        ({"fold_kl": 1.1e-5}, "before any rounding (at most 1e-05)"),
        ({"fold_kl": float("nan")}, "before any rounding (at most 1e-05)"),
        ({"mean_kl": 1.1e-3, "base_kl": 0.1, "mean_kl_bound": 1e-3}, "nats in float32 (at most 1.0e-03)"),
        ({"mean_kl": float("nan")}, "nats in float32"),
    ],
)
def test_a_kl_out_of_its_bound_fails_by_itself(as_trained, figures, clause) -> None:
    """Only ever beside other faults was it out, so that a bound which never failed was not seen."""
    run, output = as_trained
    verdict = verify(run, output, token_rows())
    assert verdict.faults == ()
    (fault,) = dataclasses.replace(verdict, **figures).faults
    assert clause in fault


def test_right_weights_in_a_model_that_computes_otherwise_fail_by_their_kl_alone(as_trained, tmp_path) -> None:
    run, output = as_trained
    shutil.copytree(output, tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 0.1}))
    verdict = verify(run, tmp_path / "out", token_rows())
    assert verdict.weights.faults == ()
    assert not verdict.passed
    assert all(fault.startswith("mean KL ") for fault in verdict.faults)
