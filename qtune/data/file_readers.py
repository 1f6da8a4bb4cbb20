"""One reader per kind of file; every row remembers its place.

JSONL and CSV are read here, line by line, so that a fault has a line; `datasets` gives none, and a leading `null` in
a JSONL file ends the whole process inside pyarrow (datasets 5.2).

Files are read piece by piece, so memory holds a row or a batch of them, never the file; a text in `.txt` comes in rows
that continue one another. The exception is `.json`: one document has no rows until its end is known, and is read whole.
"""

import contextlib
import csv
import dataclasses
import datetime
import json
import sqlite3
import warnings
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from qtune.data.csv_dialect import Sheet
from qtune.data.encodings import TEXT_SUFFIXES
from qtune.data.formats import RowFault
from qtune.data.rows import NAME_CHARACTERS, Dropped, RawRow, seem_a_row
from qtune.data.text_files import (
    BLOCK_BYTES,
    COMPRESSED,
    FileFault,
    blocks_of,
    kind_of,
    lines_of,
    open_bytes,
    refuse_bad_bytes,
    start_of,
)
from qtune.recipe.data_files import DATABASE_SUFFIXES, SAVED, TABLES_SUFFIXES, WORKBOOK_SUFFIX, files_in
from qtune.units import GIB, format_bytes

MAGIC = (
    (b"PK\x03\x04", "an Excel workbook or zip archive. Have a workbook's name end in .xlsx"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook, or one with a password. Save it as .xlsx without one"),
    (b"\x1f\x8b", "compressed with gzip. Have its name end in .gz"),
    (b"BZh91AY&", "compressed with bzip2. Have its name end in .bz2"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd. Have its name end in .zst"),
    (b"\xfd7zXZ", "compressed with xz. Have its name end in .xz"),
    (b"PAR1", "a Parquet file. Name it .parquet"),
    (b"\xff\xfe", "UTF-16 text. Save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text. Save it as UTF-8"),
    (b"%PDF", "a PDF document. Turn it into text first"),
)
OWN_MAGIC = {".parquet": b"PAR1", WORKBOOK_SUFFIX: b"PK\x03\x04"}
ARROW_BATCH_ROWS = 64
MOST_DOCUMENT_BYTES = GIB  # of a .json file, whose values take five times as much of memory
TEXT_CHARACTERS = 1 << 20  # of a .txt file held at once; some 250,000 tokens, and many times what a model reads
ARROW_FILE = b"ARROW1"  # what a file begins with that is no stream
SQLITE_FILE = b"SQLite format 3\0"
UNWRITTEN = ("-wal", "-journal")  # beside a database: what a program has yet to write into it, or to take back
KINDS = {dict: "an empty object", list: "an array", type(None): "null", str: "a string", bool: "true or false"}

csv.field_size_limit(2**31 - 1)  # a cell may be a whole document; the csv module stops at 128 KiB unless told


def read_file(path: Path, table: str | None = None) -> Iterator[RawRow | Dropped]:
    """The rows of a file, by its suffix; of a database those of `table` or of its only one, of a workbook those of the
    sheet `table` or of the first.

    Raises FileFault for a file that cannot be read as what it is named.
    """
    if path.is_dir():
        return _read_folder(path)
    kind = kind_of(path)
    if path.suffix.lower() in COMPRESSED and kind in READERS and kind not in TEXT_SUFFIXES:
        raise FileFault(path, f"is a compressed {kind}. Unpack it first.")
    _refuse_unreadable(path)
    if path.suffix.lower() in DATABASE_SUFFIXES:
        return _read_database(path, table)
    if path.suffix.lower() == WORKBOOK_SUFFIX:
        return _read_workbook(path, table)
    if kind not in READERS:
        reads = f"It reads {', '.join((*READERS, *TABLES_SUFFIXES))}, and texts as {', '.join(COMPRESSED)}"
        raise FileFault(path, f"qtune does not read {kind or 'files without a suffix'}. {reads}.")
    return READERS[kind](path)


def _refuse_unreadable(path: Path) -> None:
    if not path.is_file():
        near = get_close_matches(path.name, [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else [], 1)
        raise FileFault(path, f"there is no such file.{f' Did you mean {near[0]}?' if near else ''}")
    try:
        with open_bytes(path) as file:
            start = file.read(8)
    except OSError as fault:
        raise FileFault(path, f"cannot be read ({fault.strerror}).") from None
    if not start:
        raise FileFault(path, "is empty.")
    for magic, meaning in MAGIC:
        if start.startswith(magic) and OWN_MAGIC.get(path.suffix.lower()) != magic:
            raise FileFault(path, f"is {meaning}.")


def _read_jsonl(path: Path) -> Iterator[RawRow | Dropped]:
    refuse_bad_bytes(path)
    _refuse_one_document(path)
    for number, line in enumerate(lines_of(path), start=1):
        if not line.strip():
            continue
        place = f"{path.name}:{number:,}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as fault:
            yield Dropped(place, RowFault.UNREADABLE, _json_fault(line, fault))
            continue
        yield _row_or_dropped(value, place)


def _refuse_one_document(path: Path) -> None:
    """JSON spread over lines, or one array in one line, is a fault of the file and not of each of its lines."""
    start, is_whole = start_of(path)
    first = next((line.strip() for line in start.split("\n") if line.strip()), "")
    if not first.startswith(("[", "{")) or (first.startswith("{") and _is_json(first)):
        return
    if _is_json(start) if is_whole else _is_cut_document(start):
        raise FileFault(path, "is one JSON document, not one object a line. Name it .json.")
    if first in ("[", "{", "[{"):
        raise FileFault(path, "spreads its JSON over several lines. Write one object a line.")


def _is_cut_document(start: str) -> bool:
    """Whether a long file's first block, in whole lines, is right JSON whose first value does not end in it.

    One line without an end is a document only as an array: a row that long is an object.
    """
    lines = start.rpartition("\n")[0]
    if not lines.strip():
        return start.lstrip().startswith("[")
    try:
        json.JSONDecoder().raw_decode(lines.lstrip())
    except json.JSONDecodeError as fault:
        return fault.pos >= len(lines.strip())
    except (ValueError, RecursionError):
        pass
    return False


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _json_fault(line: str, fault: Exception) -> str:
    """What is wrong and in which column; `line` is the line that `fault` is in."""
    if not isinstance(fault, json.JSONDecodeError):
        return f"is not readable JSON ({fault})"
    rest = line[fault.colno - 1 : fault.colno + 11]
    if "control character" in fault.msg and not rest:
        return "has a line break inside a text; write it as \\n"
    if "control character" in fault.msg:
        code = f"{ord(rest[0]):02x}"
        return f"has a raw control character (0x{code}) at column {fault.colno:,}; write it as \\u00{code}"
    where = f"at column {fault.colno:,}, before {rest!r}" if rest else "at the end of the line"
    return f"is not JSON: {fault.msg[0].lower() + fault.msg[1:].removesuffix(' at')} {where}"


def _row_or_dropped(value: Any, place: str) -> RawRow | Dropped:
    if isinstance(value, dict) and value:
        return RawRow(value, place)
    return Dropped(place, RowFault.UNREADABLE, f"is {KINDS.get(type(value), 'a number')}, not an object with columns")


def _read_json(path: Path) -> Iterator[RawRow | Dropped]:
    """An array of objects, an object that holds one under `data`, or objects by id. The file is held whole."""
    if path.stat().st_size > MOST_DOCUMENT_BYTES:
        raise FileFault(
            path,
            f"is one JSON document of {format_bytes(path.stat().st_size)}, which memory would have to hold whole. Write"
            f" one object a line: jq -c '.[]' {path.name} > {path.stem}.jsonl.",
        )
    refuse_bad_bytes(path)
    value = _json_document(path, b"".join(blocks_of(path)).decode("utf-8-sig"))
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    elif isinstance(value, dict) and any(isinstance(item, dict) for item in value.values()):
        value = [{"id": key, **item} if isinstance(item, dict) else item for key, item in value.items()]
    if not isinstance(value, list):
        raise FileFault(path, "must hold an array of objects, or objects by id.")
    for number, item in enumerate(value, start=1):
        yield _row_or_dropped(item, f"{path.name} row {number:,}")


def _json_document(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as fault:
        if fault.msg == "Extra data":
            hint = "a second JSON value begins here. A file with one object a line is named .jsonl"
        else:
            hint = _json_fault(text.split("\n")[fault.lineno - 1], fault)
        raise FileFault(path, f"{hint}.", fault.lineno) from None
    except (ValueError, RecursionError) as fault:
        raise FileFault(path, f"is not readable JSON ({fault}).") from None


def _read_csv(path: Path) -> Iterator[RawRow | Dropped]:
    """A cell may hold line breaks, and a record's place is its first line."""
    if any(b"\0" in block for block in blocks_of(path)):
        raise FileFault(path, "holds NUL bytes, so it is no text table. Save it as CSV in UTF-8.")
    sheet = Sheet.of(path)
    lines = (line + "\n" for line in lines_of(path, None, sheet.encoding))
    reader = csv.reader(lines, delimiter=sheet.delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            place, line = f"{path.name}:{line:,}", reader.line_num + 1
            if not any(cells):  # an empty line, or as many empty cells as Excel writes for one
                continue
            if header is None:
                header = _checked_header(path, cells)
            elif len(cells) != len(header):
                yield Dropped(place, RowFault.UNREADABLE, f"has {len(cells)} cells where the header has {len(header)}")
            else:
                yield RawRow(dict(zip(header, cells, strict=True)), place)
    except csv.Error as fault:
        raise FileFault(path, f"is not readable as CSV ({fault}).", line) from None


def _checked_header(path: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    ask = " Or has the file no header?" if seem_a_row(names) else ""
    if "" in names:
        raise FileFault(path, f"column {names.index('') + 1} has no name. Give every column one.{ask}", 1)
    if twice:
        shown = f"{twice[0][:NAME_CHARACTERS]!r}"
        raise FileFault(path, f"column {shown} is there twice. Give every column a name of its own.{ask}", 1)
    return names


def _read_parquet(path: Path) -> Iterator[RawRow | Dropped]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=BLOCK_BYTES) as file:
            for batch in file.iter_batches(ARROW_BATCH_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield _row_or_dropped(values, f"{path.name} row {number:,}")
    except (pyarrow.ArrowException, OSError, ValueError) as fault:
        raise FileFault(path, f"is not readable as Parquet ({str(fault).splitlines()[0]}).") from None


def _read_arrow(path: Path) -> Iterator[RawRow | Dropped]:
    return _arrow_rows([path], path.name)


def _arrow_rows(files: Sequence[Path], name: str) -> Iterator[RawRow | Dropped]:
    """Of files in Arrow's format for streams, which `datasets` writes, or for files, counted through all of them."""
    number = 0
    for path in files:
        try:
            with pyarrow.OSFile(str(path)) as file:  # a mapped one would count as memory held
                is_stream = file.read(len(ARROW_FILE)) != ARROW_FILE
                file.seek(0)
                for batch in pyarrow.ipc.open_stream(file) if is_stream else _batches_of_file(file):
                    for at in range(0, len(batch), ARROW_BATCH_ROWS):
                        for values in batch.slice(at, ARROW_BATCH_ROWS).to_pylist():
                            number += 1
                            yield _row_or_dropped(values, f"{name} row {number:,}")
        except (pyarrow.ArrowException, OSError, ValueError) as fault:
            raise FileFault(path, f"is not readable as Arrow ({str(fault).splitlines()[0]}).") from None


def _batches_of_file(file: pyarrow.NativeFile) -> Iterator[pyarrow.RecordBatch]:
    reader = pyarrow.ipc.open_file(file)
    return map(reader.get_batch, range(reader.num_record_batches))


def _read_database(path: Path, table: str | None) -> Iterator[RawRow | Dropped]:
    """The rows of one table or view of a SQLite file: of a table in the order of rowid, of a view in its own.

    The file is opened so that nothing is written to it or beside it.
    """
    _refuse_no_database(path)
    number = 0
    try:
        address = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
        with contextlib.closing(sqlite3.connect(address, uri=True, check_same_thread=False)) as database:
            database.execute("PRAGMA trusted_schema = OFF")  # a view of somebody's file calls no function but SQLite's
            database.text_factory = _text_or_bytes
            name = _chosen_table(path, database, table)
            rows = _rows_of_table(database, name)
            columns = [column[0] for column in rows.description]
            for cells in rows:
                number += 1
                place = f"{path.name}:{name} row {number:,}"
                blob = next((column for column, cell in zip(columns, cells, strict=True) if type(cell) is bytes), None)
                if blob is None:
                    yield RawRow(dict(zip(columns, cells, strict=True)), place)
                else:
                    told = f"column {blob[:NAME_CHARACTERS]!r} holds bytes: a BLOB, or text that is not UTF-8"
                    yield Dropped(place, RowFault.UNREADABLE, told)
    except sqlite3.Error as fault:
        where = f" after {number:,} rows" if number else ""
        raise FileFault(path, f"is not readable as a SQLite database{where} ({fault}).") from None


def _refuse_no_database(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(len(SQLITE_FILE))
    if start != SQLITE_FILE:
        raise FileFault(path, "is no SQLite database, or an encrypted one. Export its table as CSV.")
    for suffix in UNWRITTEN:
        beside = Path(f"{path}{suffix}")
        if beside.is_file() and beside.stat().st_size:
            raise FileFault(path, f"has unwritten changes in {beside.name}. Close the program that writes to it.")


def _text_or_bytes(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _chosen_table(path: Path, database: sqlite3.Connection, table: str | None) -> str:
    query = "SELECT name FROM sqlite_master WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite!_%' ESCAPE '!'"
    names = [name for (name,) in database.execute(f"{query} ORDER BY name")]
    if not names:
        raise FileFault(path, "is a SQLite database without a table.")
    if table is None and len(names) > 1:
        raise FileFault(path, f"has several tables: {', '.join(names)}. Name one with data.subset.")
    if table is not None and table not in names:
        raise FileFault(path, f"has no table {table!r}, which data.subset names. It has {', '.join(names)}.")
    return table or names[0]


def _rows_of_table(database: sqlite3.Connection, name: str) -> sqlite3.Cursor:
    every = 'SELECT * FROM "{}"'.format(name.replace('"', '""'))
    (kind,) = database.execute("SELECT type FROM sqlite_master WHERE name = ?", [name]).fetchone()
    if kind == "view":  # whose rowid is NULL or none, by the version of SQLite
        return database.execute(every)
    try:
        return database.execute(f"{every} ORDER BY rowid")
    except sqlite3.OperationalError:  # WITHOUT ROWID: it lies in the order of its primary key
        return database.execute(every)


def _read_workbook(path: Path, sheet: str | None) -> Iterator[RawRow | Dropped]:
    """The rows below the first of a sheet, all cells as text; a formula is the value that was saved with it.

    Of the file, memory holds the texts that its sheets share.
    """
    try:
        import openpyxl  # an extra: most rows come in other files
    except ImportError:
        told = "is a workbook, which openpyxl reads: pip install openpyxl. Or save the sheet as CSV."
        raise FileFault(path, told) from None
    warnings.filterwarnings("ignore", module="openpyxl")  # of styles and other things that are not read
    try:
        with contextlib.closing(openpyxl.load_workbook(path, read_only=True, data_only=True)) as book:
            names = [each.title for each in book.worksheets]
            if sheet is not None and sheet not in names:
                raise FileFault(path, f"has no sheet {sheet!r}, which data.subset names. It has {', '.join(names)}.")
            name = sheet or names[0]
            book[name].reset_dimensions()  # which some programs write wrongly
            yield from _rows_of_sheet(path, name, book[name].iter_rows())
    except FileFault:
        raise
    except Exception as fault:  # openpyxl passes on what zip, XML and its own classes raise
        raise FileFault(path, f"is not readable as a workbook ({type(fault).__name__}: {fault}).") from None


def _rows_of_sheet(path: Path, name: str, rows: Iterator[Sequence[Any]]) -> Iterator[RawRow | Dropped]:
    header: list[str] = []
    for number, cells in enumerate(rows, start=1):
        values = [_cell_text(cell.value) for cell in cells]
        while values and values[-1] is None:
            values.pop()
        place = f"{path.name}:{name}:{number:,}"
        if not values:
            continue
        error = next((cell.value for cell in cells if cell.value is not None and cell.data_type == "e"), None)
        if not header:
            header = _sheet_header(path, name, values)
        elif error is not None:
            yield Dropped(place, RowFault.UNREADABLE, f"has a cell with the error {error}")
        elif len(values) > len(header):
            told = f"has a value in column {len(values)} where the header has {len(header)}"
            yield Dropped(place, RowFault.UNREADABLE, told)
        else:
            yield RawRow(dict(zip(header, values + [None] * (len(header) - len(values)), strict=True)), place)


def _sheet_header(path: Path, name: str, values: Sequence[str | None]) -> list[str]:
    if None in values:
        told = f"column {values.index(None) + 1} of sheet {name!r} has no name. Give every column one, and unmerge the"
        raise FileFault(path, f"{told} first row's cells: merged, they are one name for several columns.")
    return _checked_header(path, [value or "" for value in values])


def _cell_text(value: Any) -> str | None:
    """As Excel shows it without a format: 15 digits of a number, a day without a time where it is midnight."""
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float):
        return f"{value:.15g}"
    if isinstance(value, datetime.datetime):
        return value.isoformat(" ").removesuffix(" 00:00:00")
    return str(value)


def _read_folder(folder: Path) -> Iterator[RawRow | Dropped]:
    """A dataset that `datasets` saved, or texts: each a row, or several where it is long, in the order of names."""
    files = files_in(folder)
    if not files:
        raise FileFault(folder, "is a folder, and neither one of texts nor one that save_to_disk wrote. Name a file.")
    return _arrow_rows(files, folder.name) if (folder / SAVED).is_file() else _texts_of(folder, files)


def _texts_of(folder: Path, files: Sequence[Path]) -> Iterator[RawRow | Dropped]:
    for path in files:
        within = path.parent.relative_to(folder)
        rows = 0
        for row in read_file(path) if path.stat().st_size else ():
            rows += 1
            yield dataclasses.replace(row, place=str(within / row.place))
        if not rows:
            yield Dropped(str(within / f"{path.name}:1"), RowFault.EMPTY_TEXT, "is a file without a text")


def _read_txt(path: Path) -> Iterator[RawRow | Dropped]:
    """The file is one text, its line ends made \\n and blank lines at both ends left off.

    A long one comes in rows of TEXT_CHARACTERS or a little more that end with a paragraph (with a line, where there is
    no paragraph's end for twice as long), and all but the last one `continue`.
    """
    refuse_bad_bytes(path)
    kept: list[str] = []
    start, held, blank = 0, 0, 0  # the first line of this row, its characters, and the blank lines met since its last
    for number, line in enumerate(lines_of(path), start=1):
        line = line.removesuffix("\r")
        if not line.strip():
            blank += 1
            kept += [line] if kept else []
            continue
        if held >= TEXT_CHARACTERS and (blank or held >= 2 * TEXT_CHARACTERS):
            yield RawRow({"text": "\n".join([*kept, ""])}, f"{path.name}:{start:,}", continues=True)
            kept, held = [], 0
        start = start if kept else number
        kept.append(line)
        held += len(line) + 1
        blank = 0
    if kept:
        yield RawRow({"text": "\n".join(kept[: len(kept) - blank])}, f"{path.name}:{start:,}")


READERS: dict[str, Callable[[Path], Iterator[RawRow | Dropped]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_txt,
    ".md": _read_txt,
}
