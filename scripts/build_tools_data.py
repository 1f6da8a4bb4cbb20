#!/usr/bin/env python3
"""Write the sample data of tools: recipes/data/tools_train.jsonl and tools_held_out.jsonl.

The clerk of an invented shop has three of five tools in any row. Where a customer complains the answer is a call of
the tool for it, with the order that the customer names, or two calls where there are two orders; behind the result of a
call it is what that says; and where a customer only says hello or thanks, no call is due. So a model has to choose the
tool by reading the complaint, to copy the order, and to know when to call none.

Orders, articles and the frame around the complaint of a held-out row are in no training row, and half of the held-out
complaints, and all that is said without one, are worded as nothing is there. A tool that fits is always among the
three: what to do where it is missing is not in these data.
"""

import random
from typing import Any

import sample_rows
from build_support_data import ARTICLES, FRAMES, HELD_OUT_ARTICLES, HELD_OUT_FRAMES, HELD_OUT_ORDERS, RULES

SEED, TRAIN_ROWS, HELD_OUT_ROWS, TOOLS_IN_A_ROW = 0, 1200, 150, 3
NAMES = ("replace", "exchange", "search", "refund", "correct")  # in the order of RULES
SAID = (
    "Hello.",
    "Thank you.",
    "Good morning.",
    "Thank you very much.",
    "Hello, are you there?",
    "Good evening.",
    "I thank you for the help.",
    "You are very kind.",
)
HELD_OUT_SAID = ("Hello, good morning.", "Thank you for the help.", "Good evening, are you there?", "You are kind.")
REPLY = "How can I help?"
RESULTS = ("done", "too late", "not found", "wait")


def tool(name: str) -> dict[str, Any]:
    """Short, as three of them stand in every row; qtune makes a JSON schema of it."""
    return {"name": name, "parameters": {"order": {"type": "string"}}}


def call(name: str, order: int) -> dict[str, Any]:
    return {"function": {"name": name, "arguments": {"order": str(order)}}}


def complaint(rng: random.Random, number: int, orders: list[int], is_held_out: bool, is_new: bool) -> str:
    """What a customer writes of these orders, for the rule of this number."""
    rule = RULES[number]
    article = rng.choice((HELD_OUT_ARTICLES if is_held_out else ARTICLES).split())
    said = rng.choice(rule.new_complaints if is_new else rule.complaints).format(article)
    frame = rng.choice(HELD_OUT_FRAMES if is_held_out else FRAMES)
    sentences = frame.format(order=" and ".join(map(str, orders)), complaint=said).split(". ")
    return ". ".join(part[:1].upper() + part[1:] for part in sentences)


def row(rng: random.Random, number: int, is_held_out: bool) -> dict[str, Any]:
    """Of ten rows six call once and one twice, one has its result already, and two have nothing to call for."""
    rule, turn = number % len(RULES), number // len(RULES)
    kind, name = turn % 10, NAMES[rule]
    offered = [name, *rng.sample([other for other in NAMES if other != name], TOOLS_IN_A_ROW - 1)]
    rng.shuffle(offered)
    free = [order for order in range(100, 1000) if (order in HELD_OUT_ORDERS) == is_held_out]
    orders = rng.sample(free, 2 if kind == 6 else 1)
    if kind >= 8:
        said = rng.choice(HELD_OUT_SAID if is_held_out else SAID)
        turns = [{"role": "user", "content": said}, {"role": "assistant", "content": REPLY}]
        return {"messages": turns, "tools": [tool(each) for each in offered]}
    asked = complaint(rng, rule, orders, is_held_out, is_held_out and turn % 2 == 1)
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": asked},
        {"role": "assistant", "tool_calls": [call(name, order) for order in orders]},
    ]
    if kind == 7:
        told = f"{orders[0]} {rng.choice(RESULTS)}"
        turns += [{"role": "tool", "content": told}, {"role": "assistant", "content": f"Order {told}."}]
    return {"messages": turns, "tools": [tool(each) for each in offered]}


def rows(seed: int = SEED) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out rows; every tool is called as often as any other."""
    rng = random.Random(seed)
    train = [row(rng, number, is_held_out=False) for number in range(TRAIN_ROWS)]
    return train, [row(rng, number, is_held_out=True) for number in range(HELD_OUT_ROWS)]


if __name__ == "__main__":
    sample_rows.write("tools", *rows())
