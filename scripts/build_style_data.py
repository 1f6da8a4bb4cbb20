#!/usr/bin/env python3
"""Write the style sample data: recipes/data/style_train.jsonl and style_held_out.jsonl.

A house style in five rules: no opening that says nothing, no word that only adds weight, the plain verb, the plain
preposition, and figures for numbers. A row is a sentence in the heavy style and the same sentence by the rules. Each
rule is in training; the room of a held-out sentence, its frame (what is said of the doing, and where the place stands),
and which quality goes with which thing are not, so what is scored is whether the rules carry over and the rest is kept.
"""

import random

import sample_rows

SEED, TRAIN_ROWS, HELD_OUT_ROWS = 0, 1000, 100
HELD_OUT_ROOMS = frozenset(random.Random(SEED).sample(range(100, 1000), 180))

OPENINGS = (
    "Please be advised that ",
    "It should be noted that ",
    "We would like to inform you that ",
    "It goes without saying that ",
    "",
)
WEIGHTS = ("very ", "really ", "extremely ", "absolutely ", "")
PLAIN_BY_VERB = {
    "utilise": "use",
    "purchase": "buy",
    "obtain": "get",
    "require": "need",
    "possess": "have",
    "construct": "make",
    "transport": "carry",
    "discover": "find",
    "relinquish": "give up",
    "demonstrate": "show",
    "retain": "keep",
    "dispatch": "send",
}
PLAIN_BY_PREPOSITION = {
    "in close proximity to": "near",
    "in the interior of": "in",
    "at the rear of": "behind",
    "adjacent to": "beside",
    "in the direction of": "towards",
    "on the exterior of": "outside",
}
NUMBERS = "two three four five six seven eight nine ten eleven twelve"
FIGURE_BY_NUMBER = {word: str(figure) for figure, word in enumerate(NUMBERS.split(), start=2)}

PEOPLE = "painter writer king cook child girl mother father friend poet author agent officer chief member patient"
THINGS = "tables chairs plates books boxes bags rings boats balls cards flowers trees apples horses snakes pens"
QUALITIES = "large small old new heavy light red green blue white black yellow round flat thin long short strong"
PAIRS = [(quality, thing) for quality in QUALITIES.split() for thing in THINGS.split()]
HELD_OUT_PAIRS = frozenset(random.Random(SEED).sample(PAIRS, len(PAIRS) // 5))

DOING = ("will", "has to", "can", "did not", "wants to", "would", "had to", "may not", "must", "cannot")
ORDERS = (
    "{opening}the {person} {preposition} room {room} {doing} {verb} {number} {weight}{quality} {things}.",
    "{opening}the {person} {doing} {verb} {number} {weight}{quality} {things} {preposition} room {room}.",
    "{opening}{preposition} room {room} the {person} {doing} {verb} {number} {weight}{quality} {things}.",
    "{opening}the {person} {doing} go to room {room} in order to {verb} {number} {weight}{quality} {things}.",
)
FRAMES = [order.replace("{doing}", doing) for doing in DOING for order in ORDERS]
HELD_OUT_FRAMES = frozenset(random.Random(SEED).sample(FRAMES, len(FRAMES) // 5))


def pair(rng: random.Random, is_held_out: bool) -> dict[str, str]:
    """A sentence in the heavy style, and by the rules."""
    verb, preposition, number = (
        rng.choice(list(rule)) for rule in (PLAIN_BY_VERB, PLAIN_BY_PREPOSITION, FIGURE_BY_NUMBER)
    )
    quality, thing = rng.choice([each for each in PAIRS if (each in HELD_OUT_PAIRS) == is_held_out])
    room = rng.choice([each for each in range(100, 1000) if (each in HELD_OUT_ROOMS) == is_held_out])
    kept = {"person": rng.choice(PEOPLE.split()), "quality": quality, "things": thing, "room": room}
    heavy = {"opening": rng.choice(OPENINGS), "weight": rng.choice(WEIGHTS), "verb": verb, "number": number}
    plain = {"opening": "", "weight": "", "verb": PLAIN_BY_VERB[verb], "number": FIGURE_BY_NUMBER[number]}
    frame = rng.choice([each for each in FRAMES if (each in HELD_OUT_FRAMES) == is_held_out])
    lean = frame.replace("in order to", "to")
    return {
        "prompt": _sentence(frame.format(**kept, **heavy, preposition=preposition)),
        "completion": _sentence(lean.format(**kept, **plain, preposition=PLAIN_BY_PREPOSITION[preposition])),
    }


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def rows(seed: int = SEED) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and held-out pairs."""
    rng = random.Random(seed)
    train = [pair(rng, is_held_out=False) for _ in range(TRAIN_ROWS)]
    return train, [pair(rng, is_held_out=True) for _ in range(HELD_OUT_ROWS)]


if __name__ == "__main__":
    sample_rows.write("style", *rows())
