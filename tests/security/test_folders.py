"""Folders from anybody: what is refused, and in which words."""

import json
from pathlib import Path

import pytest

from qtune.errors import ModelError, RunFolderError
from qtune.model.untrusted_folder import refuse_link_outside
from qtune.recipe.base_kind import INDEX_NAME, fault_of, weight_files
from qtune.rundir import RunDir


def test_a_folder_of_pickles_says_what_would_work(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    told = "pytorch_model.bin is a pickle"
    assert told in str(fault_of(tmp_path))
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert told in str(fault_of(tmp_path))
    assert "`save_pretrained` it, which writes safetensors" in str(fault_of(tmp_path, needs_weights=False))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("../x.safetensors", "outside its folder"),
        ("/x.safetensors", "outside its folder"),
        ("x\0.safetensors", "outside its folder"),
        ("pytorch_model.bin", r"not \.safetensors"),
        (3, "no weight_map"),
    ],
)
def test_an_index_names_safetensors_beside_it(tmp_path: Path, name: object, says: str) -> None:
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match=says):
        weight_files(tmp_path)


def test_a_base_that_is_an_adapter_is_refused(tmp_path: Path) -> None:
    """transformers would load the base that the adapter names, wherever that is."""
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "is an adapter" in str(fault_of(tmp_path))


def test_links_of_the_hubs_cache_are_followed_and_others_are_not(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "c0ffee", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "a").write_text("{}")
    (tmp_path / "secret").write_text("x")
    (snapshot / "config.json").symlink_to("../../blobs/a")
    (snapshot / "LICENSE").symlink_to("../../secret")
    refuse_link_outside(snapshot / "config.json")
    with pytest.raises(ModelError, match=r"is a link to .*secret, outside its folder"):
        refuse_link_outside(snapshot / "LICENSE")


def test_a_run_folder_with_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("kept")
    run = tmp_path / "run"
    run.mkdir()
    (run / "lock.json").write_text("{}")
    (run / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl: is a link"):
        RunDir.open(run)
