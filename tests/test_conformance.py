"""Every architecture that transformers has, tiny: proven, or refused by name. And the proofs can fail."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import conformance  # noqa: E402
from conforming import page, proofs, small_models  # noqa: E402
from conforming.page import Row  # noqa: E402
from conforming.proofs import Finding  # noqa: E402

from qtune.lock import PackingProbe  # noqa: E402
from qtune.memory import packed_attention  # noqa: E402
from qtune.memory.techniques import TECHNIQUES  # noqa: E402
from qtune.memory.techniques.tiled_mlp import TileTokens  # noqa: E402
from qtune.model import packing_probe  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
# Others are held against every technique elsewhere: Llama, Mistral, Qwen3 and Gemma 3 of made_models, mixtures in
# memory/test_mixture_of_experts, and the rest in memory/test_loss_parity.
ONE_OF_A_KIND = (
    "bamba",  # Mamba 2 beside attention
    "bloom",  # ALiBi
    "deepseek_v3",  # latent attention, values of another width
    "deepseek_v32",  # a sparse indexer
    "gpt2",  # Conv1D
    "gptj",  # an attention of its own
    "kimi_linear",  # KDA
    "lfm2",  # short convolutions
    "mamba",
    "minimax",  # lightning attention
    "phi3",  # fused queries, keys and values
    "qwen3_5_text",  # gated delta nets
    "recurrent_gemma",  # RG-LRU
    "xlstm",
)


def assert_proven_or_refused(row: Row) -> None:
    assert row.outcome in ("proven", "refused"), row.faults
    if row.outcome == "refused":
        assert re.search(r"\b(is|are|has|have|cannot|adds|runs?|caps|differs?)\b", row.faults), row.faults
        assert row.faults.endswith((".", ")")), row.faults


@pytest.mark.parametrize("kind", ONE_OF_A_KIND)
def test_one_of_a_kind(kind: str) -> None:
    (row,) = conformance.rows([kind], is_whole=False)
    assert_proven_or_refused(row)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_architecture() -> None:
    """No architecture is wrong, leaks or fails, and what docs/models.md says is proven still is.

    A run, its resumption and its merge are walked of every other one and of what is refused, as all of them take
    minutes more than a commit has; `scripts/conformance.py --output docs/models.md` walks all.
    """
    said = page.outcomes(PAGE.read_text(encoding="utf-8"))
    every = small_models.kinds()
    in_part = [kind for kind in every[1::2] if said.get(kind) == "proven"]
    walks = (([kind for kind in every if kind not in in_part], True), (in_part, False))
    rows = {row.kind: row for kinds, is_whole in walks for row in conformance.rows(kinds, is_whole, at_once=2)}
    bad = {kind: row.faults for kind, row in rows.items() if row.outcome in page.BAD}
    assert not bad, bad
    lost = {kind: rows[kind].faults for kind in said if said[kind] == "proven" and rows[kind].outcome != "proven"}
    assert not lost, lost


def test_the_page_has_every_architecture() -> None:
    said = page.outcomes(PAGE.read_text(encoding="utf-8"))
    assert set(small_models.kinds()) <= said.keys()


def walked(kind: str) -> Row:
    (row,) = conformance.rows([kind], is_whole=False)
    return row


@pytest.fixture
def unprobed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the leak probe found nothing, which refuses most of what is broken below before it is compared."""
    monkeypatch.setattr(packing_probe, "refuse_another", lambda probed, base: None)
    monkeypatch.setattr(PackingProbe, "leaks", False)


def attention_that(monkeypatch: pytest.MonkeyPatch, changes: Callable[[dict[str, Any]], None]) -> None:
    """Packed attention whose keywords are changed before it runs."""
    original = packed_attention.document_attention

    def changed(*given: Any, **named: Any) -> Any:
        changes(named)
        return original(*given, **named)

    monkeypatch.setattr(packed_attention, "document_attention", changed)


def test_a_model_of_which_no_run_can_be_is_refused_by_its_type() -> None:
    """blt has no hidden_size, which once ended in an AttributeError."""
    (row,) = conformance.rows(["blt"])
    assert row.outcome == "refused"
    assert row.faults.startswith("of type blt, which cannot be tuned yet: it is four models in one, ")


def test_every_technique_is_tried() -> None:
    alone = {
        name for name, technique in TECHNIQUES.items() if not technique.needs_ranks
    }  # all that one process can try
    assert proofs.each_alone(2).keys() == alone


def test_a_window_that_is_ignored_is_named(monkeypatch: pytest.MonkeyPatch, unprobed: None) -> None:
    attention_that(monkeypatch, lambda named: named.pop("sliding_window", None))
    row = walked("mistral")
    assert row.outcome == "wrong"
    assert "logits in a pack are" in row.faults
    assert "gradients are" in row.faults


def test_a_leak_is_named(monkeypatch: pytest.MonkeyPatch, unprobed: None) -> None:
    def as_one_document(named: dict[str, Any]) -> None:
        if named.get("document_lengths"):
            named["document_lengths"] = (sum(named["document_lengths"]),)

    attention_that(monkeypatch, as_one_document)
    row = walked("llama")
    assert row.outcome == "leaks"
    assert "with the neighbour in a pack" in row.faults


def test_a_technique_that_changes_the_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def switch_on(self: TileTokens, live: Any, wanted: Any) -> None:
        live.causal.model.norm.weight.data.mul_(1.01)

    monkeypatch.setattr(TileTokens, "switch_on", switch_on)
    row = walked("llama")
    assert row.outcome == "wrong"
    assert re.fullmatch(r"tile_tokens moves loss or gradients by [\d.e-]+", row.faults)


def test_what_does_not_end_is_our_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(kind: str, folder: Path, is_whole: bool) -> Any:
        while True:
            pass

    monkeypatch.setattr(proofs, "walk", endless)
    monkeypatch.setattr(conformance, "PROCESSOR_SECONDS", 1)
    row = walked("llama")
    assert row.outcome == "our fault"
    assert "no end within" in row.faults


def test_an_exception_after_training_is_our_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(pair: proofs.Pair) -> Any:
        raise KeyError("lost")

    monkeypatch.setattr(proofs, "OF_A_PAIR", (broken,))
    row = walked("llama")
    assert (row.outcome, row.faults) == ("our fault", "KeyError: 'lost'")


def test_a_page_says_what_it_was_told() -> None:
    rows = [
        Row("llama", (Finding("trained", "packed"), Finding("loss", "1e-07"))),
        Row("qwen3_5", (Finding("trained", "a document a pass"),), made_as="qwen3_5_text"),
        Row("mpt", (Finding("refused", "", "refused", "models of type mpt run an attention | of their own. Or so."),)),
        Row("blt", (Finding("trained", "packed"), Finding("merge", "", "not merged", "merge: no"))),
    ]
    text = page.page(rows)
    assert page.outcomes(text) == {"llama": "proven", "qwen3_5": "proven", "mpt": "refused", "blt": "not merged"}
    assert "| Qwen3.5 | *proven*, a document a pass, as qwen3_5_text |" in text
    assert "| *refused*, because models of type mpt run an attention / of their own |" in text
    assert "4 architectures: 2 proven, 1 not merged, 1 refused." in text
