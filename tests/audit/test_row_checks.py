"""What is seen in the text of a row, and in the order of its turns."""

import pytest
from conftest import byte_tokenizer
from made_faults import KEY, MAIL

from qtune.audit.issues import Groups
from qtune.audit.near_duplicates import Likeness
from qtune.audit.row_checks import HIDDEN, NOT_ASKED, NOT_SCORABLE, Seen, Taken, look_at, see_batch, see_roles
from qtune.data.chat_template import ChatTemplate
from qtune.data.formats import Call, Message
from qtune.data.formats.tool_calls import tools_text
from qtune.data.row_stream import Encoding
from qtune.data.rows import Conversation, Document
from qtune.data.tokenize import Encoder
from qtune.recipe.schema import Data

TOKENIZER = byte_tokenizer()


def chat(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Message(*turn) for turn in turns), "r:1")


def seen_of(*rows: Conversation | Document, taken: Taken | None = None, **data: object) -> Seen:
    template, wanted = ChatTemplate.of(TOKENIZER), Data(train="x", **data)
    with Likeness() as likeness:
        seen = Seen(likeness, taken or Taken())
        for batch in Encoding(Encoder.of(TOKENIZER), template, look_at).batches(rows, wanted):
            see_batch(batch, template, wanted, seen)
    return seen


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"my key is {KEY}", [("secret", "an AWS key")]),
        (f"write to {MAIL}", [("personal-data", "a mail address")]),
        ("what was \ufffd lost", [("lost-character", "what was \ufffd lost")]),
        (f"{MAIL} was \ufffd lost", [("personal-data", "a mail address"), ("lost-character", HIDDEN)]),
        ("nothing at all", []),
    ],
)
def test_what_is_wrong_with_a_text_is_told_and_nothing_private_shown(text: str, told: list[tuple[str, str]]) -> None:
    assert look_at([Document(text, "r:1")]).told == [told]


@pytest.mark.parametrize(
    ("roles", "clause"),
    [
        (("user", "assistant"), None),
        (("system", "user", "assistant"), None),
        (("user", "user", "assistant"), "user, user, assistant"),
        (("assistant", "user", "assistant"), "assistant, user, assistant"),
        (("user", "user") * 4 + ("assistant",), "user, user, user, user, user, user, …"),
    ],
)
def test_roles_that_are_not_in_turn_are_told(roles: tuple[str, ...], clause: str | None) -> None:
    group = seen_of(chat(*((role, "text") for role in roles))).groups.by_code.get("role-order")
    assert (group.places[0].told if group else None) == clause


@pytest.mark.parametrize(
    ("roles", "is_in_turn"),
    [
        (("user", "assistant", "tool", "tool", "assistant", "tool", "assistant", "user", "assistant"), True),
        (("user", "assistant", "tool", "user", "assistant"), False),
    ],
)
def test_results_stand_between_a_call_and_what_is_said_of_them(roles: tuple[str, ...], is_in_turn: bool) -> None:
    groups = Groups()
    see_roles(chat(*((role, "text") for role in roles)), None, groups)
    assert ("role-order" in groups.by_code) != is_in_turn


def test_calls_that_their_tools_do_not_allow_are_told() -> None:
    tools = tools_text([{"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}])
    calls = (Call("look", '{"at": 3}'), Call("see", "{}"))
    turns = (Message("user", "q"), Message("assistant", "", calls=calls))
    assert look_at([Conversation(turns, "r:1", tools=tools)]).told == [
        [
            ("bad-arguments", "calls look with at = 3, which is a number, not string"),
            ("unknown-tool", "calls see, which is none of its tools: look"),
        ]
    ]


def test_a_long_row_says_what_is_lost_and_a_text_is_cut_in_pieces() -> None:
    row = chat(("user", "q"), ("assistant", "a" * 99))
    seen = seen_of(row, Document("a word and more " * 9, "r:2"), max_tokens=60)
    (place,) = seen.groups.by_code["too-long"].places
    assert place.place == "r:1"
    assert place.told.endswith("; 100 of 100 trained ones are lost")
    assert (seen.lost_trained_tokens, seen.cut.texts) == (100, 1)
    assert len(seen.taken.rows) == seen.cut.pieces > 1
    assert set(seen.taken.rows) == {NOT_ASKED}


def test_a_row_that_cannot_be_scored_keeps_its_place() -> None:
    taken = Taken(lambda asked: "has no tests")
    seen_of(chat(("user", "q"), ("assistant", "a")), taken=taken)
    assert list(taken.rows) == [NOT_SCORABLE]
    assert (taken.faults[0].place, taken.faults[0].told) == ("r:1", "has no tests")
