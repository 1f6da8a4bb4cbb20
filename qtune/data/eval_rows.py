"""Rows of a file that a finished run is asked about, read as the recipe reads its data where that fits."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qtune.data import token_cache
from qtune.data.chat_template import ChatTemplate
from qtune.data.dataset import Examples, ExampleWriter
from qtune.data.rows import Dropped, RawRow, recognise
from qtune.data.scan import Tell, survey
from qtune.data.sources import Source
from qtune.data.tokenize import Encoder
from qtune.data.tokenize_dataset import tokenise
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
        found = survey(source, _as_in(source, data), tell)
        template = ChatTemplate.of(tokenizer) if found.has_chats else None
        with token_cache.staged() as folder:
            writer = ExampleWriter(folder)
            part = tokenise(found, template, Encoder.of(tokenizer), writer, lambda rows: None)
            examples = writer.finish()
        if not examples:
            first = "".join(f" {row.place}: {row.reason}." for row in part.dropped[:1])
            raise DataError(f"{path}: has no row that can be used.{first}")
        return cls(path, found.form.name if found.form else data.format, examples, part.dropped)

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
