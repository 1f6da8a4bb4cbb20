"""The command line: one verb of `qtune.commands` is chosen, refused early or done.

Exit codes: 0 done, 2 something the user can put right, 3 a run that does not fit, 1 our fault or a run that could not
be finished, 130 and 143 after Ctrl-C and SIGTERM.
"""

import argparse
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from qtune import __version__
from qtune.commands.verb import Verb
from qtune.errors import QtuneError, UserError
from qtune.fast_imports import settle_own_process
from qtune.registry import registered

EXAMPLES = """\
start here:
  qtune run medical --demo          a real QLoRA run in minutes, on any machine, nothing downloaded
  qtune recipes copy medical my.toml
  qtune check my.toml               is the recipe right, is the data?
  qtune data check my.toml          everything that is wrong with the rows, by file and line
  qtune plan my.toml                will it fit, how, and what it costs
  qtune run my.toml                 train it, watch it, score it
  qtune resume runs/my-...          go on with it after Ctrl-C, a crash or a power cut
  qtune ls                          the runs so far; qtune rm takes one off the disk
  qtune chat runs/my-...            talk to it
  qtune eval runs/my-...            score it again, or on public benchmarks
  qtune export runs/my-...          a GGUF file of it, for llama.cpp and Ollama
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns its exit code."""
    settle_own_process()
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what fits behind what was typed
        from qtune.commands import completion

        completion.answer(parser)
    options = parser.parse_args(arguments)
    if options.verb is None:
        parser.print_help()
        return 0
    signal.signal(signal.SIGTERM, _terminate)
    verb: Verb = options.chosen
    try:
        verb.refuse(options)
        return verb.act(options) or 0
    except UserError as fault:
        return _told(options, verb.said(fault, options), fault.exit_code)
    except QtuneError as fault:
        return _told(options, str(fault), fault.exit_code)
    except KeyboardInterrupt as stop:
        return _told(options, str(stop) or "Stopped.", 128 + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as fault:
        said = _machines_fault(fault)
        return _told(options, said, UserError.exit_code) if said else _told(options, _our_fault(fault), 1)


def _told(options: argparse.Namespace, sentence: str, exit_code: int) -> int:
    """Say why this ends, unless another rank of the same run says it; returns the exit code."""
    ranks = getattr(options, "ranks", None)
    if ranks is None or ranks.fail(sentence, exit_code):
        print(sentence, file=sys.stderr)
    return exit_code


def _terminate(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def _machines_fault(fault: Exception) -> str | None:
    """That a card fell out in the middle, where it did."""
    if "torch" not in sys.modules:
        return None
    from qtune import card_faults

    said = card_faults.why_gone(fault)
    return None if said is None else card_faults.told("The card", said)


def _our_fault(fault: Exception) -> str:
    """Keep the traceback in a file, and say where; bytes run out for everyone, so that is said plainly."""
    with tempfile.NamedTemporaryFile("w", prefix="qtune-", suffix=".txt", delete=False, encoding="utf-8") as file:
        traceback.print_exception(fault, file=file)
    kind = type(fault).__name__
    return f"qtune failed, and the fault is ours: {kind}: {fault}\nThe details are in {file.name}."


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, as argparse sees it."""
    parser = _Parser(
        prog="qtune",
        description="QLoRA fine-tuning on one consumer GPU.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"qtune {__version__}")
    _add(parser.add_subparsers(dest="verb", metavar="verb"), registered("qtune.commands", Verb).values())
    return parser


def _add(group: Any, verbs: Iterable[Verb]) -> None:
    """Have argparse know `verbs`; what is typed comes back with the verb as `chosen`."""
    for verb in verbs:
        text = verb.help[0].upper() + verb.help[1:] + "."
        parser = group.add_parser(verb.name, help=verb.help, description=text)
        parser.set_defaults(chosen=verb, parser=parser)
        if verb.answers_json:
            parser.add_argument("--json", action="store_true", help="print the answer as JSON")
        verb.arguments(parser)
        if verb.actions:
            _add(parser.add_subparsers(dest="action", metavar="action"), verb.actions)


def _options_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Every option of a parser and its verbs."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from _options_of(verb)


class _Parser(argparse.ArgumentParser):
    """Refuses in a sentence of its own, without the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        known = list(_options_of(self))
        wrong = re.search(r"unrecognized arguments: (--?[\w-]+)", message)
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            wrong, known = choice, re.findall(r"'([^']+)'", choice[2])
        near = get_close_matches(wrong[1], known, n=1) if wrong else []
        hint = f" Did you mean {near[0]}?" if near else ""
        print(f"{self.prog}: {message.rstrip('.?')}{'?' if message.endswith('?') else '.'}{hint}", file=sys.stderr)
        print(f"`{self.prog} --help` says what it takes.", file=sys.stderr)
        raise SystemExit(UserError.exit_code)


if __name__ == "__main__":
    sys.exit(main())
