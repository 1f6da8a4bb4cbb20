"""Hub datasets, without a hub: what was downloaded before is used, and what is missing is named at once."""

import json
import shutil
import time

import datasets
import huggingface_hub.constants
import pytest
from read_rows import read_rows

from qtune.errors import DataError, MachineError


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
