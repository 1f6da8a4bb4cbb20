"""The verdict: right figures, a broken merge found, float32 arithmetic that does not depend on the kernels."""

import dataclasses

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from made_runs import make_run, token_rows
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM

from qtune.deploy.in_float32 import compute_in_float32
from qtune.deploy.merge import merge
from qtune.deploy.verify import Live, compare, verify
from qtune.errors import ModelError, UserError
from qtune.model import base
from qtune.recipe.schema import Model


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
    assert not as_trained.passed
    assert as_original.passed
    worse = dataclasses.replace(as_original, merged_loss=as_original.live_loss + 0.11)
    assert not worse.passed


def test_the_sentence_has_the_figures_beside_the_bounds_that_apply(merged, live) -> None:
    verdict = compare(live, merged[1], token_rows(), "original", "float32")
    figures = dataclasses.replace(verdict, mean_kl=2.34e-3, agreement_fraction=0.9, live_loss=1.5, merged_loss=1.51)
    assert figures.sentence() == (
        "mean KL 2.3e-03 nats, same next token 90.0 %, held-out loss 1.5000 before and 1.5100 after merging"
        " (at most 0.1 more)"
    )
    exact = dataclasses.replace(figures, mean_kl_bound=1e-5, agreement_bound_fraction=0.985, loss_rise_bound=None)
    assert exact.sentence() == (
        "mean KL 2.3e-03 nats (at most 1e-05), same next token 90.0 % (at least 98.5 %), held-out loss 1.5000 before"
        " and 1.5100 after merging"
    )


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


def test_rows_are_cut_to_what_memory_allows(merged, live) -> None:
    rows = [*token_rows(rows=70, tokens=3), [7]]
    verdict = compare(live, merged[1], rows, "original", "float32")
    assert (verdict.rows, verdict.positions, len(verdict.greedy)) == (64, 192, 3)


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
