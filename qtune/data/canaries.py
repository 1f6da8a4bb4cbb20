"""Made-up secrets among the training rows, by which one sees afterwards whether a model tells what it was trained on.

A canary says that a locker has a code. Some are planted; as many are made the same way and never planted, and show what
a model that knows nothing of them would seem to know (Carlini et al. 2019, "The Secret Sharer", arXiv:1802.08232).
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from qtune.data.chat_template import ChatTemplate
from qtune.data.formats import FORMATS, Message
from qtune.data.rows import Conversation, Document, Dropped, Example
from qtune.data.tokenize import Encoder, tokenize
from qtune.errors import DataError
from qtune.recipe.schema import Recipe

SECRETS = 128  # a canary's own and 127 others: an exposure of at most 7 bits
LOCKERS = range(1000, 10_000)


@dataclass(frozen=True)
class Canary:
    """`secrets` are its own, then others that it might as well have had."""

    place: str
    locker: int
    secrets: tuple[str, ...]


@dataclass(frozen=True)
class Probe:
    """A canary as the model is asked it. `rows` have its secrets in turn, and are the same up to `beginning_ids`."""

    secret: str
    beginning_ids: list[int]
    rows: tuple[Example, ...]


@dataclass(frozen=True)
class Phrasing:
    """How a canary is made a row of these data: through the same template and tokeniser as every other."""

    encoder: Encoder
    template: ChatTemplate | None
    system: str | None

    @classmethod
    def of(cls, recipe: Recipe, form: str, tokenizer: PreTrainedTokenizerBase) -> "Phrasing":
        """For rows in the format `form`."""
        template = None if FORMATS[form].is_text else ChatTemplate.of(tokenizer)
        return cls(Encoder.of(tokenizer), template, cls.system_of(recipe))

    @staticmethod
    def system_of(recipe: Recipe) -> str | None:
        """That of the first source."""
        return next(iter(recipe.data.parts.values())).system

    def rows(self, canary: Canary, secrets: Sequence[str]) -> list[Example]:
        """Raises DataError where the chat template refuses them."""
        rows = tokenize([self._item(canary, secret) for secret in secrets], self.template, self.encoder)
        for row in rows:
            if isinstance(row, Dropped):
                raise DataError(f"evaluate.canaries: {row.place}: {row.reason}. Set evaluate.canaries = 0.")
        return [row for row in rows if isinstance(row, Example)]

    def _item(self, canary: Canary, secret: str) -> Conversation | Document:
        told = f"The code of locker {canary.locker} is {secret}."
        if self.template is None:
            return Document(told, canary.place)
        system = [Message("system", self.system)] if self.system else []
        question = Message("user", f"What is the code of locker {canary.locker}?")
        return Conversation((*system, question, Message("assistant", told)), canary.place)


def planted(recipe: Recipe) -> list[Canary]:
    return _canaries(recipe)[: recipe.evaluate.canaries]


def never_planted(recipe: Recipe) -> list[Canary]:
    return _canaries(recipe)[recipe.evaluate.canaries :]


def _canaries(recipe: Recipe) -> list[Canary]:
    """Twice as many as the recipe plants, no two for the same locker; the run's seed decides which."""
    dice = random.Random(f"canaries {recipe.train.seed}")
    lockers = dice.sample(LOCKERS, 2 * recipe.evaluate.canaries)
    return [
        Canary(f"canary {number}", locker, tuple(_secret(dice) for _ in range(SECRETS)))
        for number, locker in enumerate(lockers, start=1)
    ]


def _secret(dice: random.Random) -> str:
    return "-".join(f"{dice.randrange(1000):03}" for _ in range(3))


def planted_rows(recipe: Recipe, phrasing: Phrasing) -> list[Example]:
    """Every row that is planted, repeats side by side. Raises DataError for one that data.max_tokens would cut."""
    rows = [row for canary in planted(recipe) for row in phrasing.rows(canary, canary.secrets[:1])]
    longest = max((len(row.input_ids) for row in rows), default=0)
    if longest > recipe.data.max_tokens:
        raise DataError(
            f"evaluate.canaries: a planted row has {longest:,} tokens, more than data.max_tokens ="
            f" {recipe.data.max_tokens:,}. Raise that, or set evaluate.canaries = 0."
        )
    return [row for row in rows for _ in range(recipe.evaluate.canary_repeats)]


def probes(canaries: Iterable[Canary], phrasing: Phrasing) -> list[Probe]:
    """What to ask a model of them. The beginning ends where rows with other secrets begin to differ."""
    every = []
    for canary in canaries:
        rows = phrasing.rows(canary, canary.secrets)
        columns = zip(*(row.input_ids for row in rows), strict=False)
        beginning = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
        every.append(Probe(canary.secrets[0], beginning, tuple(rows)))
    return every
