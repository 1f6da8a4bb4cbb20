"""Ranks that would not train one adapter are refused, field by field, before they begin."""

import json
import os
from pathlib import Path

from forked import Forked
from made_ranks import all_well, environment, free_port, launch
from stopped_runs import write_recipe

from qtune.distributed import agreement
from qtune.distributed.agreement import refuse_unlike, refuse_unshared
from qtune.distributed.ranks import ALONE, Ranks
from qtune.errors import UserError


def each_refusal(ranks: Ranks, folder: str) -> None:
    """Notes what this rank is refused with; rank 1 looks for the run's folder elsewhere in the last case."""
    place = Path(folder)
    said = {}
    same = {"train.learning_rate": 1e-4, "versions.torch": "2.13", "model.base": f"/home/{ranks.rank}"}
    cases = {
        "same": same,
        "other": same | ({"train.learning_rate": 2e-4, "versions.torch": None} if ranks.rank else {}),
        "hash": {"data_sha256": f"{ranks.rank}" * 64, "more": 1} if ranks.rank else {"data_sha256": "0" * 64},
    }
    for name, told in cases.items():
        said[name] = refused(lambda told=told: refuse_unlike(ranks, told))
    said["shared"] = refused(lambda: refuse_unshared(ranks, place))
    own = place / "own"
    own.mkdir(exist_ok=True)
    agreement.SEEN_WITHIN_SECONDS = 0.3
    said["unshared"] = refused(lambda: refuse_unshared(ranks, own if ranks.rank == 0 else own / "not"))
    (place / f"{ranks.rank}.json").write_text(json.dumps(said))


def refused(call) -> str:
    try:
        call()
    except UserError as fault:
        return str(fault).replace("/own/not", "/own")
    return ""


def test_ranks_that_differ_are_named_by_field(tmp_path: Path) -> None:
    all_well(launch(2, each_refusal, str(tmp_path)))
    said, also = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert said == also
    assert said["same"] == said["shared"] == ""
    assert said["other"].splitlines() == [
        "The ranks of this run do not have the same, so they would not train one adapter.",
        "  train.learning_rate: 0.0001 on rank 0; 0.0002 on rank 1",
        '  versions.torch: "2.13" on rank 0; unset on rank 1',
        "Start all with the same recipe, rows, base and versions.",
    ]
    assert '  data_sha256: "000000000000..." on rank 0; "111111111111..." on rank 1\n' in said["hash"]
    assert "  more: unset on rank 0; 1 on rank 1\n" in said["hash"]
    assert said["unshared"].startswith(f"{tmp_path / 'own'}")
    assert "rank 1 cannot see what rank 0 writes there." in said["unshared"]
    assert list((tmp_path / "own").iterdir()) == []


def test_a_run_of_ranks_with_different_recipes_is_refused_once(tmp_path: Path, tiny_base: Path) -> None:
    """As under a launcher, where all ranks print to one terminal."""
    write_recipe(tmp_path, tiny_base)
    port = free_port()
    with open(os.devnull) as nothing, (tmp_path / "told").open("w+") as told:
        streams = [nothing.fileno(), told.fileno(), told.fileno()]
        words = ["-m", "qtune", "run", "t.toml", "--output", "refused", "--set"]
        both = [
            Forked([*words, f"train.learning_rate=1e-{3 + rank}"], streams, tmp_path, environment(rank, 2, port))
            for rank in range(2)
        ]
        assert [process.wait(120) for process in both] == [2, 2]
    said = (tmp_path / "told").read_text()
    assert said.count("train.learning_rate: 0.001 on rank 0; 0.0001 on rank 1") == 1
    assert not (tmp_path / "refused").exists()


def test_one_process_agrees_with_itself(tmp_path: Path) -> None:
    refuse_unlike(ALONE, {"a": 1})
    (tmp_path / ".shared-0123").touch()  # left by a first rank that was killed just then
    refuse_unshared(ALONE, tmp_path)
    assert list(tmp_path.iterdir()) == []
