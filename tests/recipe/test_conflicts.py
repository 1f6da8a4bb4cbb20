"""Settings that have no effect beside others."""

import os
from pathlib import Path
from typing import Any

import pytest

from qtune.recipe.conflicts import Idle, idle, of_sources, same_rows, unlike_rows, with_optimizer

HUB = {"base": "org/model"}


@pytest.mark.parametrize(
    ("model", "data", "expected"),
    [
        ({"quantization": "none", "double_quantization": False}, {}, ["model.double_quantization"]),
        ({"quantization": "nf4", "double_quantization": False}, {}, []),
        ({"quantization": "none"}, {}, []),
        ({"base": "demo", "revision": "main"}, {}, ["model.revision"]),
        ({"base": "/models/x", "revision": "main"}, {}, ["model.revision"]),
        ({"revision": "main"}, {}, []),
        ({}, {"held_out": "org/other", "held_out_fraction": 0.1}, ["data.held_out_fraction"]),
        ({}, {"held_out_fraction": 0.1}, []),
        ({}, {"held_out_split": "test"}, ["data.held_out_split"]),
        ({}, {"held_out": "org/other", "held_out_split": "test"}, []),
        ({}, {"held_out": "/x.csv", "held_out_split": "test"}, ["data.held_out_split"]),
        ({}, {"train": "/x.csv", "train_split": "train", "subset": "a"}, ["data.train_split", "data.subset"]),
        ({}, {"train": "/x.csv", "held_out": "org/other", "subset": "a"}, []),
        ({}, {"train": "/x.csv", "held_out": "/x.db", "subset": "a"}, []),
        ({}, {"train": "/x.xlsx", "subset": "a"}, []),
        ({}, {"train": "/x.SQLITE", "subset": "a"}, []),
        ({}, {"train_split": "train", "subset": "a"}, []),
    ],
)
def test_idle_settings_are_found(model: dict[str, Any], data: dict[str, Any], expected: list[str]) -> None:
    found = list(idle({"model": HUB | model, "data": {"train": "org/data"} | data}))
    assert [".".join(setting.key) for setting in found] == expected
    assert all(setting.fault[1].endswith(". Leave it out.") for setting in found)


def test_repeats_of_no_canary_are_idle() -> None:
    assert [setting.key[-1] for setting in idle({"evaluate": {"canary_repeats": 3}})] == ["canary_repeats"]
    assert [setting.key[-1] for setting in idle({"evaluate": {"canary_repeats": 3, "canaries": 0}})] == [
        "canary_repeats"
    ]
    assert list(idle({"evaluate": {"canary_repeats": 3, "canaries": 1}})) == []


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"decay_fraction": 0.1}, ["decay_fraction"]),
        ({"schedule": "cosine", "decay_fraction": 0.1, "cycles": 3}, ["decay_fraction", "cycles"]),
        ({"schedule": "wsd", "decay_fraction": 0.1, "floor_fraction": 0.1}, []),
        ({"schedule": "cosine_restarts", "cycles": 3}, []),
        ({"schedule": "constant", "floor_fraction": 0.1}, ["floor_fraction"]),
        ({"floor_fraction": 0.1}, []),
        ({"optimizer": "schedule_free_adamw", "floor_fraction": 0.1}, ["floor_fraction"]),
    ],
)
def test_what_another_schedule_would_need_is_idle(train: dict[str, Any], expected: list[str]) -> None:
    assert [setting.key[-1] for setting in idle({"train": train})] == expected


@pytest.mark.parametrize(
    ("evaluate", "expected"),
    [
        ({"metric": "code_tests", "rows": 0}, ["metric"]),
        ({"metric": "none", "rows": 0}, []),
        ({"metric": "code_tests", "rows": 1}, []),
        ({"metric": "code_tests"}, []),
        ({"rows": 0}, []),
    ],
)
def test_a_metric_over_no_rows_is_idle(evaluate: dict[str, Any], expected: list[str]) -> None:
    """It passed in silence, and nothing was scored."""
    assert [setting.key[-1] for setting in idle({"evaluate": evaluate})] == expected


@pytest.mark.parametrize(
    ("train", "lora", "expected"),
    [
        ({"optimizer": "muon"}, {}, []),
        ({"optimizer": "muon"}, {"dora": True}, ["train.optimizer"]),
        ({"optimizer": "muon"}, {"train_tokens": ["<|im_end|>"]}, ["train.optimizer"]),
        ({"optimizer": "muon"}, {"dora": False, "train_tokens": [], "targets": ["q_proj"]}, []),
        ({"optimizer": "muon"}, {"targets": ["q_proj", "experts"]}, ["train.optimizer"]),
        ({"optimizer": "adamw"}, {"dora": True}, []),
        ({"optimizer": "schedule_free_adamw"}, {}, []),
        ({"optimizer": "schedule_free_adamw", "schedule": "constant"}, {}, []),
        (
            {"optimizer": "schedule_free_adamw", "schedule": "wsd"},
            {"master_dtype": "bfloat16"},
            ["train.schedule", "lora.master_dtype"],
        ),
    ],
)
def test_what_an_optimizer_cannot_be_beside_is_refused(train: dict, lora: dict, expected: list[str]) -> None:
    assert [".".join(key) for key, _ in with_optimizer({"train": train, "lora": lora})] == expected


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"model": 3, "data": [1]},
        {"data": {"train": 3, "held_out": {}}},
        {"train": {"optimizer": ["muon"]}, "lora": 3},
        {"train": {"optimizer": "muon"}, "lora": {"targets": 3, "dora": []}},
    ],
)
def test_values_of_any_shape_are_looked_at(values: dict[str, Any]) -> None:
    assert list(idle(values)) == []
    assert list(same_rows(values)) == []
    assert list(with_optimizer(values)) == []


def test_rows_cannot_be_trained_on_and_held_out() -> None:
    def count(**data: str) -> int:
        return len(list(same_rows({"data": data})))

    assert count(train="/x.csv", held_out="/x.csv") == 1
    assert count(train="org/a", held_out="org/a", held_out_split="train") == 1
    assert count(train="org/a", held_out="org/a") == 0
    assert count(train="/x.csv", held_out="/y.csv") == 0
    assert count(train="/x.csv") == 0


@pytest.mark.parametrize(
    ("train", "data", "evaluate", "told"),
    [
        ({"objective": "dpo"}, {"format": "alpaca"}, {}, 'data.format = "alpaca" does not go with train.objective'),
        ({}, {"format": "preferences"}, {}, 'one answer of a row. Of pairs, "dpo" and "orpo" learn.'),
        ({"objective": "orpo"}, {"on_long": "truncate"}, {}, "a preference that is cut is another one"),
        ({"objective": "orpo"}, {}, {"canaries": 2}, "planted rows are no pairs"),
        ({"objective": "dpo"}, {"format": "preferences", "on_long": "drop"}, {"canaries": 0}, None),
        ({"objective": "dpo"}, {"format": "auto"}, {}, None),
        ({"objective": ["dpo"]}, {"format": 3}, {}, None),
    ],
)
def test_rows_go_with_the_objective(train: dict, data: dict, evaluate: dict, told: str | None) -> None:
    faults = list(unlike_rows({"train": train, "data": data, "evaluate": evaluate}))
    assert len(faults) == (told is not None)
    assert told is None or told in faults[0][1]


@pytest.mark.parametrize(("objective", "faults"), [("dpo", 1), ("orpo", 0), ("sft", 0)])
def test_an_adapter_to_start_from_is_none_that_pairs_are_measured_against(objective: str, faults: int) -> None:
    """The reference is the base with no adapter on it, and the first loss would not be that of equals."""
    told = list(unlike_rows({"train": {"objective": objective}, "lora": {"start_from": "runs/a"}}))
    assert [key for key, _ in told] == [("lora", "start_from")] * faults


def test_what_pairs_alone_have_is_idle_without_them() -> None:
    data = {"columns": {"chosen": "a", "rejected": "b"}}
    assert [setting.key[-1] for setting in idle({"train": {"beta": 0.2}, "data": data})] == [
        "beta",
        "chosen",
        "rejected",
    ]
    assert list(idle({"train": {"objective": "dpo", "beta": 0.2}, "data": data})) == []


def told(**data: Any) -> list[str]:
    values = {"data": data}
    every = [*idle(values), *of_sources(values)]
    return [each.fault[1] if isinstance(each, Idle) else each[1] for each in every]


def test_sources_that_go_together_are_let_pass() -> None:
    first, second = {"train": "org/a", "share": 0.2}, {"train": "/b.db", "subset": "rows", "weight": 2}
    assert told(sources=[first, second], held_out="org/a") == []  # the split "test" of it
    assert told(sources=[first, {"train": "org/a", "train_split": "more"}]) == []
    assert told(sources=[{"train": "/b.db", "subset": "one"}, {"train": "/b.db", "subset": "two"}]) == []


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"train": "/a.csv", "sources": [{"train": "/b.csv"}]}, "data.train is there beside data.sources, and rows"),
        ({"sources": []}, "data.sources is empty, so there is nothing to train on. Write"),
        (
            {"sources": [{"train": "org/a"}, {"train": "org/b", "share": 0.1, "max_rows": 3}]},
            "data.sources.1.share and max_rows both say how much of this source is taken. Leave one out.",
        ),
        (
            {"sources": [{"train": "org/a"}, {"train": "org/b", "share": 0.5}, {"train": "org/c", "share": 0.6}]},
            "The shares of data.sources sum to 1.1, which leaves nothing for those that have none.",
        ),
        (
            {"sources": [{"train": "org/a", "train_split": "train"}, {"train": "org/a"}]},
            'data.sources.1.train: "org/a" is read by data.sources.0.train already. Leave one out.',
        ),
        (
            {"sources": [{"train": "org/a"}], "held_out": "org/a", "held_out_split": "train"},
            'data.held_out: "org/a" is read by data.sources.0.train already.',
        ),
        (
            {"sources": [{"train": "/a.csv", "train_split": "x"}, {"train": "org/b"}]},
            "data.sources.0.train_split has no effect on a file, which has no splits. Leave it out.",
        ),
        (
            {"sources": [{"train": "/a.csv", "subset": "x"}, {"train": "org/b"}]},
            "data.sources.0.subset has no effect on files other than",
        ),
        (
            {"sources": [{"train": "org/a", "held_out_fraction": 0.1}, {"train": "org/b"}], "held_out": "org/c"},
            "data.sources.0.held_out_fraction has no effect beside data.held_out.",
        ),
        ({"sources": [{"train": "org/a", "weight": 2}]}, "data.sources.0.weight has no effect on the only source."),
        ({"sources": [{"train": "org/a", "share": 0.5}]}, "data.sources.0.share has no effect on the only source."),
    ],
)
def test_sources_that_do_not_go_together_are_refused(data: dict[str, Any], expected: str) -> None:
    found = told(**data)
    assert len(found) == 1
    assert found[0].startswith(expected)


@pytest.mark.parametrize(
    ("more", "key"),
    [({"train": {"objective": "dpo"}}, "weight"), ({"lora": {"train_tokens": ["<a>"]}}, "train_tokens"), ({}, None)],
)
def test_what_has_no_place_for_weights_is_refused_beside_them(more: dict[str, Any], key: str | None) -> None:
    sources = [{"train": "org/a"}, {"train": "org/b", "weight": 2.0}]
    assert [fault[0][-1] for fault in of_sources({"data": {"sources": sources}, **more})] == [key] * (key is not None)


def test_the_same_file_is_found_through_a_link_a_pattern_and_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    for again in ("link.txt", "*.txt", ""):
        named = (str(tmp_path / "a.txt"), os.path.join(tmp_path, again).rstrip("/"))
        (found,) = told(sources=[{"train": name} for name in named])
        assert found.endswith(" is read by data.sources.0.train already. Leave one out.")


@pytest.mark.parametrize(
    "sources", [3, [3], {}, [{}], [{"train": 3, "share": "x", "max_rows": {}}], [[], {"share": True}]]
)
def test_sources_of_any_shape_are_looked_at(sources: Any) -> None:
    """What is no list of tables is told by the schema."""
    told(sources=sources)
