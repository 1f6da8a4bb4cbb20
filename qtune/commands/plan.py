"""`qtune plan`: will it fit, how, and what it costs."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable

from qtune.commands import arguments, terminal
from qtune.commands.launcher import refuse_more_than_packs
from qtune.commands.verb import Verb
from qtune.errors import UserError
from qtune.units import GIB

CARDS_GIB = (6, 8, 12, 16, 24, 48, 80)  # the sizes that consumer and rented cards come in


def add_arguments(parser: ArgumentParser) -> None:
    arguments.recipe_arguments(parser)
    parser.add_argument(
        "--device-memory", type=_card, metavar="SIZE", help='plan for a card with this much, as 8GiB or "RTX 4090"'
    )
    parser.add_argument("--host-memory", type=arguments.size, metavar="SIZE", help="and a host with this much")
    parser.add_argument(
        "--cards", type=_cards, metavar="CARDS", help='plan for several, as 2x24GiB, 8GiB+16GiB or "2xRTX 3090"'
    )
    parser.add_argument(
        "--link",
        type=_link,
        metavar="LINK",
        help="what joins them: nvlink4, pcie4 (default), 10gbe ..., or 5GB a second",
    )
    parser.add_argument("--longest", action="store_true", help="the longest context that fits, by card size")


def _card(text: str) -> str:
    """A size, or a card by its name."""
    from qtune.gpu_models import model_of

    return _read_by(model_of, text)


def _cards(text: str) -> str:
    """Several cards."""
    from qtune.gpu_models import models_of

    return _read_by(models_of, text)


def _link(text: str) -> str:
    """A link by its name, or bytes a second."""
    from qtune.plan.world import link_of

    return _read_by(link_of, text)


def _read_by(read: Callable[[str], object], text: str) -> str:
    """`text`, which `read` can make something of."""
    try:
        read(text)
    except ValueError as fault:
        raise ArgumentTypeError(str(fault)) from None
    return text


def refuse(options: Namespace) -> None:
    if options.cards and (options.device_memory or options.longest):
        raise UserError("--cards has a plan for each card; --device-memory and --longest are of one. Give one of them.")
    if options.link and not options.cards:
        raise UserError("--link joins several cards. Say which, as --cards 2x24GiB.")


def act(options: Namespace) -> None:
    if options.cards:
        _plan_together(options)
    else:
        _longest(options) if options.longest else _plan(options)


def _plan(options: Namespace) -> None:
    with terminal.doing_of(options) as doing:
        recipe, _ = arguments.load_recipe(options, needs_weights=False)
        with terminal.importing(doing):
            from qtune import library
            from qtune.plan.suggestions import refuse_unless_it_fits
            from qtune.report import plan_table

        plan = library.make_plan(recipe, options.device_memory, options.host_memory, doing)
    if options.json:
        terminal.print_json(plan.as_json())
    else:
        doing.console.print(plan_table.whole_plan(plan.as_json()))
    refuse_unless_it_fits(recipe, plan)


def _plan_together(options: Namespace) -> None:
    with terminal.doing_of(options) as doing:
        recipe, _ = arguments.load_recipe(options, needs_weights=False)
        with terminal.importing(doing):
            from qtune import hardware
            from qtune.gpu_models import models_of
            from qtune.plan.suggestions import refuse_unless_it_fits
            from qtune.plan.world import USUAL, World, link_of
            from qtune.planning import plans_of_cards, together
            from qtune.report import plan_table

        here, models = hardware.find_device(), models_of(options.cards)
        refuse_more_than_packs(len(models), recipe)
        devices = [hardware.imagined_card(model, options.host_memory, here) for model in models]
        link = link_of(options.link) if options.link else USUAL
        world = World(len(devices), 1 if link.joins_machines else len(devices), link)
        plans = plans_of_cards(recipe, devices, world, doing)
        told = together(recipe, plans, world)
    if options.json:
        terminal.print_json(told)
    else:
        doing.console.print(plan_table.cards_table(told))
    for plan in plans:
        refuse_unless_it_fits(recipe, plan)


def _longest(options: Namespace) -> None:
    with terminal.doing_of(options) as doing:
        recipe, _ = arguments.load_recipe(options, needs_weights=False)
        with terminal.importing(doing):
            from qtune import hardware
            from qtune.gpu_models import GpuModel, model_of
            from qtune.plan.planner import budget_of
            from qtune.planning import longest_contexts, refuse_where_none_fits
            from qtune.report import plan_table

        here, asked, host = hardware.find_device(), options.device_memory, options.host_memory
        models = [model_of(asked)] if asked else [GpuModel(gib * GIB) for gib in CARDS_GIB]
        cards = [hardware.imagined_card(model, host, here) for model in models]
        rows = [
            {
                "device_bytes": card.total_bytes,
                "host_bytes": budget_of(recipe, card).host_bytes,
                "tokens": most.tokens,
                "bound": most.bound,
            }
            for card, most in longest_contexts(recipe, cards, doing)
        ]
    if options.json:
        terminal.print_json(rows)
    else:
        doing.console.print(plan_table.longest_table(recipe.model.base, rows))
    if not any(row["tokens"] for row in rows):
        refuse_where_none_fits(recipe, cards[-1])


VERB = Verb(
    name="plan",
    help="will it fit, how, and what it costs; nothing is downloaded or trained",
    arguments=add_arguments,
    refuse=refuse,
    act=act,
    said=arguments.said_by_line,
    order=30,
)
