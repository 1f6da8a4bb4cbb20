"""Every kind of fault a check knows: what it means and what would work."""

from dataclasses import dataclass

from qtune.data.formats import RowFault


@dataclass(frozen=True)
class Kind:
    """`clause` follows "3 of 3,000 rows", with {s}, {have} and {are} for its verb; `advice` is a sentence or two."""

    clause: str
    advice: str


# What makes a row of no use to a run; all else depends on data.max_tokens.
UNUSABLE = tuple(fault for fault in RowFault if fault not in (RowFault.NOTHING_TO_TRAIN, RowFault.TOO_LONG))
# What no run gets past.
WHOLE_FILE = ("unreadable-file", "not-utf8", "unknown-columns")

KINDS = {
    "unreadable-file": Kind("cannot be read", "Nothing behind this place was checked."),
    "not-utf8": Kind(
        "{are} not UTF-8 text",
        "Save the file as UTF-8. The rest of this check reads those lines as what they seem to be.",
    ),
    "unknown-columns": Kind("{have} columns that no format fits", "Nothing else was checked in this file."),
    "unreadable-row": Kind("cannot be read", ""),
    "missing-answer": Kind("lack{s} an answer", "There is nothing to learn from them."),
    "missing-prompt": Kind("lack{s} a prompt", ""),
    "unknown-role": Kind(
        "name{s} a role that does not exist",
        "Roles are system, user, assistant and tool; human, gpt, model, function_call, observation too.",
    ),
    "tool-call": Kind(
        "call{s} a tool in a way that cannot be read",
        "A call has a name and an object of arguments; its results follow, in the order of the calls.",
    ),
    "unknown-weight": Kind("{have} a weight other than 0 and 1", "An answer with 0 is read only, one with 1 trained."),
    "half-character": Kind("hold{s} half a character", ""),
    "empty-text": Kind("{have} an empty text", ""),
    "no-preference": Kind(
        "{have} no answer that is preferred to another",
        "A pair answers one question twice, and not in the same words. Take them out.",
    ),
    "wrong-shape": Kind("{have} another shape than the format", ""),
    "template-refuses": Kind("cannot be written with the chat template", ""),
    "nothing-to-train": Kind("{have} nothing to train", "A row needs a token after its first. Take them out."),
    "too-long": Kind(
        "{have} more tokens than data.max_tokens",
        "Raise data.max_tokens where memory allows (`qtune plan"
        ' --longest` says how far), or choose what data.on_long does with them: "drop" or "truncate".',
    ),
    "role-order": Kind(
        "{have} roles out of order",
        "Most templates are made for user and assistant in turn; look at one with `qtune data show`.",
    ),
    "system-moved": Kind(
        "{have} a system prompt, which the chat template does not know",
        "It is put before the first question. Leave it out if it should not be there, or choose a base that takes one.",
    ),
    "unknown-tool": Kind(
        "call{s} a tool that they do not have",
        "The model learns to call what is not there. Add it to the row's tools, or mend the name.",
    ),
    "bad-arguments": Kind(
        "call{s} a tool with arguments that it does not take",
        "The model learns to call it so. Mend the call, or the parameters that the row's tools name.",
    ),
    "duplicate": Kind("repeat{s} an earlier one", "Take them out, unless they are meant to weigh more."),
    "near-duplicate": Kind(
        "nearly repeat{s} an earlier one",
        "Fine where only a name differs by intent. Otherwise keep"
        " one of each; data.check.near_duplicate_similarity says what counts as near.",
    ),
    "overlap": Kind(
        "held out {are} trained on too", "The score would measure memory. Take them out of one of the two files."
    ),
    "near-overlap": Kind(
        "held out {are} nearly trained on", "The score may flatter. Hold out whole groups of like rows."
    ),
    "byte-order-mark": Kind(
        "begin{s} with a byte-order mark",
        "It is skipped, and other programs may stumble over it: save the file as UTF-8 without.",
    ),
    "lost-character": Kind(
        "hold{s} U+FFFD, a character that was lost",
        "The model learns to write it. Export them again from where they came from.",
    ),
    "mojibake": Kind(
        "look{s} read in the wrong encoding",
        "The model learns to write it. Export them again as UTF-8, or mend them with ftfy.",
    ),
    "secret": Kind(
        "seem{s} to hold a secret",
        "A model can recite what it learned. Take them out, and withdraw the secret if it is real. None is shown here.",
    ),
    "personal-data": Kind(
        "seem{s} to hold personal data",
        "A model can recite what it learned. Take them out or replace them unless they are public. None is shown here.",
    ),
}
