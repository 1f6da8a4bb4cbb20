"""B1: a recipe with anything in it is right, or a list of sentences that name a line or a key."""

import random
import re
from collections.abc import Iterator
from pathlib import Path

from test_load import mutated

from fault_lab.workshop import Workshop, isolated, qtune
from qtune.data.prepare import prepare
from qtune.errors import QtuneError, RecipeError
from qtune.model import base
from qtune.model.tokenizer import load_tokenizer
from qtune.recipe.load import load

WHAT = "recipes with characters, keys, values and lines changed"
HANGS_SECONDS = 5.0
CHECKED_EVERY = 200  # so many go through the whole of `qtune check`, which makes a plan
DEMO = """
[demo.data]
train = "rows.jsonl"
[demo.train]
epochs = 1
"""


def run(cases: int, seed: int, folder: Path) -> Iterator[str | None]:
    shop = Workshop.open(folder, seed)
    good = shop.recipe("good").read_text() + DEMO
    base.quiet_libraries()

    def judge(case: int) -> str | None:
        rng = random.Random(f"{seed} {case}")
        text = mutated(rng, good)
        (folder / "mutated.toml").write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
        if case % CHECKED_EVERY == 0:
            fault = _fault_of_check(folder)
        else:
            fault = _fault_of_load(folder / "mutated.toml", text, case % 2 == 1)
        return None if fault is None else f"{fault}\n{text}"

    yield from isolated(cases, judge, HANGS_SECONDS)


def _fault_of_load(path: Path, text: str, demo: bool) -> str | None:
    try:
        recipe = load(path, (), demo)
    except RecipeError as refusal:
        return next((fault for fault in refusal.faults if not _is_placed(fault, path, text)), None)
    try:
        prepare(recipe, load_tokenizer(recipe.model))
    except QtuneError as refusal:
        return None if len(str(refusal)) > 20 else f"it said no more than {refusal}"
    return None


def _is_placed(fault: str, path: Path, text: str) -> bool:
    """Whether a fault begins with the file and a line that is in it, and is one line itself."""
    found = re.match(rf"{re.escape(str(path))}:(?:(\d+):)? \S", fault)
    last = len(text.splitlines()) + 1
    return found is not None and "\n" not in fault and (found[1] is None or 1 <= int(found[1]) <= last)


def _fault_of_check(folder: Path) -> str | None:
    ended = qtune("check", folder / "mutated.toml")
    is_fine = ended.code in (0, 2, 3) and "Traceback" not in ended.text and "fault is ours" not in ended.text
    return None if is_fine else f"qtune check: exit {ended.code}, {ended.last_line}"
