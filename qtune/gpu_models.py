"""How much memory a card has, by its name: for plans for one that is not in this machine. Loads nothing heavy."""

import re
from dataclasses import dataclass
from difflib import get_close_matches

from qtune.units import GIB, parse_bytes

MEMORY_GB: dict[str, tuple[int, ...]] = {  # as NVIDIA's specifications have it; several where a name comes with several
    "RTX 5090": (32,),
    "RTX 5090 Laptop": (24,),
    "RTX 5080": (16,),
    "RTX 5080 Laptop": (16,),
    "RTX 5070 Ti": (16,),
    "RTX 5070 Ti Laptop": (12,),
    "RTX 5070": (12,),
    "RTX 5070 Laptop": (8,),
    "RTX 5060 Ti": (8, 16),
    "RTX 5060": (8,),
    "RTX 5060 Laptop": (8,),
    "RTX 5050": (8,),
    "RTX 4090": (24,),
    "RTX 4090 Laptop": (16,),
    "RTX 4080 Super": (16,),
    "RTX 4080": (16,),
    "RTX 4080 Laptop": (12,),
    "RTX 4070 Ti Super": (16,),
    "RTX 4070 Ti": (12,),
    "RTX 4070 Super": (12,),
    "RTX 4070": (12,),
    "RTX 4070 Laptop": (8,),
    "RTX 4060 Ti": (8, 16),
    "RTX 4060": (8,),
    "RTX 4060 Laptop": (8,),
    "RTX 4050 Laptop": (6,),
    "RTX 3090 Ti": (24,),
    "RTX 3090": (24,),
    "RTX 3080 Ti": (12,),
    "RTX 3080 Ti Laptop": (16,),
    "RTX 3080": (10, 12),
    "RTX 3080 Laptop": (8, 16),
    "RTX 3070 Ti": (8,),
    "RTX 3070 Ti Laptop": (8,),
    "RTX 3070": (8,),
    "RTX 3070 Laptop": (8,),
    "RTX 3060 Ti": (8,),
    "RTX 3060": (8, 12),
    "RTX 3060 Laptop": (6,),
    "RTX 3050": (6, 8),
    "RTX 2080 Ti": (11,),
    "RTX 2080 Super": (8,),
    "RTX 2080": (8,),
    "RTX 2070 Super": (8,),
    "RTX 2070": (8,),
    "RTX 2060 Super": (8,),
    "RTX 2060": (6, 12),
    "TITAN RTX": (24,),
    "RTX PRO 6000": (96,),
    "RTX 6000 Ada": (48,),
    "RTX 5000 Ada": (32,),
    "RTX 4500 Ada": (24,),
    "RTX 4000 Ada": (20,),
    "RTX A6000": (48,),
    "RTX A5000": (24,),
    "RTX A4500": (20,),
    "RTX A4000": (16,),
    "RTX A2000": (6, 12),
    "H200": (141,),
    "H100": (80, 94),
    "A100": (40, 80),
    "A40": (48,),
    "A30": (24,),
    "A10": (24,),
    "A10G": (24,),
    "L40S": (48,),
    "L40": (48,),
    "L4": (24,),
    "T4": (16,),
    "V100": (16, 32),
    "P100": (16,),
}
CAPABILITIES = (  # by how a card's name begins
    (r"RTX 40\d0|RTX \d000 Ada|RTX 4500 Ada|L4", (8, 9)),  # before RTX 50, as there is an RTX 5000 Ada
    (r"RTX 50\d0|RTX PRO", (12, 0)),
    (r"H[12]00", (9, 0)),
    (r"RTX 30\d0|RTX A|A40|A10G?$", (8, 6)),
    (r"A100|A30", (8, 0)),
    (r"RTX 20\d0|TITAN RTX|T4", (7, 5)),
    (r"V100", (7, 0)),
    (r"P100", (6, 0)),
)
WITH_ECC = ("A40", "A10", "A10G", "L40S", "L40", "L4", "T4")  # GDDR6 whose error correction is on: 1/16 of it
ECC_FRACTION = 1 / 16
KEPT_FRACTION, KEPT_BYTES = (
    0.03,
    GIB // 4,
)  # by the driver: torch reports 23.65 of 24 GiB (RTX 4090), 5.79 of 6 (RTX 2060)
MOST_CARDS = 1024  # chosen: more than anybody types by hand
FILLERS = re.compile(r"nvidia|geforce|tesla|quadro|gpu|generation|sxm\d?|pcie|hbm\de?|mobile(?=.)|[^a-z0-9]")


@dataclass(frozen=True)
class GpuModel:
    """A card to plan for: its name, what torch finds of memory on it, and CUDA's capability, where they are known."""

    bytes: int
    name: str = "a card"
    capability: tuple[int, int] | None = None


def memory_of(text: str) -> int:
    """Bytes of a size such as `8GiB`, or what torch finds on a card of that name, as `RTX 4090` or `A100 80GB`.

    Raises ValueError with what would do instead, as a clause.
    """
    return model_of(text).bytes


def model_of(text: str) -> GpuModel:
    """The card of that name, or one of which nothing but its memory is known. Raises ValueError as `memory_of` does."""
    if re.fullmatch(r"\s*\d{1,3}(\.\d+)?\s*", text):
        raise ValueError(f"must be a size with its unit, and is {text}. Did you mean {text.strip()}GiB?")
    named = re.fullmatch(r"(.*?)[\s_-]*(\d{1,3})\s*gi?b?", text.strip(), re.IGNORECASE)
    name, given = _card(text), None  # before sizes, as 4060ti would be 4,060 TiB
    if name is None and named and (name := _card(named[1])):
        given = int(named[2])
    if name is None and (size := parse_bytes(text)) is not None:
        return GpuModel(size)
    if name is None:
        near = get_close_matches(_plain(text), {_plain(card): card for card in MEMORY_GB}, n=1)
        hint = f". Did you mean {_card(near[0])}?" if near else ""
        raise ValueError(f"must be a size such as 8GiB or a card such as RTX 4090, and is {text}{hint}")
    return GpuModel(_found_on(name, _one_size(name, given)), name, capability_of(name))


def models_of(text: str) -> list[GpuModel]:
    """Several cards, as `2x24GiB`, `8GiB+16GiB` or `2xRTX-3090+RTX-4070`, each as `model_of` has it.

    Raises ValueError with what would do instead, as a clause.
    """
    models: list[GpuModel] = []
    for part in text.split("+"):
        counted = re.fullmatch(r"\s*(\d+)\s*[xX×]\s*(.+)", part)
        count, name = (int(counted[1]), counted[2]) if counted else (1, part)
        if not 1 <= count <= MOST_CARDS:
            raise ValueError(f"must be 1 to {MOST_CARDS} cards of a kind, and is {part.strip()}")
        models += count * [model_of(name)]
    return models


def capability_of(name: str) -> tuple[int, int]:
    """CUDA's compute capability of a card in the table (developer.nvidia.com/cuda-gpus)."""
    return next(capability for pattern, capability in CAPABILITIES if re.match(pattern, name))


def _one_size(name: str, given: int | None) -> int:
    sizes = MEMORY_GB[name]
    if given in sizes or (given is None and len(sizes) == 1):
        return given or sizes[0]
    each = " and ".join(f"{size} GB" for size in sizes)
    if given is None:
        raise ValueError(f"is {name}, which comes with {each}. Say which, as {name} {sizes[-1]}GB")
    raise ValueError(f"is {name} with {given} GB, and that comes with {each}")


def _found_on(name: str, gigabytes: int) -> int:
    """What is there of the memory that a maker names, which counts in GiB."""
    there = gigabytes * GIB * (1 - ECC_FRACTION if name in WITH_ECC else 1)
    return int(there - max(KEPT_FRACTION * there, KEPT_BYTES))


def _card(text: str) -> str | None:
    """The name in the table that `text` means, be it written rtx4090, RTX-4090 or 4090."""
    return next((card for card in MEMORY_GB if _plain(text) in (_plain(card), _plain(card).removeprefix("rtx"))), None)


def _plain(text: str) -> str:
    return FILLERS.sub("", text.lower())
