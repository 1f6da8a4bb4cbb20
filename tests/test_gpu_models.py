"""Sizes of cards by name, as people write it: no more than torch finds there, and asked about where it is unclear."""

import pytest

from qtune.gpu_models import MEMORY_GB, memory_of
from qtune.units import GIB


@pytest.mark.parametrize(
    ("text", "reported"),  # GiB, in messages of torch about memory that ran out
    [
        ("RTX 4090", 23.65),
        ("rtx4090", 23.65),
        ("NVIDIA GeForce RTX 4090", 23.65),
        ("4090", 23.65),
        ("RTX 5090", 31.37),
        ("RTX 3060 12GB", 11.75),
        ("3060 12g", 11.75),
        ("RTX-3070", 7.78),
        ("2060 6 GB", 5.79),
        ("RTX 2080 Ti", 10.76),
        ("T4", 14.56),
        ("Tesla T4", 14.56),
        ("L40S", 44.53),
        ("H200", 139.8),
    ],
)
def test_a_card_has_a_little_less_than_its_maker_says(text: str, reported: float) -> None:
    assert 0.96 * reported * GIB < memory_of(text) <= reported * GIB


def test_names_that_hold_numbers_are_not_sizes() -> None:
    assert memory_of("A10G") == memory_of("A10") == memory_of("L4")
    assert memory_of("A100-80GB") == memory_of("NVIDIA A100-SXM4-80GB") > memory_of("A100 40GB") > memory_of("A10")
    assert memory_of("RTX 4070 Ti Super") > memory_of("4070 ti") == memory_of("4070")
    assert memory_of("8GiB") == 8 * GIB == memory_of(" 8 G")
    assert all(memory_of(f"{card} {size}GB") < size * GIB for card, sizes in MEMORY_GB.items() for size in sizes)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("8", "must be a size with its unit, and is 8. Did you mean 8GiB?"),
        ("RTX 3060", "is RTX 3060, which comes with 8 GB and 12 GB. Say which, as RTX 3060 12GB"),
        ("4060ti", "is RTX 4060 Ti, which comes with 8 GB and 16 GB. Say which, as RTX 4060 Ti 16GB"),
        ("A100", "is A100, which comes with 40 GB and 80 GB. Say which, as A100 80GB"),
        ("RTX 4090 12GB", "is RTX 4090 with 12 GB, and that comes with 24 GB"),
        ("RTX 4900", "must be a size such as 8GiB or a card such as RTX 4090, and is RTX 4900. Did you mean RTX 4090?"),
        ("plenty", "must be a size such as 8GiB or a card such as RTX 4090, and is plenty"),
        ("", "must be a size such as 8GiB or a card such as RTX 4090, and is "),
    ],
)
def test_what_is_unclear_is_asked_about(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=r"^(must be|is) ") as found:
        memory_of(text)
    assert str(found.value) == says
