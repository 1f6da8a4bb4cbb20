"""The ranks that train together, as far as a plan is concerned: how many, and how long they take to hand each other
bytes.

Calls are those of `distributed.ranks` and of layers in parts: of N ranks each sends N - 1 of N parts of what is summed,
twice (Patarasuk and Yuan 2009), and of what is gathered once. Nothing of it was measured on cards; between processes on
one machine the tests hold it against what they take.
"""

from dataclasses import dataclass

from qtune.units import parse_bytes

REACHED_FRACTION = 0.8  # chosen, not measured: of what a maker says, what is left beside headers and waiting


@dataclass(frozen=True)
class Link:
    """What brings each rank `bytes_per_second` while all are sent to, and takes `seconds` for a call of no bytes."""

    name: str
    bytes_per_second: float
    seconds: float

    @property
    def joins_machines(self) -> bool:
        """Whether it is a network, so that those it joins need not share a host's memory."""
        return self.name.endswith("gbe")


def _published(name: str, bytes_per_second: float, seconds: float) -> Link:
    return Link(name, REACHED_FRACTION * bytes_per_second, seconds)


CALL_SECONDS = 5e-5  # chosen, not measured: of NCCL on one machine; of a switch and two stacks of TCP four times that
LINKS = {
    link.name: link
    for link in (
        _published("nvlink4", 450e9, CALL_SECONDS),  # H100 SXM: 900 GB/s both ways (NVIDIA H100 data sheet)
        _published("nvlink3", 56.25e9, CALL_SECONDS),  # the bridge of two RTX 3090: 112.5 GB/s both ways (GA102 paper)
        # 16 lanes of 16 GT/s carry 31.5 GB/s; GeForce cards reach each other by way of host memory, there and back
        _published("pcie4", 31.5e9 / 2, CALL_SECONDS),
        _published("pcie3", 15.75e9 / 2, CALL_SECONDS),  # half of that
        _published("100gbe", 12.5e9, 4 * CALL_SECONDS),
        _published("10gbe", 1.25e9, 4 * CALL_SECONDS),
        _published("1gbe", 0.125e9, 4 * CALL_SECONDS),
    )
}
USUAL = LINKS["pcie4"]  # of cards in one machine, where nobody says otherwise


@dataclass(frozen=True)
class World:
    """`size` ranks, of which `on_a_machine` share a host's memory, and the slowest link between any two of them."""

    size: int = 1
    on_a_machine: int = 1
    link: Link = USUAL

    @property
    def are_several(self) -> bool:
        return self.size > 1

    @property
    def sent_fraction(self) -> float:
        """Of a buffer, what each rank sends to have it whole everywhere."""
        return (self.size - 1) / self.size

    def sum_seconds(self, size_bytes: int) -> float:
        """For the sum over all ranks of a buffer of that size."""
        if not self.are_several:
            return 0.0
        return 2 * (self.link.seconds + self.sent_fraction * size_bytes / self.link.bytes_per_second)

    def pass_seconds(self, forward: float, backward: float, layers: int, size_bytes: int) -> float:
        """Of a pass whose arithmetic takes so long, and whose layers, of that size in all, lie in parts: each comes
        while the one before it computes, and the first when there is nothing to compute yet."""
        gathering = layers * self.link.seconds + self.sent_fraction * size_bytes / self.link.bytes_per_second
        return max(forward, gathering) + max(backward, gathering) + gathering / layers

    def share(self, packs: int) -> int:
        """Of a step's packs, those of the rank that has most."""
        return -(-packs // self.size)


ALONE = World()


def link_of(text: str) -> Link:
    """The link of that name, or one that brings so many bytes a second. Raises ValueError with what would do."""
    named = LINKS.get(text.strip().lower())
    if named is not None:
        return named
    size = parse_bytes(text.strip().removesuffix("/s"))
    if size is None:
        raise ValueError(f"must be one of {', '.join(LINKS)}, or bytes a second such as 5GB/s, and is {text}")
    return Link("a link", float(size), CALL_SECONDS)
