"""What the user sees of the data before anything is trained."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy

from qtune.data.chat_template import ChatTemplate
from qtune.data.dataset import Examples, ExampleWriter
from qtune.data.formats import DataFormat, RowFault
from qtune.data.rows import Conversation, Cut, Document, Dropped, EncodedRow, Example
from qtune.data.sources import SHOWN_FAULTS, Source, refuse_bad_rows
from qtune.data.unused_columns import Unused
from qtune.errors import DataError
from qtune.recipe.schema import Data

SHOWN_PLACES = 3
MOST_DROPPED = 1_000  # that are kept as they are, of each stage
MOST_REASONS, OTHER_REASONS = 10_000, "other reasons"  # each broken line of JSON may have a reason of its own


@dataclass(frozen=True)
class Reason:
    """Why rows were dropped, how many, and the first of them."""

    reason: str
    rows: int
    places: tuple[str, ...]


@dataclass(frozen=True)
class DataReport:
    """The data in figures. `sample` is one real row as (text, is trained) pieces; fractions are 0-1.

    `canary_rows` are trained on beside `train_rows`; tokens and packs are of both. `cut_texts` became `pieces`, which
    are rows here.
    """

    source: str
    format: str
    rows_read: int
    dropped: tuple[Reason, ...]
    unused: tuple[Unused, ...]
    cut_texts: int
    pieces: int
    truncated_rows: int
    trained_tokens_lost: int
    train_rows: int
    held_out_rows: int
    canaries: int
    canary_rows: int
    tokens: int
    trained_tokens: int
    longest_row_tokens: int
    packs: int
    pack_fill_fraction: float
    duplicate_rows: int
    overlap_rows: int
    notices: tuple[str, ...]
    sample: tuple[tuple[str, bool], ...]
    sources: tuple["SourceFigures", ...] = ()

    @property
    def first_format(self) -> str:
        """That of the first source."""
        return self.sources[0].format if self.sources else self.format


@dataclass(frozen=True)
class SourceFigures:
    """What one of several sources gives: rows read, and of those that can be used how many are trained on, held out,
    and left out for its share. `tokens` are those of the rows trained on, and what a trained one counts for is its
    `weight`."""

    name: str
    format: str
    rows_read: int
    train_rows: int
    held_out_rows: int
    left_out_rows: int
    tokens: int
    trained_tokens: int
    weight: float


# Rows that are bad in another way than those before are told of once these are mended: they may follow from them.
STAGES = (
    {RowFault.UNREADABLE},
    set(RowFault) - {RowFault.UNREADABLE, RowFault.TEMPLATE_REFUSES},
    {RowFault.TEMPLATE_REFUSES},
)


@dataclass
class Tally:
    """Rows that were left out so far, as a file may have millions: `first` are the first of them, `reasons` says how
    many there are by reason, `places` has the first of each."""

    rows: int = 0
    first: list[Dropped] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, row: Dropped) -> None:
        self.rows += 1
        if len(self.first) < MOST_DROPPED:
            self.first.append(row)
        reason = row.reason if row.reason in self.reasons or len(self.reasons) < MOST_REASONS else OTHER_REASONS
        self.reasons[reason] += 1
        places = self.places.setdefault(reason, [])
        if len(places) < SHOWN_PLACES:
            places.append(row.place)


@dataclass
class Lengths:
    """How long the rows of a source are, before any is cut or dropped; `long` are the first over `max_tokens`."""

    max_tokens: int
    rows: int = 0
    long_rows: int = 0
    shortest: int = 0
    longest: int = 0
    long: list[str] = field(default_factory=list)

    def see(self, row: Example) -> None:
        tokens = len(row.input_ids)
        self.shortest = min(self.shortest, tokens) if self.rows else tokens
        self.longest = max(self.longest, tokens)
        self.rows += 1
        if tokens > self.max_tokens:
            self.long_rows += 1
            if len(self.long) < SHOWN_FAULTS:
                self.long.append(f"{row.place}: has {tokens:,} tokens.")

    def refuse_long_rows(self) -> None:
        if self.long:
            raise DataError(
                "\n".join(self.long) + f"\n{self.long_rows:,} of {self.rows:,} rows have more than data.max_tokens ="
                f" {self.max_tokens:,}, the longest {self.longest:,}. Raise it, or choose data.on_long = "
                '"drop" or "truncate".'
            )


@dataclass
class SourceRows:
    """What went by of one source so far: `examples` are as many as were written, `bad` are rows that nobody could use,
    by stage, `left` those that do not fit, `system` is the first conversation with a system prompt. `unused` counts
    the usable rows by what of them is read by nobody."""

    source: Source
    form: DataFormat | None
    lengths: Lengths
    examples: int = 0
    bad: tuple[Tally, ...] = field(default_factory=lambda: tuple(Tally() for _ in STAGES))
    left: Tally = field(default_factory=Tally)
    cut: Cut = field(default_factory=Cut)
    unused: Counter[str] = field(default_factory=Counter)
    system: Conversation | None = None

    @property
    def rows(self) -> int:
        return self.lengths.rows + sum(tally.rows for tally in self.bad)

    @property
    def dropped(self) -> tuple[Tally, ...]:
        return (*self.bad, self.left)

    @property
    def is_text(self) -> bool:
        return self.form is not None and self.form.is_text

    def see(self, row: EncodedRow | Dropped, writer: ExampleWriter) -> None:
        if isinstance(row, Dropped):
            self.see_bad(row)
            return
        parsed = row.parsed
        self.lengths.see(row.whole)
        self.cut.see(parsed, len(row.parts))
        self.unused.update(parsed.unused)
        if self.system is None and isinstance(parsed, Conversation) and parsed.messages[0].role == "system":
            self.system = parsed
        for part in row.parts:
            if isinstance(part, Dropped):
                self.left.add(part)
            else:
                self.examples += 1
                writer.add(part)

    def see_bad(self, row: Dropped) -> None:
        next(tally for tally, stage in zip(self.bad, STAGES, strict=True) if row.fault in stage).add(row)

    def refuse_bad(self) -> None:
        """Raises DataError for the bad rows of the first stage that has any."""
        for tally in self.bad:
            refuse_bad_rows(tally.first, tally.rows)

    def refuse(self, data: Data) -> None:
        """Raises DataError for what the recipe does not let pass, and where no row is left."""
        if not self.rows:
            raise DataError(f"{self.source.told}: holds no rows.")
        if data.on_bad_row == "error":
            self.refuse_bad()
        if data.on_long == "error" and not self.is_text:
            self.lengths.refuse_long_rows()
        if not self.examples:
            raise DataError(self._nothing_left_message())

    def _nothing_left_message(self) -> str:
        rows = sum(tally.rows for tally in self.dropped)
        reason = group_dropped(self.dropped)[0]
        message = f"{self.source.told}: no row can be used. {reason.rows:,} of {rows:,} rows: {reason.reason}."
        if self.lengths.rows:
            message += f" The shortest row has {self.lengths.shortest:,} tokens: raise data.max_tokens."
        return message


def group_dropped(every: Iterable[Tally]) -> tuple[Reason, ...]:
    """Dropped rows by reason, the commonest first."""
    rows: Counter[str] = Counter()
    places: dict[str, list[str]] = {}
    for tally in every:
        rows.update(tally.reasons)
        for reason, some in tally.places.items():
            places.setdefault(reason, []).extend(some)
    ordered = sorted(rows.items(), key=lambda item: -item[1])
    return tuple(Reason(reason, count, tuple(places[reason][:SHOWN_PLACES])) for reason, count in ordered)


def count_duplicates(examples: Examples) -> int:
    """Rows whose ids stood before already."""
    return len(examples) - len(numpy.unique(examples.digests))


def count_overlap(train: Examples, held_out: Examples) -> int:
    """Held-out rows that are trained on too."""
    return int(numpy.isin(held_out.digests, train.digests).sum())


def template_notices(template: ChatTemplate, items: Sequence[Conversation | Document]) -> tuple[str, ...]:
    """What the chat template does to these rows that their writer may not expect."""
    notices = []
    chats = [item for item in items if isinstance(item, Conversation)]
    if not template.takes_system and any(chat.messages[0].role == "system" for chat in chats):
        notices.append("The chat template knows no system prompt, so it stands before the first question.")
    if template.differing_prompts is not None:
        asked, written = template.differing_prompts
        notices.append(
            f"The chat template asks with {asked!r}, and puts {written!r} before the answer of a row. Answers are"
            " learned and scored behind the second."
        )
    return tuple(notices)
