"""`qtune doctor`: what this machine has, and what that means for a run; or which servers can take a run."""

import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtune.commands import arguments, terminal
from qtune.commands.verb import Verb
from qtune.errors import UserError
from qtune.units import GIB, format_bytes

if TYPE_CHECKING:
    from rich.table import Table

COMFORTABLE_DISK_BYTES = 20 * GIB


@dataclass(frozen=True)
class Examined:
    """One thing looked at: what was found, what it means, and whether a run can live with it."""

    what: str
    found: str
    meaning: str
    is_fine: bool = True

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, metavar="RUN", help="a run folder: who can serve it, and why others cannot")
    arguments.base_argument(parser)


def refuse(options: Namespace) -> None:
    if options.base is not None and options.run is None:
        raise UserError("--base: has no effect without --run. Give both.")


def act(options: Namespace) -> int:
    return _examine_run(options) if options.run else _examine_machine(options)


def _examine_machine(options: Namespace) -> int:
    from qtune import logs

    logs.hold()
    with terminal.doing_of(options) as doing:
        with terminal.importing(doing):
            import bitsandbytes.functional  # noqa: F401
        doing("examining this machine")
        examined = examine()
    if options.json:
        terminal.print_json([each.as_json() for each in examined])
    else:
        doing.console.print(table(examined))
    return 0 if all(each.is_fine for each in examined) else UserError.exit_code


def _examine_run(options: Namespace) -> int:
    from qtune import logs
    from qtune.rundir import RunDir

    with terminal.doing_of(options) as doing:
        run = RunDir.open(options.run, options.base)
        logs.hold()
        arguments.stay_offline_with(run.read_lock().base_name)
        with terminal.importing(doing):
            from qtune.model import base
            from qtune.share import servers

        base.quiet_libraries()
        doing("trying what each server reads")
        found = servers.servers(run)
    if options.json:
        terminal.print_json([server.as_json() for server in found])
    else:
        doing.console.print(servers.table(found), crop=False)
    return 0


def examine() -> list[Examined]:
    return [_python(), *_packages(), _device(), _memory(), _four_bits(), _disk()]


def _python() -> Examined:
    import platform

    return Examined("python", platform.python_version(), f"{sys.executable}")


def _packages() -> Iterator[Examined]:
    """The packages that decide how a run goes, held against what this qtune asks for."""
    import importlib.metadata

    from packaging.requirements import Requirement

    for text in importlib.metadata.requires("qtune") or ():
        wanted = Requirement(text)
        if wanted.marker is not None:
            continue
        try:
            found = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            yield Examined(wanted.name, "missing", f"pip install '{wanted}'", is_fine=False)
            continue
        is_fine = wanted.specifier.contains(found, prereleases=True)
        yield Examined(wanted.name, found, "fine" if is_fine else f"qtune needs {wanted.specifier}", is_fine)


def _device() -> Examined:
    import torch

    from qtune.hardware import find_device

    device = find_device()
    if device.is_card:
        return Examined("device", device.label, f"runs compute in {device.compute_dtype}")
    build = "this torch is a CPU build" if torch.version.cuda is None else "torch sees no CUDA card"
    return Examined(
        "device",
        device.label,
        f"{build}: the demo runs here in {device.compute_dtype}; a model of billions of weights wants a card",
    )


def _memory() -> Examined:
    from qtune.hardware import find_device

    device = find_device()
    where = "card" if device.is_card else "host"
    return Examined(
        f"{where} memory",
        f"{format_bytes(device.free_bytes)} free of {format_bytes(device.total_bytes)}",
        "close other programs that use it before a run" if device.free_bytes < device.total_bytes / 2 else "fine",
    )


def _four_bits() -> Examined:
    """Quantise and restore one block, for real."""
    import bitsandbytes.functional
    import torch

    weight = torch.linspace(-1, 1, 64 * 64).reshape(64, 64)
    try:
        packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
        error = (bitsandbytes.functional.dequantize_4bit(packed, state) - weight).abs().max().item()
    except Exception as fault:  # a broken native library can fail in any way
        return Examined("4-bit weights", type(fault).__name__, f"bitsandbytes does not work here: {fault}", False)
    return Examined("4-bit weights", f"work, largest error {error:.3f} of 1", "NF4 by bitsandbytes")


def _disk() -> Examined:
    free = shutil.disk_usage(Path.cwd()).free
    meaning = "fine" if free >= COMFORTABLE_DISK_BYTES else "a 7B base needs about 15 GiB, its merge as much again"
    return Examined("disk here", f"{format_bytes(free)} free", meaning)


def table(examined: list[Examined]) -> "Table":
    """What was examined, a line each; what is wrong is marked in words and in red."""
    from rich.table import Table

    result = Table("", "found", "meaning", box=None, padding=(0, 2, 0, 0))
    for each in examined:
        style = "" if each.is_fine else "red"
        mark = "" if each.is_fine else "! "
        result.add_row(each.what, each.found, mark + each.meaning, style=style)
    return result


VERB = Verb(
    name="doctor",
    help="what this machine has, or which servers can take a run",
    arguments=add_arguments,
    refuse=refuse,
    act=act,
    order=150,
)
