"""Hub datasets, without a hub: what was downloaded before is used, and what is missing is named at once."""

import json
import shutil
import time

import datasets
import huggingface_hub.constants
import pytest
from conftest import byte_tokenizer
from read_rows import read_rows

from qtune.data import sources
from qtune.data.prepare import prepare
from qtune.data.sources import Source
from qtune.errors import DataError, MachineError
from qtune.recipe.schema import Data, Model, Recipe


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """No hub behind a closed port, and a cache that holds the dataset `someone/rows` as a download leaves it."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    for settings in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(settings, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"x": "1"}\n{"x": "2"}\n')
    datasets.load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path))
    built = next((tmp_path / "json").rglob("json-train.arrow"))
    folder = tmp_path / "someone___rows" / "default" / "0.0.0" / "commit"
    folder.mkdir(parents=True)
    shutil.copy(built, folder / "rows-train.arrow")
    described = json.loads((built.parent / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**described, "dataset_name": "rows"}))


def test_a_dataset_downloaded_before_needs_no_network(cache) -> None:
    found = read_rows("someone/rows")
    assert [row.values for row in found.rows] == [{"x": "1"}, {"x": "2"}]
    assert [row.place for row in found.rows] == ["someone/rows row 1", "someone/rows row 2"]


def test_an_unknown_split_names_those_there_are(cache) -> None:
    with pytest.raises(DataError, match=r"someone/rows: Unknown split .*\['train'\]"):
        read_rows("someone/rows", split="tarin")


def test_without_a_network_it_says_so_at_once(cache) -> None:
    """`datasets` tries for 23 seconds by itself."""
    start = time.monotonic()
    with pytest.raises(MachineError, match=r"someone/others: .*name the local file"):
        read_rows("someone/others")
    assert time.monotonic() - start < 10


def test_a_name_no_dataset_can_have(cache) -> None:
    with pytest.raises(DataError, match="has no such dataset"):
        read_rows("a//b/c.jsonlines")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that answers, and has `someone/rows` in a file of this machine: what streams it is the real part."""
    (tmp_path / "rows.jsonl").write_text('{"question": "a?", "answer": "b"}\n' * 3)
    build, files = datasets.load_dataset_builder, str(tmp_path / "rows.jsonl")
    kept = {"data_files": files, "cache_dir": str(tmp_path / "cache")}
    monkeypatch.setattr(sources, "_answers", lambda name: True)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, subset: build("json", subset, **kept))
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset, split: load("json", subset, split=split, **kept))


def opened(streaming: str = "auto", split: str = "train") -> Source:
    return Source.of_train(Data(train="someone/rows", train_split=split, streaming=streaming))


def test_a_large_dataset_is_streamed_and_gives_the_same_rows(hub, tmp_path, monkeypatch) -> None:
    downloaded = list(opened().read())
    assert isinstance(opened().dataset, datasets.Dataset)
    monkeypatch.setattr(sources, "_bytes_of", lambda info, split: sources.DOWNLOADED_BYTES + 1)
    shutil.rmtree(tmp_path / "cache")
    streamed = opened()
    assert isinstance(streamed.dataset, sources.Streamed)
    assert list(streamed.read()) == list(streamed.read()) == downloaded
    assert list(streamed.read(2)) == downloaded[:2]
    assert streamed.fingerprint == opened().fingerprint is not None
    assert not list(tmp_path.rglob("*.arrow"))
    assert isinstance(opened("never").dataset, datasets.Dataset)


def test_tokens_of_a_streamed_dataset_are_kept(hub, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path / "tokens"))
    recipe = Recipe(name="t", model=Model(base="demo"), data=Data(train="someone/rows", streaming="always"))
    first, again = prepare(recipe, byte_tokenizer()), prepare(recipe, byte_tokenizer())
    assert first.fingerprint == again.fingerprint
    assert "from the cache" in again.report.notices[-1]


def test_a_split_that_is_not_there_and_a_hub_that_stops_answering(hub, tmp_path) -> None:
    with pytest.raises(DataError, match=r"someone/rows: Bad split: tarin. Available splits: \['train'\]"):
        opened("always", "tarin")
    source = opened("always")
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(MachineError, match=r"gave no more rows \(FileNotFoundError.* data\.streaming = \"never\""):
        list(source.read())


def test_the_size_is_that_of_the_split() -> None:
    info = datasets.DatasetInfo(splits={"train": {"name": "train", "num_bytes": 7}}, download_size=9)
    assert sources._bytes_of(info, "train") == 7
    assert sources._bytes_of(info, "test") == 9
    assert sources._bytes_of(datasets.DatasetInfo(), "train") is None
