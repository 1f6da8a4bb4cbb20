"""Sizes of cards by name, as people write it: no more than torch finds there, and asked about where it is unclear."""

import pytest

from qtune import gpu_models
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


@pytest.mark.parametrize(
    ("gigabytes", "cards"),  # what NVIDIA sells with so many, written down a second time, the other way round
    [
        (6, "2060, 3050, 3060 Laptop, 4050 Laptop, A2000"),
        (
            8,
            "2060 Super, 2070, 2070 Super, 2080, 2080 Super, 3050, 3060, 3060 Ti, 3070, 3070 Laptop, 3070 Ti,"
            " 3070 Ti Laptop, 3080 Laptop, 4060, 4060 Laptop, 4060 Ti, 4070 Laptop, 5050, 5060, 5060 Laptop, 5060 Ti,"
            " 5070 Laptop",
        ),
        (10, "3080"),
        (11, "2080 Ti"),
        (12, "2060, 3060, 3080, 3080 Ti, 4070, 4070 Super, 4070 Ti, 4080 Laptop, 5070, 5070 Ti Laptop, A2000"),
        (
            16,
            "3080 Laptop, 3080 Ti Laptop, 4060 Ti, 4070 Ti Super, 4080, 4080 Super, 4090 Laptop, 5060 Ti, 5070 Ti,"
            " 5080, 5080 Laptop, A4000, P100, T4, V100",
        ),
        (20, "4000 Ada, A4500"),
        (24, "3090, 3090 Ti, 4090, 4500 Ada, 5090 Laptop, A10, A10G, A30, A5000, L4, TITAN RTX"),
        (32, "5000 Ada, 5090, V100"),
        (40, "A100"),
        (48, "6000 Ada, A40, A6000, L40, L40S"),
        (80, "A100, H100"),
        (94, "H100"),
        (96, "PRO 6000"),
        (141, "H200"),
    ],
)
def test_a_card_has_what_it_is_sold_with(gigabytes: int, cards: str) -> None:
    """One that is written too large has a run planned that ends out of memory."""
    sold = sorted(card.removeprefix("RTX ") for card, sizes in MEMORY_GB.items() if gigabytes in sizes)
    assert ", ".join(sold) == cards


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


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("RTX 5090 Laptop", (12, 0)),
        ("RTX PRO 6000", (12, 0)),
        ("RTX 5000 Ada", (8, 9)),
        ("RTX 4060 Ti", (8, 9)),
        ("L40S", (8, 9)),
        ("RTX A6000", (8, 6)),
        ("A10G", (8, 6)),
        ("A100", (8, 0)),
        ("H200", (9, 0)),
        ("RTX 2060", (7, 5)),
        ("V100", (7, 0)),
    ],
)
def test_every_card_has_a_capability(name: str, capability: tuple[int, int]) -> None:
    assert gpu_models.capability_of(name) == capability
    assert all(gpu_models.capability_of(each) for each in gpu_models.MEMORY_GB)
