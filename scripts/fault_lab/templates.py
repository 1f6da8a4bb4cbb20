"""S4: a chat template that never ends or fills the memory is stopped, and the rows beside it are rendered."""

import random
import resource
from collections.abc import Iterator
from pathlib import Path

from fault_lab import stage
from qtune.data.formats import Message
from qtune.data.template_process import CPU_SECONDS, Asked, Renderer, Untraceable

WHAT = "templates that loop or explode are stopped at 2 s or 256 MiB, and the other rows are kept"
LOOPS = (
    "{{% for a in range({n}) %}}{{% for b in range({n}) %}}{{% endfor %}}{{% endfor %}}",
    "{{{{ (messages | length + {k}) ** ({k} ** {k}) }}}}",
    "{{% for a in range({n}) %}}{{% for b in range({n}) %}}{{% set c = a * b %}}{{% endfor %}}{{% endfor %}}",
)
EXPLOSIONS = (
    "{{{{ 'x' * {n} * {n} }}}}",
    "{{% for a in range({n}) %}}{{{{ 'x' * {n} }}}}{{% endfor %}}",
    "{{% set ns = namespace(t='{k}') %}}{{% for a in range(60) %}}{{% set ns.t = ns.t ~ ns.t %}}{{% endfor %}}",
    "{{{{ [0] * {n} * {n} }}}}",
    "{{{{ '%0{n}{n}d' % 1 }}}}",
)
TOLERATED = 0.5


def run(cases: int, seed: int, folder: Path) -> Iterator[str | None]:
    """One template a case: the second of three rows sets it off. A fifth of them loop, which takes two seconds each."""
    dice = random.Random(seed)
    tokenizer = stage.make_tokenizer()
    for case in range(cases):
        kind = LOOPS if case % 5 == 0 else EXPLOSIONS
        how = dice.choice(kind).format(n=dice.randrange(90_000, 99_999), k=dice.randrange(9, 99))
        tokenizer.chat_template = (
            f"{{% if messages[0].content == 'bad' %}}{how}{{% endif %}}{{{{ messages[0].content }}}}"
        )
        before = cpu_seconds_of_children()
        rows = Renderer.of(tokenizer).render([Asked([Message("user", text)]) for text in ("a", "bad", "b")])
        yield judged(how, rows, cpu_seconds_of_children() - before)


def judged(how: str, rows: list[str | Untraceable], cpu_seconds: float) -> str | None:
    if rows[0] != "a" or rows[2] != "b":
        return f"{how}: the rows beside it came back as {rows[0]!r} and {rows[2]!r}"
    if not isinstance(rows[1], Untraceable):
        return f"{how}: was rendered to {len(rows[1]):,} characters"
    most = 2 * (CPU_SECONDS + TOLERATED)  # once with its neighbours, once alone
    return f"{how}: took {cpu_seconds:.1f} s of processor time" if cpu_seconds > most else None


def cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
