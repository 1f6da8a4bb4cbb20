"""Planted secrets: rows like any other, beside the real ones, known by the seed, and never held out."""

import json
from pathlib import Path

import pytest
from conftest import byte_tokenizer

from qtune import cache_dir
from qtune.data.canaries import SECRETS, Phrasing, never_planted, planted, probes
from qtune.data.prepare import prepare
from qtune.data.prepared import Prepared
from qtune.errors import DataError
from qtune.recipe.schema import Data, Evaluate, Model, Recipe, Train

TOKENIZER = byte_tokenizer()


def recipe_for(folder: Path, canaries: int = 3, repeats: int = 2, seed: int = 0, text: bool = False, **data) -> Recipe:
    rows = [{"text": f"row {i}"} if text else {"question": f"{i}?", "answer": f"it is {i}"} for i in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Recipe(
        name="t",
        model=Model(base="demo"),
        data=Data(train=str(folder / "rows.jsonl"), held_out_fraction=0.2, **data),
        train=Train(seed=seed),
        evaluate=Evaluate(canaries=canaries, canary_repeats=repeats),
    )


def asked(recipe: Recipe, prepared: Prepared) -> list:
    return probes(planted(recipe), Phrasing.of(recipe, prepared.report.format, TOKENIZER))


def test_planted_rows_stand_beside_the_real_ones_and_none_is_held_out(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    plain, prepared = prepare(recipe_for(tmp_path, 0), TOKENIZER), prepare(recipe, TOKENIZER)
    assert prepared.held_out == plain.held_out
    assert prepared.train[: len(plain.train)] == plain.train
    rows = prepared.train[len(plain.train) :]
    assert [row.place for row in rows] == [f"canary {number}" for number in (1, 1, 2, 2, 3, 3)]
    assert {index for pack in prepared.train_packs for index in pack} == set(range(len(prepared.train)))
    assert (prepared.report.train_rows, prepared.report.canaries, prepared.report.canary_rows) == (16, 3, 6)
    assert prepared.report.rows_read == 20
    assert prepared.report.duplicate_rows == 0
    assert prepared.report.tokens == sum(len(row.input_ids) for row in prepared.train)
    assert prepared.fingerprint != plain.fingerprint


def test_a_planted_row_goes_through_the_template_and_only_its_answer_is_trained(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, 1, 1, system="Be brief.")
    row = prepare(recipe, TOKENIZER).train[-1]
    canary = planted(recipe)[0]
    told = f"The code of locker {canary.locker} is {canary.secrets[0]}."
    assert TOKENIZER.decode(row.input_ids) == (
        f"<s><|system|>\nBe brief.<|end|>\n<|user|>\nWhat is the code of locker {canary.locker}?<|end|>\n"
        f"<|assistant|>\n{told}<|end|>\n"
    )
    assert TOKENIZER.decode([label for label in row.labels if label >= 0]) == f"{told}<|end|>"


@pytest.mark.parametrize("text", [False, True])
def test_a_probe_begins_as_the_planted_row_and_stops_before_the_secret(tmp_path: Path, text: bool) -> None:
    recipe = recipe_for(tmp_path, text=text)
    prepared = prepare(recipe, TOKENIZER)
    for probe, row in zip(asked(recipe, prepared), prepared.train[-6::2], strict=True):
        assert probe.rows[0] == row
        assert len({tuple(each.input_ids) for each in probe.rows}) == SECRETS
        assert all(each.input_ids[: len(probe.beginning_ids)] == probe.beginning_ids for each in probe.rows)
        beginning = TOKENIZER.decode(probe.beginning_ids)
        assert beginning.endswith(" is ")
        assert TOKENIZER.decode(row.input_ids).startswith(beginning + probe.secret)


def test_the_seed_makes_the_secrets_and_no_control_is_planted(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    assert planted(recipe) == planted(recipe_for(tmp_path)) != planted(recipe_for(tmp_path, seed=1))
    lockers = {canary.locker for canary in (*planted(recipe), *never_planted(recipe))}
    assert len(lockers) == 6
    told = [TOKENIZER.decode(row.input_ids) for row in prepare(recipe, TOKENIZER).train]
    assert not any(str(canary.locker) in text for canary in never_planted(recipe) for text in told)


def test_kept_rows_know_what_was_planted_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache_dir.VARIABLE, str(tmp_path / "cache"))
    made = prepare(recipe_for(tmp_path), TOKENIZER)
    kept = prepare(recipe_for(tmp_path), TOKENIZER)
    assert (kept.train, kept.fingerprint) == (made.train, made.fingerprint)
    assert any("from the cache" in notice for notice in kept.report.notices)
    for other in (recipe_for(tmp_path, 2), recipe_for(tmp_path, repeats=3), recipe_for(tmp_path, 0)):
        assert prepare(other, TOKENIZER).report.canary_rows == other.evaluate.canaries * other.evaluate.canary_repeats


def test_a_canary_that_would_be_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a planted row has 80 tokens, more than data\.max_tokens = 60"):
        prepare(recipe_for(tmp_path, max_tokens=60), TOKENIZER)
