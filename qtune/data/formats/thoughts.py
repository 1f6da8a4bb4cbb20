"""Thoughts within a text: what they stand between, in templates and in rows, and how they are told from the answer."""

import re

TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
    ("<|channel>thought", "<channel|>"),
)
_PAIRS = [(re.escape(begin), re.escape(end)) for begin, end in TAGS]
BEGIN = re.compile("|".join(begin for begin, _ in _PAIRS))
END = re.compile(r"(?:" + "|".join(end for _, end in _PAIRS) + r")\s*")
EMPTY = re.compile(r"\s*(?:" + "|".join(rf"{begin}\s*{end}" for begin, end in _PAIRS) + r")\s*")
# An empty thought, of which the generation prompt may have written the beginning.
OPENED_EMPTY = re.compile(rf"{EMPTY.pattern}|\s*{END.pattern}")
ANY = re.compile("|".join(rf"{begin}.*?{end}" for begin, end in _PAIRS), re.DOTALL)
CLOSED = "</think>"  # where the generation prompt has opened the thought, an answer begins within it


def parted(text: str) -> tuple[str, str]:
    """The thought at the beginning of a text, without its tags, and the answer; one of them may be empty.

    A thought that is opened and not closed is all there is, as where an answer was cut.
    """
    opened = BEGIN.match(text.lstrip())
    if opened:
        begin, end = next(pair for pair in TAGS if pair[0] == opened[0])
        thought, _, answer = text.lstrip().removeprefix(begin).partition(end)
        return thought.strip(), answer.lstrip()
    if CLOSED in text and not BEGIN.search(text):
        thought, _, answer = text.partition(CLOSED)
        return thought.strip(), answer.lstrip()
    return "", text
