"""The program that renders chat templates, in a process of its own that `template_process` starts, watches and ends.

A template is a program by whoever published the base. Here it has jinja2's sandbox, the processor time and the memory
that it was given, and nothing of the process that trains: no environment, no secrets, no file it could write to.

JSON lines come in and go out. The first line in is the settings, answered by `{}`. Every further one is a list of
conversations, read whole before the first answer is written, as both sides would wait for one another otherwise. Each
conversation is answered by a line of its own, {"text": ...} or {"fault": ...}. Too much time ends the process by
SIGPROF, too much memory by the exit status that the settings name.

Of qtune it imports `subprocess_limits` alone. Its arguments are the folders in which to look for that and for jinja2.
"""

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

if __name__ == "__main__":
    sys.path.extend(sys.argv[1:])

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from qtune.subprocess_limits import limit

FLUSH_SECONDS = 0.02
FAULT_CHARACTERS = 300


class GenerationBlock(Extension):
    """`{% generation %}` marks what the assistant wrote; here it is written and not marked."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own spelling)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: Callable[[], str]) -> str:
        return caller()


class DictFunction:
    """`dict(...)` and `dict.fromkeys(...)`, without the class behind them."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class PublicNamespace(Namespace):
    """`namespace(...)`, whose names may not begin with an underscore."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _refuse_private(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}, which begins with an underscore")


def raise_exception(message: str) -> None:
    raise TemplateError(message)


def as_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.cache
def compiled(source: str) -> Template:
    """The template in what transformers gives one: `PreTrainedTokenizerBase.apply_chat_template`, version 5."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = as_json
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=lambda format: datetime.now().strftime(format),
        dict=DictFunction(),
        namespace=PublicNamespace,
    )
    return environment.from_string(source)


def main() -> None:
    """Answer until there is no more to read."""
    settings = json.loads(sys.stdin.buffer.readline())
    limit(settings["memory_bytes"])
    with open(sys.stdout.fileno(), "wb", buffering=1 << 16) as answers:
        answers.write(b"{}\n")
        answers.flush()
        for line in sys.stdin.buffer:
            for answer in answered(json.loads(line), settings, answers.flush):
                answers.write(answer)
            answers.flush()


def answered(
    conversations: list[dict[str, Any]], settings: dict[str, Any], flush: Callable[[], None]
) -> Iterator[bytes]:
    """A line for each conversation; `flush` is called now and then, so that slow ones are seen to move."""
    flushed = time.monotonic()
    for conversation in conversations:
        if time.monotonic() - flushed > FLUSH_SECONDS:
            flush()
            flushed = time.monotonic()
        # Time that this process runs, not that passes: a busy machine must not decide which rows are trained on.
        signal.setitimer(signal.ITIMER_PROF, settings["cpu_seconds"])
        try:
            template = compiled(settings["template"])
            text = template.render(**{**settings["variables"], "tools": None, "documents": None, **conversation})
            yield as_line({"text": text})
        except MemoryError:
            os._exit(settings["out_of_memory_status"])
        except Exception as fault:  # a template is a program, and fails in as many ways as one
            yield as_line({"fault": told(fault)})
    signal.setitimer(signal.ITIMER_PROF, 0)


def as_line(answer: dict[str, str]) -> bytes:
    """Raises UnicodeEncodeError for text with half a character in it."""
    return json.dumps(answer, ensure_ascii=False).encode() + b"\n"


def told(fault: Exception) -> str:
    lines = str(fault).splitlines() or [type(fault).__name__]
    return lines[0][:FAULT_CHARACTERS].encode(errors="backslashreplace").decode()


if __name__ == "__main__":
    main()
