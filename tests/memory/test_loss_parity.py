"""Ten steps over packs are ten steps over single documents, whatever mixes the tokens."""

import pytest
from loss_parity import both

from qtune.memory.techniques import Techniques

ROUNDING = 1e-6  # of a loss of six nats: twice the unit of float32
OTHERS = (
    "keywords lost",
    "mamba",
    "gated recurrence",
    "lightning attention",
    "delta attention",
    "falcon",
    "mistral",
    "qwen3 moe",
)


@pytest.mark.parametrize(
    "kind",
    [
        "gated delta net",
        "mamba 2",
        "convolution",
        "bloom",
        *(pytest.param(kind, marks=pytest.mark.long) for kind in OTHERS),  # seconds each
    ],
)
def test_the_loss_of_every_step_is_that_of_single_documents_in_float64(kind: str) -> None:
    packed, by_hand = both(kind, Techniques(recomputed_layers=2))
    assert packed == pytest.approx(by_hand, rel=ROUNDING)
    assert by_hand[9] < by_hand[0] - 1e-3  # of the same pack: the adapter learns
