#!/usr/bin/env python3
"""Write the code sample data: recipes/data/code_train.jsonl and code_held_out.jsonl.

    scripts/build_code_data.py                        the two files of the demo
    scripts/build_code_data.py --development FOLDER   instead of them, code_development.jsonl in FOLDER

The task is code for one particular library. `Shelf` is a list of books, made for this project, so that no base can know
it: `shelf.over("price", 30).total("pages")`. A row asks for a function in words, and its answer is two lines of Python.

What is held out is *new*: every pairing of a step (`over` the price) with an end (`total` of the pages) that is asked
for there occurs in no training row, nor does any of the functions' names, which are pairings of a verb and a noun, and
the sentences around them are others. Every word of a name and every call, alone, is trained on. Each held-out row
brings its tests, with the library in front: random books, some of them right beside the number that was asked for, so
that code which is nearly right fails.

A score that is looked at while choosing is flattered by the choice. So whoever changes the training rows or the recipe
looks at the development rows, which have pairings, sentences and names of their own, and at the held-out rows once,
when all is settled:

    qtune run code --demo --set data.held_out=FOLDER/code_development.jsonl
"""

import argparse
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import sample_rows

LIBRARY = """\
class Shelf(list):
    def over(self, key, n): return Shelf(book for book in self if book[key] > n)
    def under(self, key, n): return Shelf(book for book in self if book[key] < n)
    def most(self, key, n): return Shelf(sorted(self, key=lambda book: -book[key])[:n])
    def least(self, key, n): return Shelf(sorted(self, key=lambda book: book[key])[:n])
    def total(self, key): return sum(book[key] for book in self)
    def best(self, key): return max((book[key] for book in self), default=0)
    def count(self): return len(self)
def shelf(*books): return Shelf(dict(zip(("price", "pages", "stock", "weight", "age"), book)) for book in books)
"""
KEYS = ("price", "pages", "stock", "weight", "age")

# How each is said: as a noun, and as an order.
STEPS = {
    "over": ("the books with {key} over {n}", "books whose {key} is more than {n}"),
    "under": ("the books with {key} under {n}", "books whose {key} is less than {n}"),
    "most": ("the {n} books of most {key}", "the {n} books with the highest {key}"),
    "least": ("the {n} books of least {key}", "the {n} books with the lowest {key}"),
}
ENDS = {
    "total": ("the total {key}", "add up the {key}"),
    "best": ("the best {key}", "take the largest {key}"),
    "count": ("the count", "count them"),
}

VERBS = "pick find get tell read check draw note mark set form state use run hold bring"
NOUNS = "value result number figure part item fact score report answer line case thing point row out"


def names(*quarters: int) -> tuple[str, ...]:
    """Of all pairs of a verb and a noun those in the `quarters` (0 to 3), in each of which every word occurs."""
    pairs = itertools.product(enumerate(VERBS.split()), enumerate(NOUNS.split()))
    return tuple(f"{verb}_{noun}" for (i, verb), (j, noun) in pairs if (i + j) % 4 in quarters)


@dataclass(frozen=True)
class Part:
    """How the rows of one file ask: sentences around a noun, sentences around an order, and names of functions."""

    seed: int
    rows: int
    with_tests: bool
    nouns: tuple[str, ...]
    orders: tuple[str, ...]
    names: tuple[str, ...]


TRAIN = Part(
    seed=1,
    rows=1550,
    with_tests=False,
    nouns=(
        "Write {name}(shelf): {end} of {step}.",
        "Define {name}. Of {step} it returns {end}.",
        "Given a shelf, {name} returns {end} of {step}.",
        "Make {name} for {end} of {step}.",
        "What is {end} of {step}? Let {name} say it.",
        "A function {name} shall find {end} of {step}.",
        "We want {end} of {step}, so write {name}(shelf).",
        "Here {name}(shelf) has to return {end} of {step}.",
        "{name}: {end} of {step}.",
        "{name}(shelf) is {end} of {step}.",
        "When called, {name} returns {end} of {step}.",
        "From a shelf take {end} of {step} in {name}.",
        "Someone asks {name} about {end} of {step}.",
        "To learn {end} of {step}, one calls {name}. Write it.",
        "How do I get {end} of {step}? By {name}, so write that.",
        "Return {end} of {step} from {name}.",
        "Python with {name} in it: out comes {end} of {step}.",
        "There is no {name} yet. Its result is {end} of {step}.",
    ),
    orders=(
        "Write {name}(shelf): keep {step}, then {end}.",
        "Define {name}. It must keep {step} and {end}.",
        "In {name}, {end} after you keep {step}.",
        "{name}: keep {step} and {end}.",
        "When {name} is called, keep {step} before you {end}.",
        "Keep {step}, {end}, and name that {name}.",
        "How is {name} done? To begin with keep {step}, finally {end}.",
        "Here is what {name} does: keep {step}; {end}.",
        "From a shelf {name} has to keep {step}, and of those {end}.",
        "To write is {name}. If you keep {step}, you can {end}.",
    ),
    names=names(0, 1),
)
DEVELOPMENT = Part(
    seed=2,
    rows=160,
    with_tests=True,
    nouns=("I need a function {name} that gives {end} of {step}.", "Code for {name}, please: {end} of {step}."),
    orders=("Please make {name}: from a shelf keep {step} and then {end}.",),
    names=names(2),
)
HELD_OUT = Part(
    seed=3,
    rows=160,
    with_tests=True,
    nouns=(
        "Could you code {name}? It gives back {end} of {step}.",
        "Show me {name}, a function for {end} of {step}.",
        "My program lacks {name}: it should know {end} of {step}.",
        "For {end} of {step} there should be a function called {name}.",
    ),
    orders=(
        "Let us have {name}, which will keep {step} and {end}.",
        "Complete {name}: first keep {step}, next {end}.",
        "Your job is {name}: keep {step}, after which you {end}.",
    ),
    names=names(3),
)


@dataclass(frozen=True)
class Task:
    """A step over a shelf and what is taken of it; `end_key` is empty for a count."""

    step: str
    key: str
    end: str
    end_key: str

    @property
    def numbers(self) -> range:
        """Which to ask for: of books up to 100, more than one may be over or under the number."""
        return range(11, 99) if self.step in ("over", "under") else range(2, 10)


def tasks() -> Iterator[Task]:
    """Every one whose result depends on all of it: the count of the 5 best books is 5, whatever best means."""
    for step in STEPS:
        for key in KEYS:
            if step in ("over", "under"):
                yield Task(step, key, "count", "")
            yield from (Task(step, key, "total", end_key) for end_key in KEYS)
            yield from (Task(step, key, "best", end_key) for end_key in KEYS if end_key != key)


def row(task: Task, part: Part, rng: random.Random) -> dict[str, str]:
    """One question for the task, asked as the part asks, its answer, and its tests where the part has them."""
    name, n = rng.choice(part.names), rng.choice(task.numbers)
    wording, sentence = rng.choice([(0, noun) for noun in part.nouns] + [(1, order) for order in part.orders])
    step, end = STEPS[task.step][wording].format(key=task.key, n=n), ENDS[task.end][wording].format(key=task.end_key)
    question = sentence.format(name=name, step=step, end=end)
    argument = f'"{task.end_key}"' if task.end_key else ""
    answer = f'def {name}(shelf):\n    return shelf.{task.step}("{task.key}", {n}).{task.end}({argument})'
    return {"question": question, "answer": answer} | ({"tests": tests(task, name, n, rng)} if part.with_tests else {})


def tests(task: Task, name: str, n: int, rng: random.Random) -> str:
    """The library and three asserts, the last on a shelf without books; code that is nearly right fails one of them."""
    shelves: list[list[tuple[int, ...]]] = []
    while not all(any(expected(task, n, s) != expected(*wrong, s) for s in shelves) for wrong in near_misses(task, n)):
        shelves = [books(task, n, rng) for _ in range(2)]
    asserts = [f"assert {name}(shelf({str(shelf)[1:-1]})) == {expected(task, n, shelf)}" for shelf in shelves]
    return LIBRARY + "\n".join([*asserts, f"assert {name}(Shelf()) == 0"])


def near_misses(task: Task, n: int) -> Iterator[tuple[Task, int]]:
    """The number, one call or one key is another."""
    yield from ((task, other) for other in (n - 10, n - 1, n + 1, n + 10) if other > 0)
    yield from ((replace(task, step=step), n) for step in STEPS if step != task.step)
    yield from ((replace(task, key=key), n) for key in KEYS if key != task.key)
    if task.end == "count":
        return
    yield replace(task, end="best" if task.end == "total" else "total"), n
    yield from ((replace(task, end_key=key), n) for key in KEYS if key != task.end_key)
    if task.key != task.end_key:
        yield replace(task, key=task.end_key, end_key=task.key), n


def books(task: Task, n: int, rng: random.Random) -> list[tuple[int, ...]]:
    """Ten books of random figures, with no figure of one kind twice; three are at the number and beside it."""
    columns = {key: rng.sample(range(1, 101), 10) for key in KEYS}
    others = [value for value in range(1, 101) if abs(value - n) > 1]
    columns[task.key] = [n - 1, n, n + 1, *rng.sample(others, 7)]
    rng.shuffle(columns[task.key])
    return list(zip(*columns.values(), strict=True))


def expected(task: Task, n: int, shelf: list[tuple[int, ...]]) -> int:
    """What the function has to return, worked out without the library."""
    figures = [dict(zip(KEYS, book, strict=True)) for book in shelf]
    if task.step in ("over", "under"):
        kept = [book for book in figures if (book[task.key] > n if task.step == "over" else book[task.key] < n)]
    else:
        kept = sorted(figures, key=lambda book: book[task.key], reverse=task.step == "most")[:n]
    if task.end == "count":
        return len(kept)
    values = [book[task.end_key] for book in kept]
    return sum(values) if task.end == "total" else max(values, default=0)


def shares() -> tuple[list[Task], list[Task], list[Task]]:
    """The tasks to train on, to develop on and to hold out: of those with one end, a half and twice a quarter."""
    rng = random.Random(0)
    train: list[Task] = []
    development: list[Task] = []
    held_out: list[Task] = []
    for end in ENDS:
        same_end = [task for task in tasks() if task.end == end]
        rng.shuffle(same_end)
        quarter = len(same_end) // 4
        development += same_end[:quarter]
        train += same_end[quarter:-quarter]
        held_out += same_end[-quarter:]
    return train, development, held_out


def rows() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training rows and held-out rows."""
    train, _, held_out = shares()
    return distinct(train, TRAIN), distinct(held_out, HELD_OUT)


def development() -> list[dict[str, str]]:
    """The rows to look at while anything is still to be chosen."""
    return distinct(shares()[1], DEVELOPMENT)


def distinct(among: list[Task], part: Part) -> list[dict[str, str]]:
    """The rows of the part, no question twice, and as many of each task as of every other."""
    rng = random.Random(part.seed)
    found: dict[str, dict[str, str]] = {}
    for task in itertools.cycle(among):
        made = row(task, part, rng)
        found.setdefault(made["question"], made)
        if len(found) == part.rows:
            return list(found.values())
    raise AssertionError("the cycle has no end")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the sample data of the code demo.")
    parser.add_argument("--development", type=Path, metavar="FOLDER", help="write the rows to develop on there, alone")
    folder: Path | None = parser.parse_args().development
    if folder is None:
        sample_rows.write("code", *rows())
    else:
        folder.mkdir(parents=True, exist_ok=True)
        sample_rows.write_to(folder / "code_development.jsonl", development())


if __name__ == "__main__":
    main()
