#!/usr/bin/env python3
"""Write the support sample data: recipes/data/support_train.jsonl and support_held_out.jsonl.

An invented shop answers every ticket in three lines: the order that the ticket names, the shop's rule for what went
wrong, and the next step. A model has to copy the one and to choose the others by *reading* the complaint.

Order numbers, articles, and the frame around the complaint of a held-out ticket are in no training ticket, and half of
the held-out complaints are worded as none is there. A held-out row carries the check that `evaluate.metric = "policy"`
holds the answer against.
"""

import random
from dataclasses import dataclass
from typing import Any

import sample_rows

SEED, TRAIN_ROWS, HELD_OUT_ROWS = 0, 1100, 150
HELD_OUT_ORDERS = frozenset(random.Random(SEED).sample(range(100, 1000), 180))


@dataclass(frozen=True)
class Rule:
    """What the shop does about a kind of complaint, in the second and third line of a reply."""

    policy: str
    next_step: str
    complaints: tuple[str, ...]
    new_complaints: tuple[str, ...]


RULES = (
    Rule(
        "We replace damaged goods.",
        "Next: send a photo.",
        (
            "the {} is broken",
            "the {} came with a crack",
            "the {} does not work",
            "there is a hole in the {}",
            "the {} fell apart",
            "a part of the {} is damaged",
            "the {} broke at once",
            "my {} has a scratch and a hole",
            "I got a damaged {}",
        ),
        ("the {} came broken", "there is a crack in the {}", "my {} is damaged"),
    ),
    Rule(
        "We exchange wrong goods.",
        "Next: name the right one.",
        (
            "you sent me the wrong {}",
            "the {} is not the one I ordered",
            "I got another {} than I ordered",
            "the {} has the wrong colour",
            "the {} is the wrong size",
            "I ordered a different {}",
            "this {} is not mine",
            "my {} should be of another colour",
            "the {} is too large, wrong size",
        ),
        ("this is the wrong {}", "the {} has a different colour than I ordered", "my {} is of the wrong kind"),
    ),
    Rule(
        "We search for late parcels.",
        "Next: wait two days.",
        (
            "the {} has not arrived",
            "I am still waiting for the {}",
            "the {} is late",
            "I ask where the {} is",
            "the parcel with the {} is lost",
            "nobody brought the {}",
            "I wait for my {}",
            "I ask when the {} will arrive",
            "my {} never came",
        ),
        ("the {} never arrived", "the {} is lost", "I ask where the parcel with my {} is"),
    ),
    Rule(
        "We refund unwanted goods.",
        "Next: send it back.",
        (
            "I do not want the {} any more",
            "I changed my mind about the {}",
            "I do not like the {}",
            "I have no use for the {}",
            "nobody wants the {}",
            "I bought the {} by mistake",
            "we do not need the {}",
            "I want to return the {}",
            "give me my money for the {}",
        ),
        ("we have no use for the {}", "I do not need the {} any more", "I want my money for the {}"),
    ),
    Rule(
        "We correct bills at once.",
        "Next: send the bill.",
        (
            "I paid twice for the {}",
            "the price of the {} on the bill is too high",
            "the bill for the {} is not right",
            "you charged too much for the {}",
            "I never got a bill for the {}",
            "the tax on the {} was charged twice",
            "the {} was cheaper when I paid",
            "the bill names a {} twice",
            "there is an error in the price of the {}",
        ),
        ("you charged me twice for the {}", "the bill for my {} has an error", "I paid too high a price for the {}"),
    ),
)

ARTICLES = (
    "table chair lamp mirror carpet curtain pillow blanket towel basket kettle bowl plate fork spoon knife bottle"
    " glass oven stove coat jacket shirt skirt dress sweater glove scarf belt shoe boot sock guitar violin piano"
    " trumpet drum flute camera telescope radio telephone computer printer keyboard clock watch ring necklace bracelet"
    " bicycle helmet saddle tent hammer saw drill ladder shovel rake box bag book map flag picture frame brush comb"
    " soap candle match pipe pump motor engine battery cable wire switch lock key door window shelf bench stool"
    " mattress cushion napkin apron tray pan jar barrel bucket hose spade fence gate wagon boat sail anchor net rod"
    " ball bat glider doll puzzle top mask wig fan heater filter meter scale compass lens microscope needle thread"
    " button zipper ribbon lace cloth paper pen pencil ink stamp envelope folder notebook"
)
HELD_OUT_ARTICLES = (
    "desk sofa vase cup pot jug hat cap pullover sandal harp cello horn calculator brooch sword kite rope axe wheel"
    " bell cabinet toy globe trunk purse whistle tile screw cradle"
)
FRAMES = (
    "Order {order}. {complaint}.",
    "{complaint}. The order is {order}.",
    "Hello, {complaint}. I mean order {order}.",
    "This is about order {order}, and {complaint}.",
    "{complaint}. It was order {order}. What now?",
    "My number is {order}. {complaint}. Thank you.",
)
HELD_OUT_FRAMES = (
    "Dear shop, {complaint}. My order: {order}.",
    "Please help with order {order}. {complaint}.",
    "I wrote about order {order} before. {complaint}. Please answer.",
)


def ticket(rng: random.Random, rule: Rule, complaints: tuple[str, ...], is_held_out: bool) -> dict[str, Any]:
    """One ticket and its reply, with the check that goes with it where it is held out."""
    article = rng.choice((HELD_OUT_ARTICLES if is_held_out else ARTICLES).split())
    order = rng.choice([number for number in range(100, 1000) if (number in HELD_OUT_ORDERS) == is_held_out])
    complaint = rng.choice(complaints).format(article)
    frame = rng.choice(HELD_OUT_FRAMES if is_held_out else FRAMES)
    sentences = frame.format(order=order, complaint=complaint).split(". ")
    lines = [f"Order {order}.", rule.policy, rule.next_step]
    row = {"prompt": ". ".join(part[:1].upper() + part[1:] for part in sentences), "completion": "\n".join(lines)}
    if not is_held_out:
        return row
    others = [other.policy for other in RULES if other.policy != rule.policy]
    policy = f"{rule.policy} {rule.next_step}"
    return row | {"check": {"policy": policy, "must": [lines[0], "Next:"], "must_not": others}}


def rows(seed: int = SEED) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out rows; every rule is as frequent as any other."""
    rng, train, held_out = random.Random(seed), [], []
    for number in range(TRAIN_ROWS):
        rule = RULES[number % len(RULES)]
        train.append(ticket(rng, rule, rule.complaints, is_held_out=False))
    for number in range(HELD_OUT_ROWS):
        turn, rule = number // len(RULES), RULES[number % len(RULES)]
        complaints = rule.new_complaints if turn % 2 else rule.complaints
        held_out.append(ticket(rng, rule, complaints, is_held_out=True))
    return train, held_out


if __name__ == "__main__":
    sample_rows.write("support", *rows())
