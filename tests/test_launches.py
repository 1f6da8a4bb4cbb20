"""What a decoder layer launches and moves on a card, held under ceilings: a pass over memory that is added is seen."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from count_launches import of_a_layer  # noqa: E402

MIB = 1024**2
CEILINGS = {  # kernels, MiB moved and MiB kept: as counted, with 1 % to spare
    ("none", "1"): (132, 4_747, 217),
    ("none", "4"): (236, 7_516, 361),
    ("recompute, tiles", "1"): (302, 11_742, 16),
}


@pytest.mark.parametrize(("techniques", "documents"), CEILINGS)
def test_a_layer_stays_under_its_ceilings(techniques: str, documents: str) -> None:
    launches, moved, kept = CEILINGS[techniques, documents]
    layer = of_a_layer(techniques, documents)
    assert layer.launches <= 1.01 * launches, (layer.forward.names, layer.backward.names)
    assert layer.bytes <= 1.01 * moved * MIB
    assert layer.kept_bytes <= 1.01 * kept * MIB
