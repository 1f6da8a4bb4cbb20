#!/usr/bin/env python3
"""Write the code sample data: recipes/data/code_train.jsonl and code_held_out.jsonl.

The task is code for one particular library. `Shelf` is a list of books, made for this project, so that no base can know
it: `shelf.over("price", 30).total("pages")`. A row asks for a function in words, and its answer is two lines of Python.

What is held out is *new*: every pairing of a step (`over` the price) with an end (`total` of the pages) that is asked
for there occurs in no training row, and the sentences around them are others. Each held-out row brings its tests, with
the library in front: random books, some of them right beside the number that was asked for, so that code which is
nearly right fails.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import sample_rows

SEED, TRAIN_ROWS, HELD_OUT_ROWS = 0, 1100, 160

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
NAMES = ("pick", "sum_up", "look", "find", "value", "answer", "result", "check", "number", "report")

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
NOUNS_TRAIN = (
    "Write {name}(shelf): {end} of {step}.",
    "Define {name}. Of {step} it returns {end}.",
    "Given a shelf, {name} returns {end} of {step}.",
    "Make {name} for {end} of {step}.",
    "What is {end} of {step}? Let {name} say it.",
    "A function {name} shall find {end} of {step}.",
    "We want {end} of {step}, so write {name}(shelf).",
)
ORDERS_TRAIN = (
    "Write {name}(shelf): keep {step}, then {end}.",
    "Define {name}. It must keep {step} and {end}.",
    "In {name}, {end} after you keep {step}.",
)
NOUNS_HELD_OUT = ("I need a function {name} that gives {end} of {step}.", "Code for {name}, please: {end} of {step}.")
ORDERS_HELD_OUT = ("Please make {name}: from a shelf keep {step} and then {end}.",)

Sentences = tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True)
class Task:
    """A step over a shelf and what is taken of it; `end_key` is empty for a count."""

    step: str
    key: str
    end: str
    end_key: str

    @property
    def numbers(self) -> range:
        return range(11, 100) if self.step in ("over", "under") else range(2, 10)


def tasks() -> Iterator[Task]:
    """Every one whose result depends on all of it: the count of the 5 best books is 5, whatever best means."""
    for step in STEPS:
        for key in KEYS:
            if step in ("over", "under"):
                yield Task(step, key, "count", "")
            yield from (Task(step, key, "total", end_key) for end_key in KEYS)
            yield from (Task(step, key, "best", end_key) for end_key in KEYS if end_key != key)


def row(task: Task, sentences: Sentences, rng: random.Random, with_tests: bool) -> dict[str, str]:
    """One question for the task in one of the `sentences`, its answer, and its tests."""
    name, n, wording = rng.choice(NAMES), rng.choice(task.numbers), rng.randrange(2)
    step, end = STEPS[task.step][wording].format(key=task.key, n=n), ENDS[task.end][wording].format(key=task.end_key)
    question = rng.choice(sentences[wording]).format(name=name, step=step, end=end)
    argument = f'"{task.end_key}"' if task.end_key else ""
    answer = f'def {name}(shelf):\n    return shelf.{task.step}("{task.key}", {n}).{task.end}({argument})'
    return {"question": question, "answer": answer} | ({"tests": tests(task, name, n, rng)} if with_tests else {})


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


def rows() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training rows over two thirds of the tasks with each end, held-out rows over the others; no question twice."""
    rng = random.Random(SEED)
    by_end = [[task for task in tasks() if task.end == end] for end in ENDS]
    train_tasks, held_out_tasks = [], []
    for same_end in by_end:
        rng.shuffle(same_end)
        third = len(same_end) // 3
        held_out_tasks += same_end[:third]
        train_tasks += same_end[third:]
    train = distinct(train_tasks, TRAIN_ROWS, (NOUNS_TRAIN, ORDERS_TRAIN), rng, with_tests=False)
    held_out = distinct(held_out_tasks, HELD_OUT_ROWS, (NOUNS_HELD_OUT, ORDERS_HELD_OUT), rng, with_tests=True)
    return train, held_out


def distinct(
    among: list[Task], count: int, sentences: Sentences, rng: random.Random, with_tests: bool
) -> list[dict[str, str]]:
    """`count` rows, as many of each task as of every other."""
    found: dict[str, dict[str, str]] = {}
    for task in itertools.cycle(among):
        made = row(task, sentences, rng, with_tests)
        found.setdefault(made["question"], made)
        if len(found) == count:
            return list(found.values())
    raise AssertionError("the cycle has no end")


if __name__ == "__main__":
    sample_rows.write("code", *rows())
