"""What the ranks of a run must have in common before they train, and how it is said that they have not."""

import re
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qtune.distributed.ranks import Ranks
from qtune.errors import MachineError, RunFolderError

ROWS = re.compile(r"data\.(?:train|held_out|sources\.\d+\.train)")
SEEN_WITHIN_SECONDS = 5.0  # chosen: NFS asks the server for a name that nobody has asked for, other disks may lag
ASK_SECONDS = 0.1
TOKEN = ".shared-"  # how the file begins that rank 0 puts where all should see it


def names_rows(field: str) -> bool:
    """Whether a setting says where rows lie; their content is hashed."""
    return ROWS.fullmatch(field) is not None


def refuse_unlike(ranks: Ranks, told: Mapping[str, Any]) -> None:
    """Raises MachineError where `told`, JSON by field, is not the same on all ranks: by field, and who has what."""
    of_all = ranks.gather(dict(told))
    told_by_any = dict.fromkeys(name for each in of_all for name in each)
    fields = [each for each in told_by_any if each != "model.base" and not names_rows(each)]  # may lie elsewhere
    unlike = [field for field in fields if any(each.get(field) != of_all[0].get(field) for each in of_all)]
    if unlike:
        lines = ["The ranks of this run do not have the same, so they would not train one adapter."]
        lines += [f"  {field}: {_who_has_what(ranks, [each.get(field) for each in of_all])}" for field in unlike]
        lines.append("Start all with the same recipe, rows, base and versions.")
        raise MachineError("\n".join(lines))


def _who_has_what(ranks: Ranks, values: Sequence[Any]) -> str:
    ranks_by_value: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        ranks_by_value.setdefault(shown(value), []).append(ranks.name(rank))
    return "; ".join(f"{value} on {', '.join(names)}" for value, names in ranks_by_value.items())


def shown(value: Any) -> str:
    """A setting or a hash, as a sentence has it."""
    if isinstance(value, str):
        return f'"{value[:12]}..."' if len(value) == 64 else f'"{value}"'
    return "unset" if value is None else str(value)


def refuse_unshared(ranks: Ranks, folder: Path) -> None:
    """Raises RunFolderError where a rank does not see in `folder` what rank 0 puts there."""
    if ranks.is_first:
        for left in folder.glob(f"{TOKEN}*"):  # by one that was killed just then
            left.unlink(missing_ok=True)
    if ranks.size == 1:
        return
    token = folder / f"{TOKEN}{ranks.broadcast(secrets.token_hex(8))}"
    if ranks.is_first:
        token.touch()
    ranks.gather("it is there")
    sees = ranks.gather(_is_seen(token))
    if ranks.is_first:
        token.unlink()
    blind = [ranks.name(rank) for rank, is_seen in enumerate(sees) if not is_seen]
    if blind:
        raise RunFolderError(
            f"{folder}: {', '.join(blind)} cannot see what {ranks.name(0)} writes there. All ranks must see one run"
            " folder: name an --output on a disk that all machines have, such as a network's."
        )


def _is_seen(token: Path) -> bool:
    until = time.monotonic() + SEEN_WITHIN_SECONDS
    while not token.exists() and time.monotonic() < until:
        time.sleep(ASK_SECONDS)
    return token.exists()
