"""Rows that stand there twice, exactly or nearly.

A row is known by a 64-bit digest of its text, and by a MinHash signature (Broder 1997) over its shingles, the runs of
SHINGLE_CHARACTERS characters of the text in lower case: runs of characters and not of words, so that it works in
scripts without spaces. Of each slot 16 bits are kept (b-bit minwise hashing, Li and König 2010). Signatures lie in a
temporary file, 256 bytes a row; memory holds 8 bytes a row. Rows with one band of slots in common are candidates
(locality-sensitive hashing, Leskovec et al., Mining of Massive Datasets, chapter 3), and what counts is the share of
all slots that agree, an estimate of the Jaccard similarity with a standard error of 0.03 around 0.85.
"""

import hashlib
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray
from rensa import RMinHash

SHINGLE_CHARACTERS = 5
SLOTS, BANDS, SEED = 128, 16, 1
SLOTS_IN_BAND = SLOTS // BANDS  # rows 0.85 alike share a band with probability 0.994, and 0.7 alike with 0.61
SIGNATURE_BYTES = SLOTS * numpy.dtype(numpy.uint16).itemsize
CHUNK_ROWS = 1 << 14
NONE = -1
Signatures = NDArray[numpy.uint16]
Keys = NDArray[numpy.uint64]
Numbers = NDArray[numpy.int64]


@dataclass(frozen=True)
class Alike:
    """A row, an earlier one that it is like, both by number from 0, and how much, 0-1."""

    row: int
    earlier: int
    similarity: float


@dataclass(frozen=True)
class Marks:
    """What rows are known by, in bytes: 8 of digest and SIGNATURE_BYTES of signature a row."""

    digests: bytes
    signatures: bytes

    @classmethod
    def of(cls, whole: Sequence[str], compared: Sequence[str]) -> "Marks":
        """By their whole text, which makes rows the same, and by the part of it that makes them alike."""
        digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in whole)
        return cls(digests, _signatures(compared).tobytes() if compared else b"")


class Likeness:
    """Takes the marks of rows in order; afterwards says which repeat an earlier one."""

    def __init__(self) -> None:
        self._digests = array("Q")
        self._file = tempfile.TemporaryFile(prefix="qtune-check-")  # noqa: SIM115, __exit__ closes it

    def __enter__(self) -> "Likeness":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._digests)

    def add(self, marks: Marks) -> None:
        self._digests.frombytes(marks.digests)
        self._file.write(marks.signatures)

    def exact(self) -> Iterator[Alike]:
        """Rows whose text is that of an earlier row, the first one."""
        earlier = self._first_with_text()
        for row in numpy.flatnonzero(earlier != numpy.arange(len(self))):
            yield Alike(int(row), int(earlier[row]), 1.0)

    def near(self, similarity: float) -> Iterator[Alike]:
        """Rows with a text of their own that is at least so like an earlier row's, each beside one such row."""
        originals = numpy.flatnonzero(self._first_with_text() == numpy.arange(len(self)))
        like = numpy.full(len(self), NONE)
        shares = numpy.zeros(len(self), numpy.float32)
        for band in range(BANDS if len(originals) else 0):
            rows, earlier = (originals[ends] for ends in _with_same_key(self._band_keys(band)[originals]))
            is_open = like[rows] == NONE
            rows, earlier = rows[is_open], earlier[is_open]
            for at in range(0, len(rows), CHUNK_ROWS):
                some, others = rows[at : at + CHUNK_ROWS], earlier[at : at + CHUNK_ROWS]
                agreeing = (self._signatures_of(some) == self._signatures_of(others)).mean(axis=1)
                is_near = agreeing >= similarity
                like[some[is_near]], shares[some[is_near]] = others[is_near], agreeing[is_near]
        for row in numpy.flatnonzero(like != NONE):
            yield Alike(int(row), int(like[row]), float(shares[row]))

    def _first_with_text(self) -> Numbers:
        """For each row the first row with its text."""
        digests = numpy.array(self._digests, numpy.uint64)
        _, first, which = numpy.unique(digests, return_index=True, return_inverse=True)
        return first[which]

    def _band_keys(self, band: int) -> Keys:
        """One number for each row's slots of a band, read chunk by chunk: a mapped file would count as memory held."""
        keys = numpy.empty(len(self), numpy.uint64)
        columns = slice(band * SLOTS_IN_BAND, (band + 1) * SLOTS_IN_BAND)
        self._file.seek(0)
        for at in range(0, len(self), CHUNK_ROWS):
            block = self._file.read(CHUNK_ROWS * SIGNATURE_BYTES)
            slots = numpy.frombuffer(block, numpy.uint16).reshape(-1, SLOTS)[:, columns]
            halves = numpy.ascontiguousarray(slots).view(numpy.uint64)
            keys[at : at + len(halves)] = _mixed(_mixed(halves[:, 0]) + halves[:, 1])
        return keys

    def _signatures_of(self, rows: Numbers) -> Signatures:
        return numpy.frombuffer(b"".join(map(self._signature_bytes, rows.tolist())), numpy.uint16).reshape(-1, SLOTS)

    def _signature_bytes(self, row: int) -> bytes:
        self._file.seek(row * SIGNATURE_BYTES)
        return self._file.read(SIGNATURE_BYTES)


def _with_same_key(keys: Keys) -> tuple[Numbers, Numbers]:
    """Every row whose key an earlier row has, and the first such row."""
    order = numpy.argsort(keys, kind="stable")
    begins = numpy.append(True, keys[order][1:] != keys[order][:-1])
    first = order[numpy.maximum.accumulate(numpy.where(begins, numpy.arange(len(order)), 0))]
    return order[~begins], first[~begins]


def _signatures(texts: Sequence[str]) -> Signatures:
    """(rows, SLOTS) of the low 16 bits of each slot."""
    coded = [_codes(text) for text in texts]
    ends = numpy.cumsum([len(codes) for codes in coded])
    codes = numpy.concatenate(coded).astype(numpy.uint64)
    hashes = numpy.zeros(len(codes) - SHINGLE_CHARACTERS + 1, numpy.uint64)
    for at in range(SHINGLE_CHARACTERS):
        hashes = _mixed(hashes + codes[at : at + len(hashes)])
    is_inside = numpy.ones(len(codes), bool)
    for back in range(1, SHINGLE_CHARACTERS):
        is_inside[ends - back] = False  # a shingle from here would run into the next row
    counts = ends - (SHINGLE_CHARACTERS - 1) * numpy.arange(1, len(ends) + 1)
    offsets = numpy.append(0, counts).astype(numpy.uint64)
    kept = hashes[is_inside[: len(hashes)]]
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(kept, offsets, SLOTS, SEED)
    return numpy.array(matrix.to_rows(), numpy.uint32).astype(numpy.uint16)


def _codes(text: str) -> NDArray[numpy.uint32]:
    """Code points in lower case with single spaces, one shingle of them at the least."""
    plain = " ".join(text.lower().split()).ljust(SHINGLE_CHARACTERS)
    return numpy.frombuffer(plain.encode("utf-32-le"), numpy.uint32)


def _mixed(numbers: Keys) -> Keys:
    """Numbers spread over all 64 bits: two rounds of a multiplication by an odd number and a shift."""
    for factor in (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93):
        numbers = numbers * numpy.uint64(factor)
        numbers = numbers ^ (numbers >> numpy.uint64(32))
    return numbers
