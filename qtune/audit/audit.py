"""Everything that is wrong with the rows of a recipe, in one pass and in bounded memory.

Rows go by in batches: read, understood, looked at, tokenised, and forgotten. What stays of a row is its length, its
place and a digest, 32 bytes, and 256 bytes in a temporary file. Nothing stops at a bad row; `thresholds` judges.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
from transformers import PreTrainedTokenizerBase

from qtune.audit.issues import Groups
from qtune.audit.length_stats import SHOWN_LONGEST, LongRow, TokenCounts, as_numbers, bars_of
from qtune.audit.near_duplicates import Likeness
from qtune.audit.row_checks import Seen, Taken, look_at, see_batch
from qtune.audit.row_locations import parted
from qtune.data import encodings
from qtune.data.chat_template import ChatTemplate
from qtune.data.csv_dialect import SUFFIXES
from qtune.data.encodings import TEXT_SUFFIXES, WESTERN, FileEncoding
from qtune.data.file_readers import read_file
from qtune.data.formats import DataFormat
from qtune.data.row_stream import Encoding, Parsed, UnknownColumns, format_of, parsed_rows
from qtune.data.rows import Cut, RawRow
from qtune.data.sources import Part, Source, Tell, parts_of
from qtune.data.stop_tokens import StopChain, stop_chain
from qtune.data.text_files import FileFault, kind_of
from qtune.data.tokenize import Encoder
from qtune.data.unused_columns import Unused, unused_of
from qtune.evaluate.metrics import FaultOf
from qtune.recipe.data_files import is_pattern
from qtune.recipe.schema import Data
from qtune.units import format_percent


@dataclass(frozen=True)
class SourceCounts:
    """A source and its rows: read, and of these usable, which is to say with tokens. No format fits where it is "".

    `taken_rows` are those that a run would train on or hold out: long ones may be left out, texts be cut in pieces.
    """

    name: str
    is_held_out: bool
    format: str
    rows: int
    usable_rows: int
    taken_rows: int


@dataclass(frozen=True)
class Audit:
    """What was found, not judged yet: `groups` hold it by kind. `tokens` is None where no row has any. `notices` are
    sentences on files that are read as another one than their names say."""

    sources: tuple[SourceCounts, ...]
    groups: Groups
    tokens: TokenCounts | None
    stops: StopChain | None
    unused: tuple[Unused, ...]
    cut: Cut
    taken: Taken
    notices: tuple[str, ...]

    @property
    def rows(self) -> int:
        return sum(source.rows for source in self.sources)

    @property
    def held_out_rows(self) -> int:
        return sum(source.rows for source in self.sources if source.is_held_out)


@dataclass
class Progress:
    """How far a source is read; `lines` are those of the file, where each may be a row."""

    lines: int | None
    rows: int = 0
    line: int = 0


def audit(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    tell: Tell,
    fault_of: FaultOf | None = None,
    in_pairs: bool = False,
) -> Audit:
    """Read all that `data` names and keep what is wrong with it; `tell` hears how far that is, `fault_of` says why an
    answer to a row could not be scored, and rows are `in_pairs` where that is what is learned.

    Raises ModelError for a chat template that no row could be written with, DataError and MachineError for a hub
    dataset that cannot be had.
    """
    with Likeness() as likeness:
        seen = Seen(likeness, Taken(fault_of))
        counts, chains = [], []
        for part in parts_of(data):
            count, chain = _see_source(part, tokenizer, seen, tell, in_pairs)
            counts.append(count)
            chains.append(chain)
        tell("comparing", len(likeness), None)
        train_rows = sum(count.usable_rows for count in counts if not count.is_held_out)
        _group_alike(seen, train_rows, data.check.near_duplicate_similarity)
    stops = next(filter(None, chains), None)
    tokens = _token_counts(seen, data.max_tokens) if seen.tokens else None
    unused = unused_of(seen.unused)
    return Audit(tuple(counts), seen.groups, tokens, stops, unused, seen.cut, seen.taken, tuple(seen.notices))


def _see_source(
    part: Part, tokenizer: PreTrainedTokenizerBase, seen: Seen, tell: Tell, in_pairs: bool
) -> tuple[SourceCounts, StopChain | None]:
    source, data = part.source, part.data
    before, taken_before = len(seen.places), len(seen.taken.rows)
    progress, form, chain = Progress(None), None, None
    with source.unchanged(), _as_utf8(source, seen.groups, progress) as readable:
        if readable is not None:
            form = _recognise(readable, data, in_pairs, seen.groups)
            template = ChatTemplate.of(tokenizer) if form and not form.is_text else None
            seen.notices += [readable.notice] if form and readable.notice else []
            encoding = Encoding(Encoder.of(tokenizer), template, look_at)
            rows = _readable_rows(readable, form, data, seen.groups, progress)
            with contextlib.closing(encoding.batches(rows, data)) as batches:
                for batch in batches:
                    see_batch(batch, template, data, seen)
                    tell("checking", progress.line if progress.lines else progress.rows, progress.lines)
            chain = stop_chain(template, tokenizer) if form else None
    usable, taken = len(seen.places) - before, len(seen.taken.rows) - taken_before
    name = form.name if form else ""
    return SourceCounts(source.name, part.is_held_out, name, progress.rows, usable, taken), chain


@contextlib.contextmanager
def _as_utf8(source: Source, groups: Groups, progress: Progress) -> Iterator[Source | None]:
    """The source, as a copy in UTF-8 where it is a file in another encoding; None where it cannot be read at all."""
    path = Path(source.name)
    if source.dataset is not None:
        yield source
        return
    try:
        if not is_pattern(path):
            read_file(path, source.table)
        is_text = kind_of(path) in TEXT_SUFFIXES and path.is_file()
        written = encodings.encoding_of(path) if is_text else FileEncoding(0, False, (), None)
    except FileFault as fault:
        _group_file_fault(fault, source, groups)
        yield None
        return
    progress.lines = written.lines if kind_of(path) == ".jsonl" else None
    is_sheet = kind_of(path) in SUFFIXES
    if is_sheet and written.probably == WESTERN:  # read as such
        yield source
        return
    if written.has_bom and not is_sheet:  # Excel writes one and wants one
        groups.add("byte-order-mark", f"{source.folder}{path.name}:1", "begins with a byte-order mark")
    for line in written.bad_lines:
        place = f"{source.folder}{path.name}:{line:,}"
        groups.add("not-utf8", place, f"is not UTF-8 but {encodings.called(written.probably)}")
    with encodings.as_utf8(path, written) as copy:
        yield dataclasses.replace(source, name=str(copy))


def _recognise(source: Source, data: Data, in_pairs: bool, groups: Groups) -> DataFormat | None:
    """The format, or None with the reason grouped; what cannot be read is grouped by whoever reads on."""
    try:
        return format_of(source, data, in_pairs)
    except UnknownColumns as fault:
        groups.add("unknown-columns", fault.place, fault.reason)
    except FileFault:
        pass
    return None


def _readable_rows(
    source: Source, form: DataFormat | None, data: Data, groups: Groups, progress: Progress
) -> Iterator[Parsed]:
    """The rows up to where the source cannot be read on; of those without a format, the ones that cannot be read."""
    try:
        for row in source.read(data.max_rows) if form is None else parsed_rows(source, form, data):
            progress.rows += 1
            progress.line = parted(row.place)[1]
            if not isinstance(row, RawRow):
                yield row
    except FileFault as fault:
        _group_file_fault(fault, source, groups)


def _group_file_fault(fault: FileFault, source: Source, groups: Groups) -> None:
    """A fault of the file, under its line where it has one."""
    name = source.folder + fault.path.name
    place = name if fault.line is None else f"{name}:{fault.line:,}"
    groups.add("unreadable-file", place, fault.told)


def _group_alike(seen: Seen, train_rows: int, similarity: float) -> None:
    """Rows that repeat another; those held out that repeat one of the first `train_rows` flatter the score."""
    for pair in seen.likeness.exact():
        code = "overlap" if pair.earlier < train_rows <= pair.row else "duplicate"
        seen.groups.add(code, seen.places[pair.row], f"is {seen.places[pair.earlier]}")
    for pair in seen.likeness.near(similarity):
        code = "near-overlap" if pair.earlier < train_rows <= pair.row else "near-duplicate"
        told = f"is {format_percent(pair.similarity)} like {seen.places[pair.earlier]}"
        seen.groups.add(code, seen.places[pair.row], told)


def _token_counts(seen: Seen, max_tokens: int) -> TokenCounts:
    tokens = as_numbers(seen.tokens)
    longest = numpy.argsort(-tokens, kind="stable")[:SHOWN_LONGEST]
    return TokenCounts(
        rows=len(tokens),
        tokens=int(tokens.sum()),
        trained_tokens=int(as_numbers(seen.trained).sum()),
        median=int(numpy.percentile(tokens, 50)),
        percentile_95=int(numpy.percentile(tokens, 95)),
        longest=tuple(LongRow(seen.places[int(row)], int(tokens[row])) for row in longest),
        max_tokens=max_tokens,
        long_rows=seen.groups.rows("too-long"),
        lost_trained_tokens=seen.lost_trained_tokens,
        bars=bars_of(tokens),
    )
