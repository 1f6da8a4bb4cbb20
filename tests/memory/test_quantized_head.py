"""The head in NF4: the loss and gradient of the same head dequantised beforehand."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from made_models import adapted, assert_close, base, batch, held_out, one_pass, switched

from qtune.memory import output_head
from qtune.memory.chunked_cross_entropy import of_sliced_head
from qtune.memory.fused_cross_entropy import of_weight, suits, summed_loss
from qtune.memory.output_head import nf4_slices, quantize_head, sliced_nf4
from qtune.memory.techniques import Techniques

HEAD = Techniques(head="nf4")


class OnlyHead(torch.nn.Module):
    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(width, vocabulary, bias=False).requires_grad_(False)

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.head

    def set_output_embeddings(self, head: torch.nn.Module) -> None:
        self.head = head


def pair(vocabulary: int, width: int = 64) -> tuple[Linear4bit, torch.nn.Linear]:
    """A quantised head, and a plain one of the same values."""
    model = OnlyHead(vocabulary, width)
    quantize_head(model)
    plain = torch.nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    plain.weight.data = dequantize_4bit(model.head.weight.data, model.head.weight.quant_state)
    return model.head, plain


@pytest.mark.parametrize("slice_bytes", [1, 64 * 4 * 200, 64 * 1024**2])
@pytest.mark.parametrize("vocabulary", [262, 1000, 63, 64, 4001])
def test_value_and_gradient_whatever_the_slices(monkeypatch, vocabulary, slice_bytes) -> None:
    monkeypatch.setattr(output_head, "NF4_SLICE_BYTES", slice_bytes)
    packed, plain = pair(vocabulary)
    labels = torch.randint(0, vocabulary, (53,))
    labels[:2] = torch.tensor([0, vocabulary - 1])
    hidden = 3 * torch.randn(53, 64)
    ours = of_sliced_head(hidden, sliced_nf4(packed, hidden), labels, with_gradient=True)
    theirs = of_weight(hidden.double(), plain.weight.double(), labels, with_gradient=True)
    assert ours[0].item() == pytest.approx(theirs[0].item(), rel=1e-5)
    assert (ours[1] - theirs[1]).norm() <= 1e-5 * theirs[1].norm()
    assert of_sliced_head(hidden, sliced_nf4(packed, hidden), labels, with_gradient=False)[1] is None


def test_a_large_odd_vocabulary() -> None:
    packed, plain = pair(32_001)
    labels, hidden = torch.randint(0, 32_001, (1, 9)), torch.randn(1, 9, 64)
    results = []
    for head in (packed, plain):
        leaf = hidden.clone().requires_grad_()
        loss = summed_loss(leaf, head, labels)
        (2 * loss.nats).backward()
        results.append((loss.nats.item(), leaf.grad))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)


def test_logits_too_large_for_an_exponential() -> None:
    packed, plain = pair(300)
    labels, hidden = torch.randint(0, 300, (5,)), 1e4 * torch.randn(5, 64)
    ours = of_sliced_head(hidden, sliced_nf4(packed, hidden), labels, with_gradient=True)
    theirs = of_weight(hidden, plain.weight, labels, with_gradient=True)
    assert ours[0].item() == pytest.approx(theirs[0].item(), rel=1e-5)
    assert torch.isfinite(ours[1]).all()


def test_no_label_at_all() -> None:
    packed, _ = pair(300)
    hidden = torch.randn(1, 5, 64, requires_grad=True)
    loss = summed_loss(hidden, packed, torch.full((1, 5), -100))
    loss.nats.backward()
    assert loss.nats.item() == 0
    assert not hidden.grad.any()


@pytest.mark.parametrize("slice_bytes", [1, 100_000, 64 * 1024**2])
@pytest.mark.parametrize("width", [64, 172, 7])
def test_slices_cover_the_vocabulary_and_start_on_blocks(monkeypatch, width, slice_bytes) -> None:
    monkeypatch.setattr(output_head, "NF4_SLICE_BYTES", slice_bytes)
    model = OnlyHead(1000, width)  # and no plain head of odd rows, for which bitsandbytes waits for torch's compiler
    quantize_head(model)
    head = model.head
    found = nf4_slices(head, torch.zeros(1))
    assert [part.start for part in found] == [0, *(part.stop for part in found[:-1])]
    assert found[-1].stop == 1000
    assert all(part.start * width % 64 == 0 for part in found)
    assert all((part.stop - part.start) * width * 4 <= max(slice_bytes, 64 * width * 4) for part in found)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_a_model_trains_evaluates_and_generates_as_with_the_head_dequantised(kind) -> None:
    ours, plain = adapted(base(kind, nf4="double")), adapted(base(kind, nf4="double"))
    switched(ours, HEAD)
    packed = ours.get_base_model().get_output_embeddings()
    head = torch.nn.Linear(64, 262, bias=False).requires_grad_(False)
    head.weight.data = dequantize_4bit(packed.weight.data, packed.weight.quant_state)
    plain.get_base_model().set_output_embeddings(head)
    prompt = {"input_ids": batch()["input_ids"][:, :9], "max_new_tokens": 4, "do_sample": False, "use_cache": True}
    for _ in range(2):
        assert_close(one_pass(ours, batch()), one_pass(plain, batch()), 2e-5)
        assert held_out(ours, batch()) == pytest.approx(held_out(plain, batch()), rel=1e-6)
        assert torch.equal(ours.generate(**prompt), plain.generate(**prompt))


def test_a_tied_embedding_stays_what_it_was_and_twice_is_once() -> None:
    model = adapted(base("qwen3"))
    causal = model.get_base_model()
    table = causal.get_input_embeddings().weight
    assert causal.get_output_embeddings().weight is table
    values = table.clone()
    engine = switched(model, HEAD)
    head = causal.get_output_embeddings()
    assert suits(model)
    assert isinstance(head, Linear4bit)
    assert causal.get_input_embeddings().weight is table
    assert torch.equal(table, values)
    engine.switch_to(Techniques(head="nf4", host_embedding=True))
    assert causal.get_output_embeddings() is head


def test_an_adapter_saved_with_it_is_the_same(tmp_path) -> None:
    plain, ours = adapted(base("llama", nf4="double")), adapted(base("llama", nf4="double"))
    switched(ours, HEAD)
    plain.save_pretrained(tmp_path / "plain")
    ours.save_pretrained(tmp_path / "ours")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "ours")]
    assert files[0] == files[1]
