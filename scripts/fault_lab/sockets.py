"""S5: with everything on this machine, nothing is asked of any other."""

from collections.abc import Iterator
from pathlib import Path

from fault_lab import stage

WHAT = "no connection is tried when base and rows are local, be `kernels` installed or not"
VERBS = (
    ("check", "t.toml"),
    ("plan", "t.toml", "--device-memory", "8GiB"),
    ("run", "t.toml"),
    ("check", "t.toml", "--demo"),
    ("doctor", "--json"),
)


def run(cases: int, seed: int, folder: Path) -> Iterator[str | None]:
    """One verb a case, in turn from that of `seed` on."""
    workplace = stage.make_workplace(folder / "sockets")
    recipe = (workplace / "t.toml").read_text(encoding="utf-8")
    demo = '[demo.model]\nbase = "demo"\n[demo.data]\ntrain = "rows.jsonl"\n[demo.train]\nepochs = 1\n'
    (workplace / "t.toml").write_text(recipe + demo, encoding="utf-8")
    for case in range(cases):
        verb = VERBS[(seed + case) % len(VERBS)]
        output = ("--output", f"run-{case}") if verb[0] == "run" else ()
        yield judged(verb, stage.qtune(workplace, *verb, *output))


def judged(verb: tuple[str, ...], ended: stage.Ended) -> str | None:
    if ended.sockets:
        return f"qtune {' '.join(verb)} tried {'; '.join(ended.sockets[:3])}"
    if ended.status != 0 and verb[0] != "doctor":
        return f"qtune {' '.join(verb)} ended with {ended.status}: {ended.printed[-300:]}"
    return None
