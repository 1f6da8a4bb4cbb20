"""A small file with one of each fault, and which line it is in."""

import json
from pathlib import Path

KEY, MAIL, CARD = "AKIAIOSFODNN7EXAMPLE", "joe.bloggs@acme.co", "4111 1111 1111 1111"
GOOD_LINES = 8
MAX_TOKENS = 256
# Every kind, with the line of faulty.jsonl that has it; overlap is in held_out.jsonl.
LINES = {
    "byte-order-mark": 1,
    "unreadable-row": 9,
    "missing-answer": 10,
    "empty-text": 11,
    "unknown-role": 12,
    "role-order": 13,
    "duplicate": 14,
    "near-duplicate": 15,
    "mojibake": 16,
    "lost-character": 17,
    "secret": 18,
    "personal-data": 19,
    "too-long": 20,
    "tool-call": 21,
    "wrong-shape": 22,
    "half-character": 23,
    "not-utf8": 24,
}


def chat(*turns: tuple[str, str]) -> str:
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}, ensure_ascii=False)


def good(number: int, end: str = ".") -> str:
    answer = f"Because of {number * 31} and {number**2} reasons, said {chr(97 + number) * 3}{end}"
    return chat(("user", f"Question {number * 7919}: how does item {number**3} differ?"), ("assistant", answer))


def write_faulty(folder: Path) -> None:
    """faulty.jsonl and held_out.jsonl, and a recipe over them, faulty.toml."""
    lines = [good(number) for number in range(1, GOOD_LINES + 1)]
    lines += [
        '{"messages": [}',
        chat(("user", "only asked")),
        chat(("user", "an empty one"), ("assistant", "")),
        chat(("user", "hello"), ("bot", "hello, you")),
        chat(("user", "first this"), ("user", "then that"), ("assistant", "both done")),
        lines[2],
        good(3, end="!"),
        chat(("user", "Wo ist das cafÃ© bitte?"), ("assistant", "Dort drüben.")),
        chat(("user", "What was lost \ufffd here"), ("assistant", "one character")),
        chat(("user", f"my key is {KEY}"), ("assistant", "do not say so")),
        chat(("user", f"write to {MAIL}"), ("assistant", f"I did, with card {CARD}")),
        chat(("user", "go on"), ("assistant", "word " * MAX_TOKENS)),
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [1]}]}',
        '{"messages": "none"}',
        chat(("user", "a half"), ("assistant", "HALF")).replace("HALF", "\\ud800"),
    ]
    gbk = chat(("user", "这是一个关于药物的问题，请回答。"), ("assistant", "好的，我来回答这个问题。"))
    whole = b"\xef\xbb\xbf" + ("\n".join(lines) + "\n").encode() + gbk.encode("gbk") + b"\n"
    (folder / "faulty.jsonl").write_bytes(whole)
    (folder / "held_out.jsonl").write_text(f"{lines[0]}\n{good(20)}\n")
    (folder / "faulty.toml").write_text(
        'name = "faulty"\n[model]\nbase = "demo"\n[data]\ntrain = "faulty.jsonl"\nheld_out = "held_out.jsonl"\n'
        f"max_tokens = {MAX_TOKENS}\n"
    )
