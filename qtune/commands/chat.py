"""`qtune chat`: talk to a finished run, a merged folder or a GGUF file."""

import random
from argparse import ArgumentParser, Namespace
from contextlib import ExitStack
from pathlib import Path

from qtune.commands import arguments, terminal
from qtune.commands.verb import Verb
from qtune.errors import UserError


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder, merged folder or GGUF file")
    arguments.base_argument(parser)
    parser.add_argument("--compare", action="store_true", help="answer with the base first, then tuned")
    parser.add_argument("--prompt", metavar="TEXT", help="ask this one thing and exit")
    parser.add_argument("--system", metavar="TEXT", help="system prompt; default that of the run's recipe")
    parser.add_argument(
        "--max-new-tokens", type=arguments.positive, default=256, metavar="N", help="longest answer (256)"
    )
    parser.add_argument(
        "--temperature", type=_temperature, default=0.0, metavar="T", help="draw tokens; 0 takes the likeliest (0)"
    )
    parser.add_argument("--top-p", type=_share, metavar="P", help="draw from the likeliest that have this share (1)")
    parser.add_argument(
        "--seed", type=arguments.natural, metavar="N", help="draw the same again; default another each time"
    )


def _temperature(text: str) -> float:
    return arguments.between(0.0, 10.0, text)  # far above any use: at 10 the draw is all but even


def _share(text: str) -> float:
    return arguments.between(0.01, 1.0, text)


def refuse(options: Namespace) -> None:
    for name in ("top_p", "seed"):
        if getattr(options, name) is not None and not options.temperature:
            raise UserError(f"--{name.replace('_', '-')}: has no effect without --temperature. Give it, such as 0.7.")
    model = model_at(options.run)
    if model is None:
        return
    for name in ("compare", "base"):
        if getattr(options, name):
            raise UserError(f"--{name}: {model} holds one model, and no base beside it. Give the run folder.")
    arguments.refuse_without_llama_cpp(model)


def model_at(path: Path) -> Path | None:
    """The merged folder or the GGUF file that a chat is to be held with: an export's folder stands for the one file in
    it. None for a run folder, and for what is none of them."""
    from qtune.recipe.base_kind import GGUF_SUFFIX
    from qtune.rundir import is_run

    if path.suffix == GGUF_SUFFIX and path.is_file():
        return path
    if not path.is_dir() or is_run(path):
        return None
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return path
    files = list(path.glob(f"*{GGUF_SUFFIX}"))
    return files[0] if len(files) == 1 else None


def act(options: Namespace) -> None:
    with ExitStack() as opened:
        with terminal.doing_of(options) as doing:
            what = model_at(options.run) or arguments.open_run(options.run, options.base)
            if isinstance(what, Path):
                arguments.open_model(what)
            with terminal.importing(doing):
                from qtune.evaluate.generate import Choosing
                from qtune.share import chat, chat_models

            seed = random.randrange(2**31) if options.seed is None else options.seed
            choosing = Choosing(options.temperature, options.top_p or 1.0, seed)
            doing("loading the model")
            speaker = opened.enter_context(chat_models.opened(what))
        system = speaker.system if options.system is None else options.system
        talk = chat.Chat(speaker, choosing, system, options.max_new_tokens)
        chat.converse(talk, doing.console, options.compare, options.prompt)


VERB = Verb(
    name="chat",
    help="talk to a finished run, a merged folder or a GGUF file",
    arguments=add_arguments,
    refuse=refuse,
    act=act,
    answers_json=False,
    order=70,
)
