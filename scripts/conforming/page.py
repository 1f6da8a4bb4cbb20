"""docs/models.md: a row for every architecture, proven or refused and why."""

import functools
import importlib.metadata
import inspect
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import get_args

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from conforming.proofs import Finding, Outcome

BAD: tuple[Outcome, ...] = ("our fault", "leaks", "wrong")
WORST_FIRST: tuple[Outcome, ...] = ("not made", *BAD, "refused", "not merged", "proven")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
LINE = r"^\| ([\w.-]+) \|[^|]*\| \*+([\w ]+)\*.*$"
LONGEST_REASON = 200  # characters of a sentence in a table
# Bases of today by the model type that their config.json says; of all others the one that transformers' own
# documentation names.
WELL_KNOWN = {
    "gemma3": "Gemma 3 4B, 12B and 27B",
    "gemma3_text": "Gemma 3 270M and 1B",
    "gemma3n": "Gemma 3n E2B and E4B",
    "gemma4": "Gemma 4",
    "gpt_oss": "gpt-oss 20B and 120B",
    "llama": "Llama 2 to 3.3, SmolLM 1 and 2, TinyLlama, Yi",
    "llama4": "Llama 4 Scout and Maverick",
    "ministral3": "Ministral 3",
    "mistral": "Mistral 7B, Nemo and Small",
    "mixtral": "Mixtral 8x7B and 8x22B",
    "phi3": "Phi-3, Phi-3.5 and Phi-4 mini",
    "qwen2": "Qwen2 and Qwen2.5, DeepSeek-R1-Distill-Qwen",
    "qwen3": "Qwen3 0.6B to 32B",
    "qwen3_5": "Qwen3.5",
    "qwen3_moe": "Qwen3 30B-A3B and 235B-A22B",
    "qwen3_next": "Qwen3-Next 80B-A3B",
    "smollm3": "SmolLM3 3B",
}
HEAD = """\
# Models

`scripts/conformance.py` makes a tiny model of random weights of every causal architecture that the installed
transformers has, and takes it through a run. Find the `model_type` that the config.json of a base says.

{versions}. {counts}.

**Proven** is an architecture of which all of this was shown, in float32 on the processor:

* training on NF4 in packs: the held-out loss of base and tuned, a document's logits in a pack with one neighbour and
  with another, and the gradients of a pack are those of plain transformers and peft, one document at a time, on the
  adapter that was written (to {exact:.0e} of a loss, of logits' spread, of gradients' norm);
* a greedy continuation of a prompt that is longer than a window of {window} is that of plain transformers and peft;
* every memory technique, on alone, leaves loss and gradients as they are. "Techniques" names those that are refused,
  by their setting in [memory];
* a run that goes on from a checkpoint ends with the same adapter, to the bit;
* `qtune merge` onto the base that was trained on proves itself.

"Loss" is how far the losses are apart, in nats. "Forecast" is the plan's bytes at the peak of a step beside those that
were counted. "Merge" is the mean divergence of the merged model from the live one, in nats. "GGUF" says whether
`qtune export` was shown to write a file of it. "A document a pass": documents would read each other in a pack, so each
has a pass of its own, and losses and steps are those of packs. "In 16 bits": its linears are of a class that
bitsandbytes leaves as it is.

**Refused** is an architecture that `qtune run` refuses before any work, with that sentence.

In layers that are not attention (gated delta nets, KDA, Mamba, short convolutions) documents of a pack are kept apart
by gathering those of like length into a batch, padded to the longest, at most twice their tokens. With
flash-linear-attention or mamba-ssm on a card their kernels get that batch. `cu_seq_lens` and `seq_idx`, by which some
of those kernels take a pack as it lies and without padding, are not handed to them: what is handed on differs between
families (transformers 5.23), is an error where one of the packages is missing, and could not be tried without a card.

What is tiny here says nothing of whether a base fits on a card: `qtune plan` does. Of three bases of today it said, for
examples of 2,048 tokens, rank 16, 64 GiB of host memory and the bases' published sizes (2026-12-01,
`scripts/bench_plan.py`; no card was measured):

| base | 8 GiB | 12 GiB | 24 GiB |
|---|---|---|---|
| Qwen3.5-4B | 22 of 32 layers recomputed | 9 recomputed | nothing needed |
| Qwen3.5-9B | 31 of 32 recomputed, embedding in host memory | 25 recomputed | nothing needed |
| Qwen3.5-27B | all recomputed, 51 of 64 streamed, embedding in host memory | 31 streamed | 59 recomputed |

| model type | bases | outcome | loss | techniques | forecast | merge | GGUF |
|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """An architecture and what was found of it; `made_as` is the model type of its text model, where that was made."""

    kind: str
    findings: tuple[Finding, ...]
    made_as: str = ""

    @property
    def outcome(self) -> Outcome:
        """The worst of its findings."""
        return min((finding.outcome for finding in self.findings), key=WORST_FIRST.index)

    @property
    def faults(self) -> str:
        """What is wrong, the worst alone."""
        return "; ".join(
            finding.fault for finding in self.findings if finding.fault and finding.outcome == self.outcome
        )

    def told(self, step: str) -> str:
        return next((finding.told for finding in self.findings if finding.step == step), "")

    def outcome_told(self) -> str:
        """`proven`, or what it is and why."""
        if self.outcome == "proven":
            how = ["a document a pass"] if self.told("trained") != "packed" else []
            how += ["in 16 bits"] if self.told("held") == "16 bits" else []
            return ", ".join(["*proven*", *how, *([f"as {self.made_as}"] if self.made_as else [])])
        return (
            f"{'*refused*, because' if self.outcome == 'refused' else f'**{self.outcome}**:'} {shortened(self.faults)}"
        )

    def line(self) -> str:
        steps = [self.told(step) for step in ("loss", "techniques", "forecast", "merge", "gguf")]
        cells = (self.kind, bases(self.kind), self.outcome_told(), *steps)
        return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def shortened(sentences: str) -> str:
    """The first sentence, or so much of it as has room in a table."""
    first = re.split(r"(?<=[.;]) ", " ".join(sentences.split()))[0].rstrip(".;")
    return first if len(first) <= LONGEST_REASON else first[:LONGEST_REASON].rsplit(" ", 1)[0] + " ..."


@functools.cache
def bases(kind: str) -> str:
    """Bases of this model type that people know, or the one that transformers' own documentation names."""
    if kind in WELL_KNOWN:
        return WELL_KNOWN[kind]
    made = CONFIG_MAPPING[kind]
    source = inspect.getsource(sys.modules[made.__module__])
    before = source[: source.find(f"class {made.__name__}(")]
    named = re.findall(r'auto_docstring\(\s*checkpoint="([^"]+)"', before[-400:])
    return named[-1] if named else ""


def counts(outcomes: Iterable[Outcome]) -> str:
    """`142 architectures: 98 proven, 44 refused`."""
    tally = Counter(outcomes)
    there = ", ".join(f"{tally[outcome]} {outcome}" for outcome in reversed(WORST_FIRST) if tally[outcome])
    return f"{tally.total()} architectures: {there}"


def page(rows: Sequence[Row], before: str = "") -> str:
    """All of it, in the order of model types; what was not made anew is as the page `before` has it."""
    from conforming import proofs, small_models

    lines = {match[1]: match[0] for match in re.finditer(LINE, before, re.MULTILINE)}
    lines |= {row.kind: row.line() for row in rows}
    table = "".join(f"{lines[kind]}\n" for kind in sorted(lines))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    head = HEAD.format(
        versions=f"{date.today()}, {versions}",
        counts=counts(outcomes(table).values()),
        exact=proofs.EXACT,
        window=small_models.WINDOW,
    )
    return head + table


def outcomes(text: str) -> dict[str, Outcome]:
    """By model type, what a page says of it."""
    told = {match[1]: match[2] for match in re.finditer(LINE, text, re.MULTILINE)}
    return {kind: outcome for kind, outcome in told.items() if outcome in get_args(Outcome)}
