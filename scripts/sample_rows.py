"""Where the scripts that make sample data put it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent.parent / "recipes" / "data"


def write(domain: str, train: Sequence[Mapping[str, Any]], held_out: Sequence[Mapping[str, Any]]) -> None:
    """Write recipes/data/DOMAIN_train.jsonl and DOMAIN_held_out.jsonl, a row a line."""
    write_to(DATA / f"{domain}_train.jsonl", train)
    write_to(DATA / f"{domain}_held_out.jsonl", held_out)


def write_to(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one file, a row a line, and say so."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path.name}: {len(rows)} rows")
