"""`qtune schema`: what a recipe may say, for editors."""

from argparse import Namespace

from qtune.commands import terminal
from qtune.commands.verb import Verb


def act(options: Namespace) -> None:
    from qtune.recipe import load

    terminal.print_json(load.json_schema())


VERB = Verb(name="schema", help="JSON schema of a recipe, for editors", act=act, answers_json=False, order=160)
