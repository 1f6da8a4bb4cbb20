"""The sample rows of the medical, support, style and tools demos: made by their scripts, and held out in earnest."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtune.data.formats import FORMATS
from qtune.data.formats.tool_calls import faults_of
from qtune.data.rows import Conversation, Example, RawRow, parse_row
from qtune.data.tokenize import answer_of
from qtune.evaluate.metrics import METRICS
from qtune.recipe.load import load

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import build_medical_data  # noqa: E402
import build_style_data  # noqa: E402
import build_support_data  # noqa: E402
import build_tools_data  # noqa: E402

Rows = list[dict[str, Any]]
MAKERS: dict[str, Callable[[], tuple[Rows, Rows]]] = {
    "medical": build_medical_data.rows,
    "support": build_support_data.rows,
    "style": build_style_data.rows,
    "tools": build_tools_data.rows,
}
LARGEST_BYTES = {"tools": 600_000}  # tools stand in every row
OTHERS_BYTES = 200_000


def demo_files(domain: str) -> tuple[Path, Path]:
    data = load(ROOT / "recipes" / f"{domain}.toml", demo=True).data
    assert data.held_out is not None
    return Path(data.train), Path(data.held_out)


def asked(row: dict[str, Any], place: str) -> Example:
    if "messages" in row:
        item = parse_row(RawRow(row, place), FORMATS["messages"], {}, None)
        assert isinstance(item, Conversation), item
        question = next(message.content for message in reversed(item.messages) if message.role == "user")
        return Example([1, 2], [-100, 2], [1], question, answer_of(item.messages[-1]), place)
    prompt, answer = row.get("prompt", row.get("question", "")), row.get("completion", row.get("answer", ""))
    return Example([1, 2], [-100, 2], [1], prompt, answer, place, json.dumps(row["check"]) if "check" in row else "")


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


@pytest.mark.parametrize("domain", MAKERS)
def test_the_files_are_what_the_script_makes(domain: str) -> None:
    for path, made in zip(demo_files(domain), MAKERS[domain](), strict=True):
        assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == made
        assert path.stat().st_size <= LARGEST_BYTES.get(domain, OTHERS_BYTES)


@pytest.mark.parametrize("domain", MAKERS)
def test_references_score_1_and_empty_answers_and_copies_of_the_question_0(domain: str) -> None:
    metric = METRICS[load(ROOT / "recipes" / f"{domain}.toml", demo=True).evaluate.metric]
    for number, row in enumerate(MAKERS[domain]()[1], start=1):
        example = asked(row, f"{domain}:{number}")
        assert metric.fault_of is None or metric.fault_of(example) is None
        assert metric.marks(example.answer, example).score == 1.0
        is_silent = domain == "tools" and "<tool_call>" not in example.answer  # who calls nothing is right
        assert metric.marks("", example).score == is_silent
        assert metric.marks(example.prompt_text, example).score == is_silent


def test_what_the_medical_questions_are_about_is_new() -> None:
    train, held_out = build_medical_data.rows()
    questions = {row["question"] for row in train}
    assert not questions & {row["question"] for row in held_out}
    drugs = {row["about"] for row in held_out if row["question"].startswith(("Name the", "My doctor"))}
    assert len(drugs) > 70
    assert not drugs & {row["about"] for row in train}
    unanswered = {row["about"] for row in held_out if row["answer"] == build_medical_data.NO_ANSWER}
    assert len(unanswered) > 20
    assert not unanswered & {row["about"] for row in train}


def test_untaught_drugs_have_no_ending_of_a_taught_class() -> None:
    """Else the right answer would be that class, and abstaining would be a mistake."""
    endings = re.compile(
        r"(pril|sartan|olol|dipine|azosin|statin|gliptin|gliflozin|[an]tide|glutide|prazole|tidine|conazole|floxacin"
        r"|cillin|cycline|penem|vir|azepam|barbital|caine|cur(on)?ium|triptan|setron|terol|[ai]sone|olone|onide|mab"
        r"|tinib|rubicin|platin|xaban|parin|afil|dronate)$"
    )
    taught = [drug for names in build_medical_data.DRUGS_BY_CLASS.values() for drug in names.split()]
    assert not set(taught) & set(build_medical_data.UNTAUGHT_DRUGS.split())
    like = [drug for drug in build_medical_data.UNTAUGHT_DRUGS.split() if endings.search(drug)]
    assert like == []


def test_held_out_tickets_have_new_orders_and_articles_and_half_of_them_new_complaints() -> None:
    train, held_out = build_support_data.rows()
    seen = set().union(*(words(row["prompt"]) for row in train))
    assert not set(build_support_data.HELD_OUT_ARTICLES.split()) & seen
    assert all(not {word for word in words(row["prompt"]) if word.isdigit()} & seen for row in held_out)
    rules = build_support_data.RULES
    old, new = ([part for rule in rules for part in getattr(rule, of)] for of in ("complaints", "new_complaints"))
    assert not set(old) & set(new)
    assert {f"{rule.policy} {rule.next_step}" for rule in rules} == {row["check"]["policy"] for row in held_out}


def sentence_pattern(frame: str) -> str:
    """What every heavy sentence of a frame matches."""
    one_of = {
        "opening": build_style_data.OPENINGS,
        "weight": build_style_data.WEIGHTS,
        "verb": build_style_data.PLAIN_BY_VERB,
        "preposition": build_style_data.PLAIN_BY_PREPOSITION,
    }
    words = dict.fromkeys(("person", "number", "quality", "things", "room"), r"\w+")
    return frame.format(**words, **{name: f"(?:{'|'.join(choices)})" for name, choices in one_of.items()})


def test_held_out_sentences_have_new_people_things_rooms_and_frames() -> None:
    train, held_out = build_style_data.rows()
    stock = build_style_data.HELD_OUT
    new = {*stock.people, *stock.things, *map(str, stock.rooms)}
    assert not new & set().union(*(words(row["prompt"]) for row in train))
    for row in held_out:
        kept = words(row["completion"])
        assert all(kept & set(map(str, of)) for of in (stock.people, stock.things, stock.rooms))
    frames = [re.compile(sentence_pattern(frame), re.IGNORECASE) for frame in stock.frames]
    assert not any(frame.fullmatch(row["prompt"]) for row in train for frame in frames)
    assert all(any(frame.fullmatch(row["prompt"]) for frame in frames) for row in held_out)
    assert len({row["prompt"] for row in held_out}) == len(held_out)


def test_a_person_is_no_thing_and_none_is_listed_twice() -> None:
    """Else what is asked of one part could stand in another as its plural."""
    people, things = build_style_data.PEOPLE.split(), build_style_data.THINGS.split()
    singular = [*people, *(thing.removesuffix("s") for thing in things)]
    assert len(set(singular)) == len(singular)


def test_settings_are_chosen_by_sentences_that_do_not_ship(tmp_path: Path) -> None:
    file = tmp_path / "development.jsonl"
    script = ROOT / "scripts" / "build_style_data.py"
    subprocess.run([sys.executable, str(script), "--development", str(file)], check=True, capture_output=True)
    asked = [words(json.loads(line)["prompt"]) for line in file.read_text(encoding="utf-8").splitlines()]
    shipped = set().union(*(words(row["prompt"]) for part in build_style_data.rows() for row in part))
    assert len(asked) == build_style_data.HELD_OUT_ROWS
    assert all(len(row - shipped) == 3 for row in asked), "a person, a thing and a room of its own"


def test_a_plain_sentence_has_none_of_the_heavy_words() -> None:
    heavy = {*build_style_data.PLAIN_BY_VERB, *build_style_data.FIGURE_BY_NUMBER}
    heavy |= {word.strip() for word in build_style_data.WEIGHTS if word}
    for row in build_style_data.rows()[1]:
        assert not heavy & words(row["completion"])
        assert heavy & words(row["prompt"])


def test_the_orders_and_frames_of_calls_are_new_and_every_call_fits_its_tools() -> None:
    train, held_out = build_tools_data.rows()
    assert not {row["messages"][0]["content"] for row in train} & {row["messages"][0]["content"] for row in held_out}
    orders = [
        {number for row in part for number in re.findall(r"\d{3}", row["messages"][0]["content"])}
        for part in (train, held_out)
    ]
    assert len(orders[1]) > 90
    assert not orders[0] & orders[1]
    for row in (*train, *held_out):
        item = parse_row(RawRow(row, "r:1"), FORMATS["messages"], {}, None)
        assert isinstance(item, Conversation), item
        assert not [told for message in item.messages for told in faults_of(message.calls, item.tools)]
    silent = sum(not row["messages"][-1].get("tool_calls") for row in held_out)
    assert 40 <= silent <= 50
