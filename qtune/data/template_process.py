"""Chat templates rendered in a process of their own, with a limit on its time and one on its memory.

A template comes with a base and is a program: it may loop for ever or write until the memory is full. So it never runs
in the process that holds the model. What runs it is `template_worker`, started with the first conversation; one that
runs away is killed, its conversation is told apart, and the next one starts another child.
"""

import functools
import hashlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qtune.data.formats import Call, Message
from qtune.errors import MachineError, ModelError
from qtune.subprocess_limits import OUR_FOLDER, environment, python
from qtune.units import MIB, format_bytes

CPU_SECONDS, MEMORY_BYTES = 2, 256 * MIB
WALL_SECONDS, START_SECONDS = 20, 60  # for a process that waits its turn on a busy machine
OUT_OF_MEMORY = 77  # the exit status by which the worker says so; any that Python has no use for
WORKER = str(Path(__file__).with_name("template_worker.py"))
NINE = 9  # characters of the ids that Mistral's templates take
MAX_STOPS = 10  # rows that cost two seconds each
BATCH_BYTES = 1 << 18


class Untraceable(Exception):
    """A conversation that the template rejects, runs away with, or rewrites so that its answers cannot be found."""


@dataclass(frozen=True)
class Spelling:
    """How a template wants calls and thoughts: arguments as an object or as its JSON text, nothing said beside a call
    as "" or as null, ids of calls as they are or of nine characters (Mistral's). A thought stands under `thought_key`,
    or in the content where that is ""."""

    arguments_as_text: bool = False
    empty_content: str | None = ""
    nine_characters: bool = False
    thought_key: str = ""


@dataclass(frozen=True)
class Asked:
    """One conversation to render, with the generation prompt behind it or without; `tools` are JSON text."""

    messages: Sequence[Message]
    add_generation_prompt: bool = False
    tools: str = ""
    spelling: Spelling = Spelling()

    def as_json(self) -> str:
        turns = [_as_turn(message, self.spelling) for message in self.messages]
        asked: dict[str, Any] = {"messages": turns, "add_generation_prompt": self.add_generation_prompt}
        if self.tools:
            asked["tools"] = json.loads(self.tools)
        return json.dumps(asked, ensure_ascii=False)


def _as_turn(message: Message, spelling: Spelling) -> dict[str, Any]:
    """The message as transformers hands it to a template; no key but those it has, as templates ask for them."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thought and spelling.thought_key:
        turn[spelling.thought_key] = message.thought
    elif message.thought:
        turn["content"] = f"<think>\n{message.thought.strip()}\n</think>\n\n{message.content}"
    if message.calls:
        turn["content"] = turn["content"] or spelling.empty_content
        turn["tool_calls"] = [_as_call(call, spelling) for call in message.calls]
    if message.role == "tool":
        turn |= {"name": message.name, "tool_call_id": _as_id(message.call_id, spelling)}
    return turn


def _as_call(call: Call, spelling: Spelling) -> dict[str, Any]:
    arguments = call.arguments if spelling.arguments_as_text else json.loads(call.arguments)
    function = {"name": call.name, "arguments": arguments}
    return {"id": _as_id(call.id, spelling), "type": "function", "function": function}


def _as_id(own: str, spelling: Spelling) -> str:
    """Another id of nine characters for one of another length, the same for the same."""
    if not spelling.nine_characters or (len(own) == NINE and own.isalnum()):
        return own
    return hashlib.sha256(own.encode()).hexdigest()[:NINE]


class Stopped(Exception):
    """The child is gone, and this is what the template did, as a clause: `needs more than 256 MiB`."""


class Renderer:
    """One template with its variables, and the child that renders it. Not for several threads at once."""

    def __init__(self, template: str, variables: dict[str, Any]):
        self._made_of = template, variables
        self._settings = json.dumps(
            {
                "template": template,
                "variables": variables,
                "cpu_seconds": CPU_SECONDS,
                "memory_bytes": MEMORY_BYTES,
                "out_of_memory_status": OUT_OF_MEMORY,
            }
        )
        self._child: Child | None = None
        self._stops = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it starts a child of its own."""
        return Renderer, self._made_of

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Renderer":
        """The tokenizer's own, in what `tokenizer.apply_chat_template` would give the template."""
        return _renderer(tokenizer.get_chat_template(), json.dumps(tokenizer.special_tokens_map, default=str))

    def render(self, asked: Sequence[Asked]) -> list[str | Untraceable]:
        """The text of every conversation, or why it has none.

        Raises ModelError where the template ran away too often, MachineError where no child can be started.
        """
        return [text for batch in _batches(asked) for text in self._render(batch)]

    def _render(self, batch: list[str]) -> list[str | Untraceable]:
        """All in one go; where the child ends in the middle, one by one until it is plain which of them ends it."""
        texts: list[str | Untraceable] = []
        together = len(batch)
        while len(texts) < len(batch):
            child, self._child = self._child or Child(self._settings), None
            try:
                for reply in child.replies(batch[len(texts) : len(texts) + together]):
                    texts.append(reply["text"] if "text" in reply else _rejected(reply["fault"]))
                self._child = child  # every answer is read; one that was interrupted is not used again
            except Stopped as stop:
                if together == 1:
                    texts.append(self._stopped(stop))
                together = 1
        return texts

    def _stopped(self, stop: Stopped) -> Untraceable:
        """Raises ModelError for a template that has run away too often."""
        self._stops += 1
        if self._stops > MAX_STOPS:
            raise ModelError(
                f"model.chat_template: {stop}, on {self._stops} conversations by now. Give a simpler one in the recipe:"
                ' [model] chat_template = "template.jinja".'
            )
        return Untraceable(f"the chat template {stop}")


@functools.lru_cache(maxsize=8)
def _renderer(template: str, variables: str) -> Renderer:
    return Renderer(template, json.loads(variables))


def _rejected(fault: str) -> Untraceable:
    return Untraceable(f"the chat template rejects it ({fault})")


def _batches(asked: Sequence[Asked]) -> Iterator[list[str]]:
    """The conversations as JSON, in lists that end with the one that brings BATCH_BYTES together."""
    batch: list[str] = []
    held = 0
    for conversation in asked:
        batch.append(conversation.as_json())
        held += len(batch[-1])
        if held >= BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


class Child:
    """A running `template_worker`, killed when nobody holds this any more; it ends by itself where we were killed."""

    def __init__(self, settings: str):
        self._process = subprocess.Popen(
            python(WORKER, *_library_folders(), OUR_FOLDER),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment(),
            cwd="/",
            process_group=0,  # Ctrl-C is for us
        )
        self._rest = b""
        self.end = weakref.finalize(self, _end, self._process)
        try:
            self._write(settings)
            self._line(START_SECONDS)
        except (Stopped, OSError):
            self.end()
            raise MachineError(
                f"The process that renders chat templates does not start ({_status(self._process)}). It is"
                f" {sys.executable} with {WORKER}."
            ) from None

    def replies(self, batch: Sequence[str]) -> Iterator[dict[str, str]]:
        """One for each conversation, as they come; raises Stopped at the one that ended the child."""
        try:
            self._write(f"[{','.join(batch)}]")
            for _ in batch:
                yield json.loads(self._line(WALL_SECONDS))
        except (Stopped, OSError) as fault:
            self.end()
            raise Stopped(fault if isinstance(fault, Stopped) else _why(self._process)) from None

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def _line(self, seconds: float) -> bytes:
        """The next line; raises Stopped when the child ends before it, or it takes longer than `seconds`."""
        assert self._process.stdout is not None
        handle, parts, until = self._process.stdout.fileno(), [self._rest], time.monotonic() + seconds
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        while b"\n" not in parts[-1]:
            if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
                raise Stopped(f"is not done after {seconds} seconds")
            parts.append(os.read(handle, 1 << 16))
            if not parts[-1]:
                self._process.wait()
                raise Stopped(_why(self._process))
        end, _, self._rest = parts[-1].partition(b"\n")
        return b"".join([*parts[:-1], end])


def _library_folders() -> list[str]:
    """Where jinja2 and what it needs are found, wherever they were installed: the child looks nowhere else."""
    specs = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    return sorted({str(Path(spec.origin).parent.parent) for spec in specs if spec and spec.origin})


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def _why(process: subprocess.Popen[bytes]) -> str:
    if process.returncode == -signal.SIGPROF:
        return f"runs for more than {CPU_SECONDS} seconds"
    if process.returncode == OUT_OF_MEMORY:
        return f"needs more than {format_bytes(MEMORY_BYTES)}"
    return f"ends the process that renders it ({_status(process)})"


def _status(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"
