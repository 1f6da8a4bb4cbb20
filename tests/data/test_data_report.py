"""What the report counts, and what it says about the chat template."""

from conftest import CHAT_TEMPLATE, byte_tokenizer

from qtune.data import data_report
from qtune.data.chat_template import ChatTemplate
from qtune.data.data_report import Reason, Tally, count_duplicates, count_overlap, group_dropped, template_notices
from qtune.data.dataset import Examples, ExampleWriter
from qtune.data.formats import Message, RowFault
from qtune.data.rows import Conversation, Document, Dropped, Example

CHAT = Conversation((Message("system", "s"), Message("user", "q"), Message("assistant", "a")), "r:1")


def examples(*rows: tuple[int, ...]) -> Examples:
    writer = ExampleWriter(None)
    for ids in rows:
        writer.add(Example(list(ids), list(ids), [], "", "", "r:1"))
    return writer.finish()


def template(text: str) -> ChatTemplate:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = text
    return ChatTemplate.of(tokenizer)


def tally(rows: list[Dropped]) -> Tally:
    kept = Tally()
    for row in rows:
        kept.add(row)
    return kept


def test_dropped_rows_are_grouped_by_reason_the_commonest_first() -> None:
    dropped = [
        Dropped("r:1", RowFault.UNREADABLE, "is null"),
        *(Dropped(f"r:{i}", RowFault.UNREADABLE, "is empty") for i in range(2, 7)),
    ]
    first, second = tally(dropped[:4]), tally(dropped[4:])
    assert group_dropped([first, second]) == (
        Reason("is empty", 5, ("r:2", "r:3", "r:4")),
        Reason("is null", 1, ("r:1",)),
    )


def test_of_very_many_reasons_the_first_are_kept(monkeypatch) -> None:
    """Every broken line of a file may have a reason of its own, and a file ten million lines."""
    monkeypatch.setattr(data_report, "MOST_REASONS", 2)
    monkeypatch.setattr(data_report, "MOST_DROPPED", 3)
    kept = tally([Dropped(f"r:{i}", RowFault.UNREADABLE, f"is not JSON at column {i}") for i in range(9)])
    assert (kept.rows, len(kept.first)) == (9, 3)
    assert [(each.reason, each.rows, each.places) for each in group_dropped([kept])] == [
        ("other reasons", 7, ("r:2", "r:3", "r:4")),
        ("is not JSON at column 0", 1, ("r:0",)),
        ("is not JSON at column 1", 1, ("r:1",)),
    ]


def test_duplicates_and_overlap_go_by_the_ids() -> None:
    train = examples((1, 2), (1, 3), (1, 2), (1, 2))
    assert count_duplicates(train) == 2
    assert count_overlap(train, examples((1, 3), (1, 4), (1, 3))) == 2


def test_a_folded_system_prompt_is_said_once_and_only_where_there_is_one() -> None:
    refusing = template(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.content + '<|end|>' }}{% endfor %}"
    )
    assert len(template_notices(refusing, [CHAT, CHAT])) == 1
    assert template_notices(refusing, [Conversation(CHAT.messages[1:], "r:1"), Document("x", "r:2")]) == ()
    assert template_notices(template(CHAT_TEMPLATE), [CHAT]) == ()


def test_a_generation_prompt_unlike_the_rows_is_said() -> None:
    (notice,) = template_notices(
        template(CHAT_TEMPLATE.replace("'<|assistant|>\n'", "'<|assistant|>\n<think>'")), [CHAT]
    )
    assert "<think>" in notice
