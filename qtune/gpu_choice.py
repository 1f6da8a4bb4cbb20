"""What a process of NVIDIA cards settles before torch is loaded: which of several it uses, and how memory is taken.

A run uses the card with most free memory, as the driver tells it. CUDA is not asked: to tell a card's free memory it
makes a context there, of some hundred MiB, and which cards it sees is settled for the whole process when it is first
called. `nvidia-smi` does neither, and comes with the driver.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qtune.distributed.launched import Launched
from qtune.errors import MachineError
from qtune.units import MIB, counted, format_bytes

VISIBLE = "CUDA_VISIBLE_DEVICES"
ON_WSL = "/usr/lib/wsl/lib/nvidia-smi"  # where Windows' driver puts it, which not every PATH has
FIELDS = "uuid,name,memory.total,memory.free,driver_version,compute_mode,display_active"
ANSWER_SECONDS = 20  # chosen: a driver without persistence wakes each card first, which takes a second or two
ALLOCATOR_SETTINGS = (
    "PYTORCH_CUDA_ALLOC_CONF",  # the older name, which every version of torch reads
    "PYTORCH_ALLOC_CONF",  # since torch 2.9
)
GROWING = "expandable_segments:True"
NATIVE_DRIVER = Path("/proc/driver/nvidia/version")  # NVIDIA's own on Linux; WSL2 has none, and refuses such mappings
SHARED = "Default"  # the compute mode in which a card takes any process that comes
ABOUT_AS_FREE = 0.8  # chosen: of the roomiest card's free memory; less, and it would need another plan
PROHIBITED = "Prohibited"  # the one in which a card takes no process

_why_narrowed: list[str] = []  # of this process, once `narrow_own_process` has chosen for it


@dataclass(frozen=True)
class DriverCard:
    """A card as the driver has it; bytes are None where it does not tell, as on a card that has the host's memory."""

    uuid: str
    name: str
    total_bytes: int | None
    free_bytes: int | None
    driver: str
    compute_mode: str
    has_display: bool

    @property
    def told(self) -> str:
        return f"{self.name} {format_bytes(self.free_bytes)}" if self.free_bytes is not None else self.name


def ask_driver() -> tuple[DriverCard, ...]:
    """Every card of this machine, in the driver's order; none where no NVIDIA driver is, or it does not answer."""
    program = shutil.which("nvidia-smi") or (ON_WSL if Path(ON_WSL).is_file() else None)
    if program is None:
        return ()
    asked = [program, f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            asked, capture_output=True, text=True, errors="replace", timeout=ANSWER_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return cards_in(answer.stdout) if answer.returncode == 0 else ()


def cards_in(answer: str) -> tuple[DriverCard, ...]:
    """The cards of an answer of nvidia-smi, a line each."""
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines()]
    return tuple(_card(row) for row in rows if len(row) == len(FIELDS.split(",")))


def _card(row: Sequence[str]) -> DriverCard:
    uuid, name, total, free, driver, mode, display = row
    return DriverCard(uuid, name, _bytes(total), _bytes(free), driver, mode, display == "Enabled")


def _bytes(mebibytes: str) -> int | None:
    return int(mebibytes) * MIB if mebibytes.isdigit() else None  # else [N/A]


def roomiest(cards: Sequence[DriverCard]) -> DriverCard:
    """The one with most free memory that takes processes at all; of several alike the first."""
    return max(cards, key=lambda card: (card.compute_mode != PROHIBITED, card.free_bytes or 0))


def alike(cards: Sequence[DriverCard]) -> list[DriverCard]:
    """The roomiest card, and those of its kind that are about as free."""
    best = roomiest(cards)
    free = (best.free_bytes or 0) * ABOUT_AS_FREE
    return [card for card in _usable(cards) if card.name == best.name and (card.free_bytes or 0) >= free] or [best]


def cards_to_use(count: int | None) -> tuple[str, ...]:
    """As CUDA_VISIBLE_DEVICES names them: the `count` roomiest cards, or for None all that are alike; none where the
    driver tells of no card. Of those that the user names there, the first `count`, or all.

    Raises MachineError where there are fewer.
    """
    cards = ask_driver()
    if not cards:
        return ()
    if VISIBLE in os.environ:
        whose, names = f"{VISIBLE} names", [name for name in os.environ[VISIBLE].split(",") if name not in ("", "-1")]
    else:
        taken = _roomiest_of(_usable(cards), count) if count else alike(cards)
        whose, names = "this machine has", [card.uuid for card in taken]
    if count is not None and 0 < len(names) < count:
        raise MachineError(f"--cards {count}: {whose} {len(names)}. Give --cards {len(names)}.")
    return tuple(names[:count])


def _usable(cards: Sequence[DriverCard]) -> list[DriverCard]:
    return [card for card in cards if card.compute_mode != PROHIBITED]


def narrow_own_process(launched: Launched | None = None) -> None:
    """For a process of our own, before torch is loaded: where CUDA would see several cards, have it see the roomiest,
    or each of several processes on this machine a card of its own.

    What the user says in CUDA_VISIBLE_DEVICES stands; of several cards named there each process takes one. Raises
    MachineError for more processes than cards.
    """
    if launched is not None:
        _take_one_of_several(launched)
        return
    cards = () if VISIBLE in os.environ else ask_driver()
    if len(cards) > 1:
        best = roomiest(cards)
        os.environ[VISIBLE] = best.uuid
        _why_narrowed[:] = [_why(best, cards)]


def _take_one_of_several(launched: Launched) -> None:
    """The card of this process: the one at its place among the roomiest, in the driver's order."""
    cards = _usable(ask_driver())
    named = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    if VISIBLE in os.environ and len(named) < 2:  # no card at all, or the launcher has given each process its own
        return
    names = named or [card.uuid for card in _roomiest_of(cards, launched.local_size)]
    if not names:
        return
    if len(names) < launched.local_size:
        raise MachineError(
            f"{launched.local_size} processes were started on this machine, which has {counted(len(names), 'card')}"
            f"{f' in {VISIBLE}' if named else ''}. Start one for each card."
        )
    os.environ[VISIBLE] = names[launched.local_rank]
    place = f"that of rank {launched.rank}, {launched.local_rank + 1} of {launched.local_size} on this machine"
    _why_narrowed[:] = [place]


def _roomiest_of(cards: Sequence[DriverCard], count: int) -> list[DriverCard]:
    """The `count` cards with most free memory, in the order they came."""
    taken = sorted(cards, key=lambda card: card.free_bytes or 0, reverse=True)[:count]
    return [card for card in cards if card in taken]


def let_segments_grow() -> None:
    """For a process of our own, before torch is loaded: have torch's allocator grow the segments that it has, where the
    driver can map memory so, rather than look for a hole as large as each new pack of documents asks for.

    What the user says in the environment stands.
    """
    if NATIVE_DRIVER.exists() and not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        os.environ[ALLOCATOR_SETTINGS[0]] = GROWING


def card_of(uuid: str) -> DriverCard | None:
    """The card that CUDA has by this uuid, as the driver has it now; None where it does not tell."""
    return next((card for card in ask_driver() if card.uuid.removeprefix("GPU-") == uuid), None)


def chosen(uuids: Sequence[str]) -> tuple[int, str]:
    """Which of the cards that CUDA sees, here by their uuids in its order, and why.

    Where the driver does not tell their memory, the first.
    """
    if len(uuids) == 1:
        is_given = VISIBLE in os.environ
        alone = f"the one that {VISIBLE} names" if is_given else "the only CUDA card"
        return 0, _why_narrowed[0] if _why_narrowed else alone
    by_uuid = {card.uuid.removeprefix("GPU-"): card for card in ask_driver()}
    cards = [by_uuid[uuid] for uuid in uuids if uuid in by_uuid]
    if len(cards) < len(uuids):
        return 0, f"the first of {len(uuids)} CUDA cards, whose free memory nvidia-smi does not tell"
    best = roomiest(cards)
    return cards.index(best), _why(best, cards)


def _why(best: DriverCard, cards: Sequence[DriverCard]) -> str:
    others = ", ".join(card.told for card in cards if card is not best)
    return f"most free memory of {len(cards)} cards; the others: {others}"
