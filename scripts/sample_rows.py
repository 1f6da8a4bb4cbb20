"""Where the scripts that make sample data put it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent.parent / "recipes" / "data"


def write(domain: str, train: Sequence[Mapping[str, Any]], held_out: Sequence[Mapping[str, Any]]) -> None:
    """Write recipes/data/DOMAIN_train.jsonl and DOMAIN_held_out.jsonl, a row a line."""
    for part, rows in (("train", train), ("held_out", held_out)):
        path = DATA / f"{domain}_{part}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{path.name}: {len(rows)} rows")
