"""A first look through a source: its format, how many rows it has, and which are no use, before any is tokenised."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from qtune.data.formats import DataFormat
from qtune.data.rows import Conversation, Document, Dropped, RawRow, parse_row, recognise
from qtune.data.sources import Source, refuse_bad_rows
from qtune.errors import DataError
from qtune.recipe.schema import Data

ROWS_BETWEEN_WORDS = 1024

Tell = Callable[[str, int, int | None], None]  # what is being done, rows done, rows in all where they are known


@dataclass(frozen=True)
class Survey:
    """What one source holds. `system` is its first conversation with a system prompt, `unused` counts the usable rows
    by what of them is read by nobody."""

    source: Source
    data: Data
    form: DataFormat | None
    usable_rows: int
    dropped: tuple[Dropped, ...]
    system: Conversation | None
    unused: Counter[str] = field(default_factory=Counter)

    @property
    def rows_read(self) -> int:
        return self.usable_rows + len(self.dropped)

    @property
    def has_chats(self) -> bool:
        return self.form is not None and not self.form.is_text and self.usable_rows > 0

    def items(self) -> Iterator[Conversation | Document]:
        """The usable rows, read once more."""
        if self.form:
            every = _formatted(self.source, self.data, self.form)
            yield from (item for item in every if not isinstance(item, Dropped))


def survey(source: Source, data: Data, tell: Tell) -> Survey:
    """Read `source` twice: for its columns, then every row as its format has it.

    Raises DataError for a source that cannot be read or holds nothing, columns that fit no format, and bad rows unless
    they are to be dropped.
    """
    heads, unread = _look_through(source, data, tell)
    if not heads:
        return Survey(source, data, None, 0, unread, None)
    try:
        form = recognise(data.format, heads, data.columns.mapped)
    except DataError as fault:
        raise DataError(f"{source.name}: {fault}") from None
    usable, system, unused = 0, None, Counter[str]()
    unusable: list[Dropped] = []
    for item in _formatted(source, data, form):
        if isinstance(item, Dropped):
            unusable.append(item)
            continue
        usable += 1
        unused.update(item.unused)
        if system is None and isinstance(item, Conversation) and item.messages[0].role == "system":
            system = item
        if usable % ROWS_BETWEEN_WORDS == 0:
            tell("checking", usable, None)
    if data.on_bad_row == "error":
        refuse_bad_rows(unusable)
    return Survey(source, data, form, usable, (*unread, *unusable), system, unused)


def _look_through(source: Source, data: Data, tell: Tell) -> tuple[tuple[RawRow, ...], tuple[Dropped, ...]]:
    """The first row and one with every column there is (none where there is no row), and what could not be read."""
    first: RawRow | None = None
    columns: dict[str, None] = {}
    dropped: list[Dropped] = []
    for number, item in enumerate(source.read(data.max_rows), start=1):
        if isinstance(item, Dropped):
            dropped.append(item)
        else:
            first = first or item
            columns.update(dict.fromkeys(item.values))
        if number % ROWS_BETWEEN_WORDS == 0:
            tell("reading", number, None)
    if data.on_bad_row == "error":
        refuse_bad_rows(dropped)
    if first is None and not dropped:
        raise DataError(f"{source.name}: holds no rows.")
    return (first, RawRow(dict(columns), first.place)) if first else (), tuple(dropped)


def _formatted(source: Source, data: Data, form: DataFormat) -> Iterator[Conversation | Document | Dropped]:
    mapped = data.columns.mapped
    for row in source.read(data.max_rows):
        if isinstance(row, RawRow):
            yield parse_row(row, form, mapped, data.system)
