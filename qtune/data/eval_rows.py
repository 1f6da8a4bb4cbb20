"""Rows of a file that a finished run is asked about, read as the recipe reads its data where that fits."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qtune.data import token_cache
from qtune.data.dataset import Examples, ExampleWriter
from qtune.data.prepare import encoding_of, take_rows
from qtune.data.row_stream import format_of
from qtune.data.rows import Dropped, RawRow, recognise
from qtune.data.sources import Source, Tell
from qtune.data.tokenize import Encoder
from qtune.errors import DataError
from qtune.recipe.schema import Columns, Data


@dataclass(frozen=True)
class OwnRows:
    """The rows of `path`, and those that are of no use."""

    path: Path
    format: str
    examples: Examples
    dropped: tuple[Dropped, ...]

    @classmethod
    def read(cls, path: Path, data: Data, tokenizer: PreTrainedTokenizerBase, tell: Tell) -> "OwnRows":
        """By the columns and the format of `data` where the file has them, else recognised by its own columns.

        Raises DataError for a file that cannot be read, bad rows unless `data` drops them, and where none is left.
        """
        source = Source(str(path.absolute()))
        wanted = _as_in(source, data)
        form = format_of(source, wanted)
        with token_cache.staged() as folder:
            writer = ExampleWriter(folder)
            taken = take_rows(source, form, encoding_of([form], Encoder.of(tokenizer)), wanted, writer, tell)
            examples = writer.finish()
        return cls(path, form.name if form else data.format, examples, tuple(taken.dropped))

    @property
    def packs(self) -> tuple[tuple[int, ...], ...]:
        """Every row by itself, whatever the base makes of neighbours."""
        return tuple((i,) for i in range(len(self.examples)))


def _as_in(source: Source, data: Data) -> Data:
    """`data`, without its columns and its format where the first row of `source` does not have them."""
    first = next((row for row in source.read(1) if isinstance(row, RawRow)), None)
    try:
        if first is not None:
            recognise(data.format, [first], data.columns.mapped)
    except DataError:
        return data.model_copy(update={"format": "auto", "columns": Columns()})
    return data
