"""The rows of a source, once: read, parsed, encoded on all cores, and fitted to data.max_tokens.

Who prepares a run and who audits the data read this one stream. So it is decided here what a row is, which are bad, and
what of the others is cut or left out. Memory holds a batch a core.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from qtune.data.chat_template import ChatTemplate
from qtune.data.chunking import fitted
from qtune.data.formats import DataFormat
from qtune.data.rows import (
    Conversation,
    Document,
    Dropped,
    EncodedRow,
    Example,
    RawRow,
    as_learned,
    parse_row,
    recognise,
)
from qtune.data.sources import Source
from qtune.data.tokenize import Encoder, batches_of, characters_of, tokenize
from qtune.data.worker_pool import spread
from qtune.errors import DataError
from qtune.recipe.schema import Data

Parsed = Conversation | Document | Dropped
L = TypeVar("L")


class UnknownColumns(DataError):
    """Rows that no format fits, or not the wanted one; `place` is that of the first, `reason` a sentence."""

    def __init__(self, source: Source, place: str, reason: str):
        self.place, self.reason = place, reason
        super().__init__(f"{source.told}: {reason}")


def format_of(source: Source, data: Data, in_pairs: bool = False) -> DataFormat | None:
    """The format of the rows by the first of them; by every column there is where it says too little. What is learned
    may be `in_pairs`.

    None where no row can be read. Raises UnknownColumns, and FileFault for a file that cannot be read.
    """
    first = next((row for row in source.read(data.max_rows) if isinstance(row, RawRow)), None)
    if first is None:
        return None
    with contextlib.suppress(DataError):
        return recognise(data.format, [first], data.columns.mapped, in_pairs)
    columns: dict[str, None] = {}
    for row in source.read(data.max_rows):
        columns.update(dict.fromkeys(row.values if isinstance(row, RawRow) else ()))
    try:
        return recognise(data.format, [first, RawRow(dict(columns), first.place)], data.columns.mapped, in_pairs)
    except DataError as fault:
        reason = re.sub(r"\bdata\.(?=format|columns)", f"{source.key}.", str(fault))
        raise UnknownColumns(source, first.place, reason) from None


def parsed_rows(source: Source, form: DataFormat, data: Data) -> Iterator[Parsed]:
    """Every row as `form` has it, or why it cannot be used.

    Raises FileFault where the file cannot be read on.
    """
    mapped = data.columns.mapped
    for row in source.read(data.max_rows):
        yield row if isinstance(row, Dropped) else as_learned(parse_row(row, form, mapped, data.system), data)


@dataclass(frozen=True)
class Batch(Generic[L]):
    """Rows in the order of their source, and what was made of those that have tokens where they were encoded."""

    rows: list[EncodedRow | Dropped]
    looked: L


@dataclass(frozen=True)
class Encoding(Generic[L]):
    """How rows are encoded: `template` is for chats, `look` sees the rows of a batch that have tokens, on any core."""

    encoder: Encoder
    template: ChatTemplate | None
    look: Callable[[Sequence[Conversation | Document]], L]

    def __call__(self, batch: Sequence[Parsed]) -> tuple[list[Example | Dropped], L]:
        parsed = [row for row in batch if not isinstance(row, Dropped)]
        encoded = tokenize(parsed, self.template, self.encoder)
        usable = [row for row, example in zip(parsed, encoded, strict=True) if isinstance(example, Example)]
        following = iter(encoded)
        return [row if isinstance(row, Dropped) else next(following) for row in batch], self.look(usable)

    def batches(self, rows: Iterable[Parsed], data: Data) -> Generator[Batch[L], None, None]:
        """`rows` in batches. To be closed by whoever does not take all."""
        with contextlib.closing(spread(self, batches_of(rows, characters_of))) as every:
            for parsed, (encoded, looked) in every:
                yield Batch([self._fitted(*pair, data) for pair in zip(parsed, encoded, strict=True)], looked)

    def _fitted(self, parsed: Parsed, encoded: Example | Dropped, data: Data) -> EncodedRow | Dropped:
        if isinstance(encoded, Dropped):
            return encoded
        assert not isinstance(parsed, Dropped)
        if self.template is not None and (left_out := self.template.left_out(parsed)):
            parsed = dataclasses.replace(parsed, unused=(*parsed.unused, *left_out))
        return EncodedRow(parsed, encoded, fitted(parsed, encoded, data, self.encoder))


def unlooked(rows: Sequence[Conversation | Document]) -> None:
    """The `look` of who wants the tokens alone. It stands here as a process that encodes loads what it stands in."""
