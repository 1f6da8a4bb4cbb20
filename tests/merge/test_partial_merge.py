"""A merge that was broken off goes on, to the bit, and never with what was made from something else."""

import json
import os
import shutil
import signal
from collections import namedtuple
from pathlib import Path
from typing import Any

import forked
import pytest
from made_runs import edit_json, make_run, token_rows
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qtune.errors import MachineError, ModelError, RunFolderError
from qtune.merge.merge import merge
from qtune.merge.output_folder import SPARE_DISK_BYTES
from qtune.merge.partial_merge import Staging
from qtune.rundir import RunDir

SHARDS = 6
Usage = namedtuple("Usage", "total used free")
CHILD = """\
import json, os, signal, sys
from pathlib import Path
from qtune.merge.merge import merge
from qtune.rundir import RunDir

run, output, onto, stop_at, rows = sys.argv[1:]

def stop(done, total, name):
    if done == int(stop_at):
        os.kill(os.getpid(), signal.SIGKILL)

merge(RunDir(Path(run)), Path(output), onto, "float16", json.loads(rows), stop)
"""


@pytest.fixture(scope="module")
def run(tiny_base, tmp_path_factory) -> RunDir:
    folder = tmp_path_factory.mktemp("sharded")
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(folder / "base", max_shard_size="100KB")
    for path in tiny_base.glob("*"):
        if not path.name.startswith("model.") and not (folder / "base" / path.name).exists():
            shutil.copy(path, folder / "base")
    assert len(list((folder / "base").glob("*.safetensors"))) == SHARDS
    return make_run(folder / "run", folder / "base")


@pytest.fixture
def own_run(run, tmp_path) -> RunDir:
    """One that a test may change."""
    shutil.copytree(run.path, tmp_path / "run")
    return RunDir(tmp_path / "run")


def contents(folder: Path) -> dict[str, bytes]:
    """All but the report, which has the time it took."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "merge_report.json"}


def staging_of(output: Path) -> Path:
    return output.parent / f".{output.name}.merging"


def break_off(run: RunDir, output: Path, at: int, fault: OSError | None = None, **settings: Any) -> str:
    """Merge until the tensor `at` is done; what is said then."""

    def stop(done: int, total: int, name: str) -> None:
        if done == at:
            raise fault or KeyboardInterrupt

    with pytest.raises(MachineError if isinstance(fault, OSError) else KeyboardInterrupt) as stopped:
        merge(run, output, progress=stop, **{"onto": "dequantised", "dtype": "float16", **settings})
    return str(stopped.value)


def go_on(run: RunDir, output: Path, **settings: Any) -> list[str]:
    """What the user hears; the result must be that of an undisturbed merge."""
    heard: list[str] = []
    settings = {"onto": "dequantised", "dtype": "float16", **settings}
    report = merge(run, output, say=heard.append, **settings)
    plain = output.parent / "undisturbed"
    expected = merge(run, plain, **settings)
    assert contents(output) == contents(plain)
    assert report.layers == expected.layers
    assert not staging_of(output).exists()
    return heard


def test_killed_twice_inside_shards_it_is_the_merge_that_was_not_killed(run, tmp_path) -> None:
    """Once in the first of the two bases that `auto` tries, once in the second; nothing in the process had a say."""
    output, rows = tmp_path / "out", token_rows()
    for stop_at in (8, 21 + 13):
        done = forked.run(["-c", CHILD, run.path, output, "auto", str(stop_at), json.dumps(rows)])
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not output.exists()
    (heard,) = go_on(run, output, onto="auto", rows=rows)
    finished = int(heard.rpartition("shard ")[2].split()[0]) - 1
    assert SHARDS < finished < 2 * SHARDS
    assert heard.endswith(f"from shard {finished + 1} of {2 * SHARDS}.")


@pytest.mark.parametrize("at", [1, 7, 14, 21])
def test_it_goes_on_from_wherever_it_was_stopped(run, tmp_path, at) -> None:
    output = tmp_path / "out"
    break_off(run, output, at)
    finished = len(list(staging_of(output).glob("*.safetensors.json")))
    assert len(list(staging_of(output).rglob("*.safetensors"))) == finished
    assert len(go_on(run, output)) == (finished > 0)


def test_finished_shards_are_not_made_again(run, tmp_path) -> None:
    output = tmp_path / "out"
    break_off(run, output, 14)
    kept = {path: path.stat().st_mtime_ns for path in staging_of(output).rglob("*.safetensors")}
    break_off(run, output, 20)
    assert len(kept) >= 2
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.parametrize("damage", ["changed", "cut", "gone", "record", "added"])
def test_a_broken_shard_is_made_again(run, tmp_path, damage) -> None:
    output = tmp_path / "out"
    break_off(run, output, 18)
    shard = sorted(staging_of(output).rglob("*.safetensors"))[1]
    content = shard.read_bytes()
    if damage == "changed":
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        os.truncate(shard, len(content) // 2)
    elif damage == "gone":
        shard.unlink()
    elif damage == "record":
        (staging_of(output) / f"dequantised.{shard.name}.json").write_text('{"glance_sha256": 3}')
    else:
        (shard.parent / "tokenizer.model").write_text("was never the base's")
    go_on(run, output)


def changed_adapter(run: RunDir) -> dict[str, str]:
    path = run.adapter / "adapter_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path)
    return {}


def changed_scale(run: RunDir) -> dict[str, str]:
    edit_json(run.adapter / "adapter_config.json", lora_alpha=64)
    return {}


@pytest.mark.parametrize(
    "change",
    [changed_adapter, changed_scale, lambda run: {"dtype": "bfloat16"}, lambda run: {"onto": "original"}],
    ids=["adapter", "alpha", "dtype", "onto"],
)
def test_what_was_made_from_something_else_is_not_gone_on_with(own_run, tmp_path, change) -> None:
    output = tmp_path / "out"
    break_off(own_run, output, 18)
    assert go_on(own_run, output, **change(own_run)) == []


def test_auto_goes_on_with_what_one_base_alone_had_finished(run, tmp_path) -> None:
    output = tmp_path / "out"
    break_off(run, output, 18)
    (heard,) = go_on(run, output, onto="auto", rows=token_rows())
    assert f"of {2 * SHARDS}." in heard


def test_one_that_broke_while_measuring_has_all_its_shards(run, tmp_path, monkeypatch) -> None:
    output, rows = tmp_path / "out", token_rows()

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("qtune.merge.merge.compare", stop)
        with pytest.raises(KeyboardInterrupt):
            merge(run, output, "auto", "float16", rows)
    (heard,) = go_on(run, output, onto="auto", rows=rows)
    assert heard.endswith(f"its {2 * SHARDS} shards are all there.")


def test_a_full_disk_keeps_what_is_finished_and_asks_for_the_rest_only(run, tmp_path, monkeypatch) -> None:
    output = tmp_path / "out"
    full = OSError(28, "No space left on device")
    said = break_off(run, output, 18, full, dtype="float32")
    assert said.endswith(
        "No space left on device). Finished shards are kept: put that right, and give the same command again."
    )
    shards = list(staging_of(output).rglob("*.safetensors"))
    whole = sum(path.stat().st_size for path in (run.path.parent / "base").glob("*.safetensors"))
    there = sum(path.stat().st_size for path in shards)
    free = SPARE_DISK_BYTES + whole - there
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 2**40, free))
    with pytest.raises(MachineError, match="the merge needs"):
        merge(run, tmp_path / "other", "dequantised", "float32")
    merge(run, output, "dequantised", "float32")


def test_what_would_be_refused_again_leaves_nothing(own_run, tmp_path) -> None:
    """Half of it was finished when a weight was found that float16 cannot hold."""
    path = own_run.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].fill_(1e9)
    save_file(tensors, path)
    with pytest.raises(ModelError, match="not finite"):
        merge(own_run, tmp_path / "out", "dequantised", "float16")
    assert not staging_of(tmp_path / "out").exists()


def test_two_at_a_time_are_refused(run, tmp_path) -> None:
    output = tmp_path / "out"
    with Staging.open(output, {}, (), ()), pytest.raises(RunFolderError, match="another qtune is merging into it"):
        merge(run, output, "dequantised")
    assert merge(run, output, "dequantised").onto == "dequantised"


def test_without_a_right_to_write_it_is_said(run, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"out: cannot be made"):
        merge(run, tmp_path / "file" / "out", "dequantised")
