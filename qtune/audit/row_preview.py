"""One row as the model sees it: what is only read, what is trained, and what the limit takes."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qtune.audit.row_locations import parted
from qtune.data.chat_template import ChatTemplate, special_tokens
from qtune.data.chunking import fitted
from qtune.data.row_stream import format_of
from qtune.data.rows import Dropped, Example, RawRow, as_learned, parse_row
from qtune.data.sources import Part, parts_of
from qtune.data.tokenize import Encoder, Stretch, stretches, tokenize, with_thoughts
from qtune.errors import DataError
from qtune.recipe.schema import Data


@dataclass(frozen=True)
class ShownRow:
    """`number` counts the rows of the source from 1. `not_used` is a clause that says why a run leaves the row out.

    A row that has no tokens has no stretches. `trained_tokens` are those before the cut. A long text is whole here, and
    a run takes it in `pieces`. `unused` names what of the row is read by nobody.
    """

    place: str
    number: int
    format: str
    stretches: tuple[Stretch, ...]
    tokens: int
    trained_tokens: int
    cut_trained_tokens: int
    max_tokens: int
    not_used: str | None
    special_tokens: tuple[str, ...]
    pieces: int = 1
    unused: tuple[str, ...] = ()


def show_row(
    data: Data, wanted: str, is_held_out: bool, tokenizer: PreTrainedTokenizerBase, in_pairs: bool = False
) -> ShownRow:
    """The row that `wanted` names, by number (`17`) or place (`rows.jsonl:17`); one of pairs where what is learned is
    `in_pairs`.

    Raises DataError for a source without such a row, or one that cannot be read up to it, ModelError for a template.
    """
    number, row, part = _find(_parts(data, is_held_out), wanted)
    data = part.data
    if isinstance(row, Dropped):
        return _left_out(number, row, "", data)
    form = format_of(part.source, data, in_pairs)
    assert form is not None, "a row that can be read has columns"
    item = as_learned(parse_row(row, form, data.columns.mapped, data.system), data)
    if isinstance(item, Dropped):
        return _left_out(number, item, form.name, data)
    template = None if form.is_text else ChatTemplate.of(tokenizer)
    encoder = Encoder.of(tokenizer)
    example = tokenize([item], template, encoder)[0]
    if isinstance(example, Dropped):
        return _left_out(number, example, form.name, data)
    parts = fitted(item, example, data, encoder)
    unused = (*item.unused, *(template.left_out(item) if template else ()))
    return dataclasses.replace(_shown(number, example, parts, form.name, data, tokenizer), unused=unused)


def _parts(data: Data, is_held_out: bool) -> list[Part]:
    parts = [part for part in parts_of(data) if part.is_held_out == is_held_out]
    if not parts:
        raise DataError(
            "--held-out: this recipe names no data.held_out; its held-out rows are rows of data.train, so show them"
            " without --held-out."
        )
    return parts


def _find(parts: Sequence[Part], wanted: str) -> tuple[int, RawRow | Dropped, Part]:
    """The row, its number through all of the parts, and the part it is of, read no further than to it."""
    plain = wanted.replace(",", "")
    number, before = 0, None
    every = ((row, part) for part in parts for row in part.source.read())
    for number, (row, part) in enumerate(every, start=1):
        if plain == (str(number) if plain.isdecimal() else row.place.replace(",", "")):
            return number, row, part
        before = row if _is_before(row, plain) else before
    name = ", ".join(each.name for each in parts)
    if plain.isdecimal():
        raise DataError(f"{name}: has {number:,} rows, so there is no row {wanted}.")
    near = f" The row before it begins at {before.place}." if before else ""
    raise DataError(f"{wanted}: no row of {name} begins there.{near} Rows go by number too: --row 17.")


def _is_before(row: RawRow | Dropped, wanted: str) -> bool:
    stem, line = parted(row.place)
    return wanted.startswith(stem) and wanted.removeprefix(stem).isdecimal() and line < int(wanted.removeprefix(stem))


def _left_out(number: int, row: Dropped, form: str, data: Data) -> ShownRow:
    return ShownRow(row.place, number, form, (), 0, 0, 0, data.max_tokens, row.reason, ())


def _shown(
    number: int,
    row: Example,
    parts: Sequence[Example | Dropped],
    form: str,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
) -> ShownRow:
    """`parts` are what a run takes of the row."""
    first, is_whole = parts[0], len(parts) > 1
    kept = row.trained_tokens if is_whole else 0 if isinstance(first, Dropped) else first.trained_tokens
    return ShownRow(
        place=row.place,
        number=number,
        format=form,
        stretches=with_thoughts(stretches(row, len(row.input_ids) if is_whole else data.max_tokens, tokenizer)),
        tokens=len(row.input_ids),
        trained_tokens=kept,
        cut_trained_tokens=row.trained_tokens - kept,
        max_tokens=data.max_tokens,
        not_used=first.reason if isinstance(first, Dropped) else None,
        special_tokens=special_tokens(tokenizer),
        pieces=len(parts),
    )
