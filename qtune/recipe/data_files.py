"""What names of files say that they hold, and what is read of a folder."""

import glob
import json
import os
from pathlib import Path

TEXT_SUFFIXES, PACKED_SUFFIXES = (".txt", ".md"), (".gz", ".xz", ".bz2", ".zst")
DATABASE_SUFFIXES, WORKBOOK_SUFFIX = (".db", ".sqlite", ".sqlite3"), ".xlsx"
TABLES_SUFFIXES = (*DATABASE_SUFFIXES, WORKBOOK_SUFFIX)  # of files that may hold several tables
ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", *TABLES_SUFFIXES)
DATA_SUFFIXES = (*ROW_SUFFIXES, *TEXT_SUFFIXES, *PACKED_SUFFIXES)
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"  # what save_to_disk of `datasets` writes beside its files


def files_of(path: Path) -> list[Path]:
    """The files that a name of rows stands for: one, what is read of a folder, or those that a pattern fits, by name;
    nothing where there are none."""
    if os.path.isdir(path):
        return files_in(path)
    if not is_pattern(path):
        return [path] if os.path.isfile(path) else []
    return [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(name)]


def is_pattern(path: Path) -> bool:
    """Whether a name has wildcards (*, ?, [a-c], ** for folders within) and is none of a file or folder."""
    return glob.has_magic(str(path)) and not os.path.lexists(path)


def files_in(folder: Path) -> list[Path]:
    """What is read of a folder: the files of a dataset that `datasets` saved there, or texts, also those in folders
    within; nothing where there are other files of rows, or no texts but a README.

    Hidden files are left alone.
    """
    if not os.path.isdir(folder):
        return []
    if (folder / SAVED).is_file():
        return _files_saved_in(folder)
    files = [path for path in sorted(folder.rglob("*")) if not _is_hidden(path.relative_to(folder)) and path.is_file()]
    kinds = [Path(path.stem if path.suffix.lower() in PACKED_SUFFIXES else path.name).suffix.lower() for path in files]
    texts = [path for path, kind in zip(files, kinds, strict=True) if kind in TEXT_SUFFIXES]
    has_rows = any(kind in ROW_SUFFIXES for kind in kinds)
    return texts if not has_rows and any(path.name != "README.md" for path in texts) else []


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _files_saved_in(folder: Path) -> list[Path]:
    try:
        named = json.loads((folder / SAVED).read_text(encoding="utf-8"))["_data_files"]
        return [folder / Path(each["filename"]).name for each in named]
    except (OSError, ValueError, LookupError, TypeError):
        return []
