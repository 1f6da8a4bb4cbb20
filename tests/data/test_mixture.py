"""Which rows are held out: as many as asked for, the same ones for a seed, and never all of them."""

import json
from pathlib import Path

import pytest
from conftest import byte_tokenizer

from qtune.data.mixture import held_out_of
from qtune.data.prepare import Prepared, prepare
from qtune.data.rows import Example
from qtune.data.sources import Source
from qtune.errors import DataError
from qtune.recipe.schema import Data, Model, Recipe, Train


def data(fraction: float) -> Data:
    return Data(train="rows.jsonl", held_out_fraction=fraction)


def test_as_many_as_asked_for_in_order_and_the_same_ones_for_a_seed() -> None:
    apart = held_out_of(200, False, data(0.1), 7)
    assert len(apart) == 20
    assert apart == sorted(set(apart))
    assert set(apart) <= set(range(200))
    assert apart == held_out_of(200, False, data(0.1), 7)
    assert apart != held_out_of(200, False, data(0.1), 8)


def test_a_share_is_one_row_at_the_least_and_none_where_none_is_wanted() -> None:
    assert len(held_out_of(3, False, data(0.01), 0)) == 1
    assert held_out_of(3, False, data(0.0), 0) == []


@pytest.mark.parametrize(
    ("is_text", "words"), [(False, "usable rows are 1. Lower it, add rows"), (True, "the text makes 1 piece of up to")]
)
def test_one_row_cannot_be_parted(is_text: bool, words: str) -> None:
    with pytest.raises(DataError, match=words):
        held_out_of(1, is_text, data(0.05), 0)


def four(folder: Path, **of_third: object) -> list[dict[str, object]]:
    """Sources of four formats: chats, a CSV with other columns, instructions, and texts of a folder."""
    chats = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes " * (i % 5 + 1)}]}
        for i in range(40)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    (folder / "qa.csv").write_text("asked,told\n" + "".join(f"q{i},a{i}\n" for i in range(20)))
    (folder / "tasks.json").write_text(
        json.dumps([{"instruction": f"do {i}", "input": "", "output": f"done {i}"} for i in range(30)])
    )
    (folder / "notes").mkdir()
    for i in range(8):
        (folder / "notes" / f"{i}.md").write_text(f"Note {i}. " + "Some general words. " * i)
    return [
        {"train": str(folder / "chats.jsonl")},
        {"train": str(folder / "qa.csv"), "columns": {"prompt": "asked", "completion": "told"}, "system": "Be brief."},
        {"train": str(folder / "tasks.json"), **of_third},
        {"train": str(folder / "notes")},
    ]


def made(sources: list[dict[str, object]], seed: int = 0, **data: object) -> Prepared:
    recipe = Recipe(
        name="t", model=Model(base="demo"), data=Data(sources=sources, max_tokens=256, **data), train=Train(seed=seed)
    )
    return prepare(recipe, byte_tokenizer())


def source_of(row: Example) -> str:
    name = row.place.split(":")[0].split(" ")[0]
    return "notes" if name.endswith(".md") else name


def test_sources_of_four_formats_are_read_each_in_its_own_way(tmp_path: Path) -> None:
    prepared = made(four(tmp_path, max_rows=10), held_out_fraction=0.2)
    figures = {each.name: (each.format, each.rows_read, each.held_out_rows) for each in prepared.report.sources}
    assert figures == {
        "chats.jsonl": ("messages", 40, 8),
        "qa.csv": ("prompt-completion", 20, 4),
        "tasks.json": ("alpaca", 10, 2),
        "notes": ("text", 8, 2),
    }
    assert prepared.report.rows_read == 78 == len(prepared.train) + len(prepared.held_out)
    texts = {row.place: byte_tokenizer().decode(row.input_ids) for row in prepared.train}
    assert {"Be brief." in text for place, text in texts.items() if place.startswith("qa.csv")} == {True}
    assert {"Be brief." in text for place, text in texts.items() if not place.startswith("qa.csv")} == {False}
    assert prepared.report.source == "chats.jsonl, qa.csv, tasks.json, notes"
    assert prepared.report.format == "messages, prompt-completion, alpaca, text"


def test_packs_mix_the_sources_and_those_held_out_do_not(tmp_path: Path) -> None:
    prepared = made(four(tmp_path), held_out_fraction=0.3)
    apart = [{source_of(prepared.held_out[row]) for row in pack} for pack in prepared.held_out_packs]
    assert apart == [{name} for name in prepared.held_out_sources]
    assert sorted(row for pack in prepared.held_out_packs for row in pack) == list(range(len(prepared.held_out)))
    assert any(len({source_of(prepared.train[row]) for row in pack}) > 2 for pack in prepared.train_packs)


def test_one_source_is_what_data_train_would_be(tmp_path: Path) -> None:
    """To the row, the pack and the fingerprint, on which runs go on."""
    source = four(tmp_path)[0]
    alone = made([source])
    recipe = Recipe(name="t", model=Model(base="demo"), data=Data(train=source["train"], max_tokens=256))
    plain = prepare(recipe, byte_tokenizer())
    assert alone.fingerprint == plain.fingerprint
    assert (alone.train_packs, alone.held_out_packs) == (plain.train_packs, plain.held_out_packs)
    assert plain.report.sources == plain.held_out_sources == alone.held_out_sources[:0]
    assert plain.train.weights is alone.train.weights is None


def test_rows_from_the_cache_are_the_same_with_weights_and_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path / "cache"))
    sources = four(tmp_path)
    sources[1]["weight"] = 2.5
    first, again = made(sources), made(sources)
    assert "from the cache" in again.report.notices[-1]
    assert (again.train, again.train_packs, again.held_out_sources) == (
        first.train,
        first.train_packs,
        first.held_out_sources,
    )
    assert again.report.sources == first.report.sources
    assert first.train.weights is not None
    assert again.train.weights is not None
    assert (again.train.weights == first.train.weights).all()
    assert {first.train.weight(i) for i, row in enumerate(first.train) if row.place.startswith("qa.csv")} == {2.5}
    assert {first.train.weight(i) for i, row in enumerate(first.train) if not row.place.startswith("qa")} == {1.0}
    sources[1]["weight"] = 2.0
    assert not any("from the cache" in notice for notice in made(sources).report.notices)


def tokens_by_source(prepared: Prepared) -> dict[str, int]:
    return {each.name: each.tokens for each in prepared.report.sources}


def test_a_share_beside_whole_sources_is_that_of_all_tokens(tmp_path: Path) -> None:
    sources = four(tmp_path)
    whole = tokens_by_source(made(sources))
    sources[3]["share"] = 0.2
    prepared = made(sources)
    shared = tokens_by_source(prepared)
    assert {name: shared[name] for name in shared if name != "notes"} == {n: whole[n] for n in whole if n != "notes"}
    assert 0.14 < shared["notes"] / sum(shared.values()) <= 0.2
    assert prepared.report.sources[3].left_out_rows > 0
    assert [row.place for row in made(sources).train] == [row.place for row in prepared.train]
    assert [row.place for row in made(sources, seed=1).train] != [row.place for row in prepared.train]


def test_where_all_have_shares_no_source_runs_short_of_its_own(tmp_path: Path) -> None:
    sources = four(tmp_path)
    for source, share in zip(sources, (0.2, 0.1, 0.1, 0.1), strict=True):  # they count by their sum
        source["share"] = share
    tokens = tokens_by_source(made(sources))
    total = sum(tokens.values())
    assert tokens["chats.jsonl"] / total == pytest.approx(0.4, abs=0.06)
    assert all(tokens[name] / total == pytest.approx(0.2, abs=0.06) for name in ("qa.csv", "tasks.json", "notes"))


def test_a_source_too_small_for_its_share_is_refused_with_one_that_would_do(tmp_path: Path) -> None:
    sources = four(tmp_path)
    sources[3]["share"] = 0.9
    with pytest.raises(
        DataError, match=r"^data\.sources\.3\.share = 0\.9: .*notes has .* lower it to 0\.\d+, add"
    ) as told:
        made(sources)
    sources[3]["share"] = float(str(told.value).split("lower it to ")[1].split(",")[0])
    assert made(sources).report.sources[3].left_out_rows <= 1


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", r"empty\.txt: is empty"),
        ("\n\n", r"^data\.sources\.4\.train: .*empty\.txt: holds no rows\.$"),
        ("Only this.", r"^data\.sources\.4\.train: .*empty\.txt: data\.held_out_fraction = 0\.05 leaves nothing"),
    ],
)
def test_a_source_that_gives_nothing_is_named(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "empty.txt").write_text(content)
    with pytest.raises(DataError, match=told):
        made([*four(tmp_path), {"train": str(tmp_path / "empty.txt")}])


def test_a_source_may_keep_all_of_its_rows(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("Only this.")
    prepared = made([*four(tmp_path), {"train": str(tmp_path / "one.txt"), "held_out_fraction": 0.0}])
    assert (prepared.report.sources[4].train_rows, prepared.report.sources[4].held_out_rows) == (1, 0)
    assert "one.txt" not in prepared.held_out_sources


def test_columns_that_a_source_does_not_have_are_told_under_its_key(tmp_path: Path) -> None:
    sources = four(tmp_path)
    sources[1]["columns"] = {"prompt": "askd", "completion": "told"}
    with pytest.raises(DataError, match=r'^data\.sources\.1\.train: .*: data\.sources\.1\.columns\.prompt = "askd"'):
        made(sources)


def test_rows_of_data_held_out_are_those_of_no_source(tmp_path: Path) -> None:
    sources = four(tmp_path)
    (tmp_path / "apart.jsonl").write_text('{"question": "one", "answer": "two"}\n' * 3)
    prepared = made(sources, held_out=str(tmp_path / "apart.jsonl"))
    assert len(prepared.held_out) == 3
    assert prepared.held_out_sources == ()
    assert [each.held_out_rows for each in prepared.report.sources] == [0, 0, 0, 0]
    assert [each.train_rows for each in prepared.report.sources] == [40, 20, 30, 8]


def test_files_of_a_pattern_are_read_by_name_and_those_of_one_name_told_apart(tmp_path: Path) -> None:
    for folder, count in (("b", 2), ("a", 3)):
        (tmp_path / folder).mkdir()
        rows = [{"question": f"{folder}{i}", "answer": "x"} for i in range(count)]
        (tmp_path / folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pattern = Source(str(tmp_path / "*" / "rows.jsonl"))
    assert [row.place for row in pattern.read()] == [
        *(f"a/rows.jsonl:{i}" for i in (1, 2, 3)),
        *(f"b/rows.jsonl:{i}" for i in (1, 2)),
    ]
    assert pattern.count_rows(None) == 5
    assert pattern.bytes == sum(path.stat().st_size for path in tmp_path.glob("*/rows.jsonl"))
    by_pattern = made([{"train": pattern.name, "held_out_fraction": 0.0}])
    apart = made([{"train": str(tmp_path / name / "rows.jsonl"), "held_out_fraction": 0.0} for name in ("a", "b")])
    assert by_pattern.fingerprint == apart.fingerprint
    assert [each.name for each in apart.report.sources] == ["a/rows.jsonl", "b/rows.jsonl"]
    assert [row.place for row in apart.train] == [row.place for row in by_pattern.train]
