"""Which base it is: a hash that follows every byte, remembered until somebody writes to the weights."""

import json
import os
import shutil
import time
from pathlib import Path
from threading import Event
from typing import IO, Any

import pytest
from safetensors.torch import load_file, save_file

from qtune import cache_dir
from qtune.model import fingerprint

LONG_AGO = 1_600_000_000


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def kept(home: Path) -> list[Path]:
    return sorted((home / "bases").glob("*.json"))


@pytest.fixture
def folder(tiny_base, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A cache, for files that were last written before this second began."""
    monkeypatch.setenv(cache_dir.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "AT_REST_NS", -1_000_000_000)
    return tmp_path / "cache"


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """The files of weights that were opened."""
    seen: list[str] = []
    opened = Path.open

    def seen_open(path: Path, *mode: str, **options: Any) -> IO[Any]:
        if path.suffix == ".safetensors":
            seen.append(path.name)
        return opened(path, *mode, **options)

    monkeypatch.setattr(Path, "open", seen_open)
    return seen


def test_the_fingerprint_follows_the_weights(tiny_base, folder) -> None:
    assert fingerprint.fingerprint(folder) == fingerprint.fingerprint(tiny_base)
    flip_last_bit(folder / "model.safetensors")
    assert fingerprint.fingerprint(folder) != fingerprint.fingerprint(tiny_base)


def test_weights_are_hashed_once(folder, home, hashed) -> None:
    first = fingerprint.fingerprint(folder)
    assert hashed == ["model.safetensors"]
    assert fingerprint.fingerprint(folder) == first
    assert hashed == ["model.safetensors"]


def test_a_change_that_keeps_size_and_time_is_seen(folder, home) -> None:
    path = folder / "model.safetensors"
    os.utime(path, (LONG_AGO, LONG_AGO))
    first = fingerprint.fingerprint(folder)
    assert len(kept(home)) == 1
    flip_last_bit(path)
    os.utime(path, (LONG_AGO, LONG_AGO))
    assert fingerprint.fingerprint(folder) != first


def test_a_file_that_takes_the_place_of_another_is_seen(folder, home) -> None:
    first = fingerprint.fingerprint(folder)
    other = folder / "other"
    shutil.copy(folder / "model.safetensors", other)
    flip_last_bit(other)
    other.replace(folder / "model.safetensors")
    assert fingerprint.fingerprint(folder) != first


def test_a_shard_more_is_seen(folder, home) -> None:
    first = fingerprint.fingerprint(folder)
    shutil.copy(folder / "model.safetensors", folder / "more.safetensors")
    assert fingerprint.fingerprint(folder) != first


def test_what_was_written_just_now_may_be_written_again_unseen(folder, home, monkeypatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv(cache_dir.VARIABLE, str(home))
    (folder / "model.safetensors").touch()
    fingerprint.fingerprint(folder)
    assert kept(home) == []
    before = time.time_ns() - 10_000_000_000
    monkeypatch.setattr(fingerprint, "_last_change", lambda state: before)
    fingerprint.fingerprint(folder)
    assert len(kept(home)) == 1


def test_half_a_hash_is_not_kept(folder, home) -> None:
    stop = Event()
    stop.set()
    fingerprint.fingerprint(folder, stop)
    assert kept(home) == []


@pytest.mark.parametrize("damage", ["", "{", "[]", "3", '{"state": []}', '{"sha256": "0"}', "\udcff"], ids=repr)
def test_a_damaged_memory_is_made_again(folder, home, damage) -> None:
    first = fingerprint.fingerprint(folder)
    kept(home)[0].write_bytes(damage.encode(errors="surrogateescape"))
    assert fingerprint.fingerprint(folder) == first
    assert json.loads(kept(home)[0].read_text())["sha256"] == first


@pytest.mark.parametrize("asked", [cache_dir.OFF, "a file"])
def test_without_a_cache_it_is_hashed_each_time(folder, tmp_path, monkeypatch, hashed, asked) -> None:
    monkeypatch.setattr(fingerprint, "AT_REST_NS", -1_000_000_000)
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv(cache_dir.VARIABLE, asked if asked == cache_dir.OFF else str(tmp_path / asked))
    assert fingerprint.fingerprint(folder) == fingerprint.fingerprint(folder)
    assert hashed == ["model.safetensors"] * 2


def test_a_glance_tells_a_base_of_the_same_shapes_that_was_trained_further(tiny_base, folder) -> None:
    (folder / "tokenizer_config.json").unlink()
    assert fingerprint.glance(folder) == fingerprint.glance(tiny_base)
    weights = load_file(folder / "model.safetensors")
    moved = {name: weight + 1e-3 if "o_proj" in name else weight for name, weight in weights.items()}
    save_file(moved, folder / "model.safetensors", {"format": "pt"})
    assert (folder / "model.safetensors").stat().st_size == (tiny_base / "model.safetensors").stat().st_size
    assert fingerprint.glance(folder) != fingerprint.glance(tiny_base)


def test_a_glance_takes_a_file_that_is_smaller_than_one_of_its_pieces(tmp_path) -> None:
    seen = set()
    for content in (b"", b"a", b"b"):
        (tmp_path / "model.safetensors").write_bytes(content)
        seen.add(fingerprint.glance(tmp_path))
    assert len(seen) == 3
