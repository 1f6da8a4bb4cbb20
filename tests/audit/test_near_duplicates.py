"""Exact and near duplicates, against a Jaccard similarity counted by hand."""

import random

import pytest

from qtune.audit.near_duplicates import SHINGLE_CHARACTERS, Alike, Likeness, Marks

WORDS = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in "nrst"]


def prose(seed: int, words: int = 120) -> list[str]:
    return random.Random(seed).choices(WORDS, k=words)


def jaccard(one: str, other: str) -> float:
    sets = [{t[i : i + SHINGLE_CHARACTERS] for i in range(len(t) - SHINGLE_CHARACTERS + 1)} for t in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def added(*batches: list[str]) -> Likeness:
    likeness = Likeness()
    for batch in batches:
        likeness.add(Marks.of(batch, batch))
    return likeness


def test_exact_repeats_name_the_first_row_across_batches() -> None:
    with added(["a", "", "b"], [], ["a", "", "c", "a"]) as likeness:
        assert list(likeness.exact()) == [Alike(3, 0, 1.0), Alike(4, 1, 1.0), Alike(6, 0, 1.0)]
        assert len(likeness) == 7


def test_rows_of_one_text_and_two_wholes_are_near_and_not_exact() -> None:
    with Likeness() as likeness:
        likeness.add(Marks.of(["system a, text", "system b, text"], ["text", "text"]))
        assert list(likeness.exact()) == []
        assert list(likeness.near(0.9)) == [Alike(1, 0, 1.0)]


@pytest.mark.parametrize("changed_words", [1, 2, 3])
def test_near_rows_are_found_with_a_similarity_close_to_the_true_one(changed_words: int) -> None:
    texts = []
    for seed in range(40):
        words = prose(seed)
        texts += [" ".join(words), " ".join(["changed"] * changed_words + words[changed_words:])]
    with added(texts) as likeness:
        found = list(likeness.near(0.85))
    assert [(pair.row, pair.earlier) for pair in found] == [(2 * i + 1, 2 * i) for i in range(40)]
    off = [pair.similarity - jaccard(texts[pair.row], texts[pair.earlier]) for pair in found]
    assert abs(sum(off) / len(off)) < 0.02
    assert max(map(abs, off)) < 0.15


def test_strangers_are_not_near() -> None:
    with added([" ".join(prose(seed)) for seed in range(300)]) as likeness:
        assert list(likeness.near(0.7)) == []


def test_case_and_spaces_do_not_part_rows_and_short_ones_can_be_compared() -> None:
    with added(["Yes,  it IS", "yes, it is", "a", "b", "A "]) as likeness:
        assert [(pair.row, pair.earlier) for pair in likeness.near(0.85)] == [(1, 0), (4, 2)]


def test_scripts_without_spaces() -> None:
    text = "这是一个关于药物的问题请回答它的名字和用途以及常见的副作用和注意事项并说明理由"
    with added([text, text + "吗", "完全不同的一句话说的是天气和旅行"]) as likeness:
        assert [(pair.row, pair.earlier) for pair in likeness.near(0.85)] == [(1, 0)]


def test_no_rows_at_all() -> None:
    with Likeness() as likeness:
        assert list(likeness.exact()) == list(likeness.near(0.85)) == []
