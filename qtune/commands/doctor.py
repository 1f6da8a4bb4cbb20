"""`qtune doctor`: what this machine has, and what that means for a run; or which servers can take a run."""

import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtune.commands import arguments, terminal
from qtune.commands.verb import Verb
from qtune.errors import MachineError, UserError
from qtune.units import GIB, MIB, format_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from qtune.gpu_choice import DriverCard
    from qtune.hardware import Device
    from qtune.recipe.schema import Recipe

COMFORTABLE_DISK_BYTES = 20 * GIB
NF4_ERROR = 0.2  # of the largest weight: half of the widest gap between two of NF4's sixteen values is 0.15
LIMIT_BYTES = 64 * MIB
COPIED_BYTES, COPIES = 256 * MIB, 3  # as long as the clock needs, and once for what only the first copy costs
LAYER_BYTES = 113e6  # of Llama-3.1-8B, in NF4: 218 million weights of 4.13 bits
TRIED_PACK = (1500, 548)  # tokens of two documents
EIGHT_B = (32, 8, 128, None, "an 8B Llama")  # heads, of keys and values, their width, window
ATTENTION_MEANS = {
    "flash": "no score is ever written out",
    "memory-efficient": "no score is ever written out, a little slower than flash",
    "math": "the scores of all heads are written out, so that memory grows with the square of a document's length",
}


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
    arguments.recipe_arguments(parser, is_optional=True)
    parser.add_argument("--run", type=Path, metavar="RUN", help="a run folder: who can serve it, and why others cannot")
    arguments.base_argument(parser)


def refuse(options: Namespace) -> None:
    if options.base is not None and options.run is None:
        raise UserError("--base: has no effect without --run. Give both.")
    if options.run is not None and options.recipe is not None:
        raise UserError("--run: is about a run, and a recipe about a machine. Give one of them.")
    if options.recipe is None and (options.set or options.demo):
        raise UserError("--set and --demo: have no effect without a recipe. Give one.")


def act(options: Namespace) -> int:
    return _examine_run(options) if options.run else _examine_machine(options)


def _examine_machine(options: Namespace) -> int:
    from qtune import logs

    logs.hold()
    with terminal.doing_of(options) as doing:
        recipe = arguments.load_recipe(options, needs_weights=False)[0] if options.recipe else None
        with terminal.importing(doing):
            import bitsandbytes.functional  # noqa: F401
        doing("examining this machine")
        examined = examine(recipe)
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


def examine(recipe: "Recipe | None" = None) -> list[Examined]:
    from qtune import hardware

    examined = [_python(), *_packages()]
    try:
        device = hardware.find_device()
    except MachineError as fault:
        return [*examined, Examined("device", "cannot be used", str(fault), is_fine=False), _disk()]
    examined += [_device(device), _memory(device), _four_bits(device)]
    if device.is_card:
        with hardware.as_it_was():
            hardware.prepare(device)
            examined += [*_driver(device), *_several(), _allocator(), _paged_memory(device)]
            examined.append(_tried("memory limit", lambda: _limit(device)))
            examined.append(_tried("page-locked memory", lambda: _copies(device)))
            examined.append(_tried("attention", lambda: _attention(device, recipe)))
    return [*examined, _disk()]


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


def _tried(what: str, look: Callable[[], Examined]) -> Examined:
    """What `look` finds; a card can fail in any way."""
    try:
        return look()
    except UserError:
        raise
    except Exception as fault:
        said = str(fault).strip().partition("\n")[0]
        return Examined(what, type(fault).__name__, f"does not work here: {said}", is_fine=False)


def _device(device: "Device") -> Examined:
    import torch

    if device.is_card:
        capability = ".".join(map(str, device.capability or ()))
        found = f"{device.label}, compute capability {capability}" if capability else device.label
        return Examined("device", found, f"{device.why}; runs compute in {device.compute_dtype}")
    build = "this torch is a CPU build" if torch.version.cuda is None else "torch sees no CUDA card"
    return Examined(
        "device",
        device.label,
        f"{build}: the demo runs here in {device.compute_dtype}; a model of billions of weights wants a card",
    )


def _memory(device: "Device") -> Examined:
    where = "card" if device.is_card else "host"
    found = f"{format_bytes(device.free_bytes)} free of {format_bytes(device.total_bytes)}"
    card = _as_told(device)
    if card is not None and card.has_display:
        others = format_bytes(max(0, device.total_bytes - device.free_bytes))
        meaning = f"{others} are the desktop's and other programs': on another card, or closed, they are a run's"
        return Examined(f"{where} memory", found, meaning)
    is_short = device.free_bytes < device.total_bytes / 2
    return Examined(f"{where} memory", found, "close other programs that use it before a run" if is_short else "fine")


def _as_told(device: "Device") -> "DriverCard | None":
    """The card as its driver has it."""
    import torch

    from qtune import gpu_choice

    if not device.is_card or torch.device(device.name).type != "cuda":
        return None
    return gpu_choice.card_of(str(torch.cuda.get_device_properties(torch.device(device.name)).uuid))


def _four_bits(device: "Device") -> Examined:
    """Quantise and restore one weight on the device, for real."""
    import bitsandbytes.functional
    import torch

    weight = torch.linspace(-1, 1, 64).repeat(64, 1)
    where = "the card" if device.is_card else "the processor"
    try:
        packed, state = bitsandbytes.functional.quantize_4bit(weight.to(device.name), quant_type="nf4")
        restored = bitsandbytes.functional.dequantize_4bit(packed, state).cpu()
    except Exception as fault:  # a broken native library can fail in any way
        meaning = f"bitsandbytes does not work on {where}: {fault}"
        return Examined("4-bit weights", type(fault).__name__, meaning, is_fine=False)
    error = (restored - weight).abs().max().item()
    if not error < NF4_ERROR:
        meaning = f"what {where} restores is not what was quantised; install bitsandbytes anew"
        return Examined("4-bit weights", f"wrong by {error:.3f} of 1", meaning, is_fine=False)
    return Examined("4-bit weights", f"work, largest error {error:.3f} of 1", f"NF4 by bitsandbytes, on {where}")


def _driver(device: "Device") -> list[Examined]:
    """The driver, and whether it gives the card to one process alone."""
    import torch

    card = _as_told(device)
    if card is None:
        return []
    for_cuda = f"this torch is built for CUDA {torch.version.cuda}"
    if card.compute_mode == "Default":
        return [Examined("driver", card.driver, for_cuda)]
    alone = f"the card is in compute mode {card.compute_mode}: a run and a chat cannot share it"
    return [Examined("driver", card.driver, f"{for_cuda}; {alone}")]


def _several() -> list[Examined]:
    """All cards where there are more than one, which of them a run uses, and what they talk over."""
    import torch.distributed

    from qtune import gpu_choice

    cards = gpu_choice.ask_driver()
    if len(cards) < 2:
        return []
    found, used = ", ".join(card.told for card in cards), len(gpu_choice.alike(cards))
    which = f"a run uses {used}, which are alike" if used > 1 else "a run uses the one with most free memory"
    unlike = f"; --cards {len(cards)} uses all, each by its speed" if used < len(cards) else ""
    has_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    over = "NCCL; the link between them is not measured" if has_nccl else "NCCL, which this torch has not: --cards 1"
    return [Examined("several cards", found, f"{which}{unlike}; they talk over {over}", is_fine=has_nccl or used == 1)]


def _limit(device: "Device") -> Examined:
    """Whether torch refuses what is over a limit, which the driver then has no part in."""
    import torch

    from qtune import accelerator

    place = torch.device(device.name)
    release = accelerator.hold_to(place, LIMIT_BYTES)
    try:
        torch.empty(2 * LIMIT_BYTES, dtype=torch.uint8, device=place)
    except torch.OutOfMemoryError:
        return Examined("memory limit", "is kept", "memory.budget, or what is free, is what a run takes at most")
    finally:
        release()
        accelerator.free_cached_memory()
    meaning = "a run that needs more than memory.budget is not stopped, and may go on in the host's memory, slowly"
    return Examined("memory limit", "is not kept", meaning)


def _allocator() -> Examined:
    import os

    from qtune import gpu_choice

    settings = [os.environ[name] for name in gpu_choice.ALLOCATOR_SETTINGS if name in os.environ]
    if any(gpu_choice.GROWING in each for each in settings):
        return Examined("torch's segments", "grow", "packs of ever new lengths leave few holes in the card's memory")
    found = f"as {', '.join(settings)} has it" if settings else "do not grow"
    meaning = "holes between tensors may take a tenth of the card, and looking for room takes time now and then"
    return Examined("torch's segments", found, meaning)


def copy_rates(device: "Device") -> tuple[float, float, bool]:
    """Bytes a second from page-locked host memory to the device and back, and whether the driver did lock it."""
    import time

    import torch

    from qtune import accelerator

    refused: list[bool] = []
    with accelerator.when_locking_is_refused(lambda: refused.append(True)):
        host = accelerator.page_locked(COPIED_BYTES, torch.uint8)
    place = torch.device(device.name)
    there = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=place)
    rates = []
    for target, source in ((there, host), (host, there)):
        seconds = []
        for _ in range(COPIES):
            accelerator.synchronize(place)
            start = time.perf_counter()
            target.copy_(source, non_blocking=True)
            accelerator.synchronize(place)
            seconds.append(time.perf_counter() - start)
        rates.append(COPIED_BYTES / min(seconds))
    return rates[0], rates[1], not refused


def _copies(device: "Device") -> Examined:
    to_card, from_card, is_locked = copy_rates(device)
    found = f"{to_card / 1e9:.1f} GB/s to the card, {from_card / 1e9:.1f} back"
    layer = f"a layer of an 8B base is streamed in {1000 * LAYER_BYTES / to_card:.0f} ms"
    if is_locked:
        return Examined("page-locked memory", found, f"{layer}, beside arithmetic")
    meaning = (
        f"the driver locks no pages: copies wait for the card, and it for them, so that {layer}, on top of arithmetic"
        " (under WSL2 the limit grows with `memory` in .wslconfig)"
    )
    return Examined("page-locked memory", f"refused; {found}", meaning)


def _attention(device: "Device", recipe: "Recipe | None") -> Examined:
    """The kernels that attention of the recipe's base takes, and where there is none of that of an 8B Llama."""
    import torch

    from qtune.memory import attention_kernels
    from qtune.memory.attention_kernels import Call

    heads, key_heads, width, window, whose = EIGHT_B
    if recipe is not None:
        from qtune.model import base
        from qtune.plan import fake_model

        config = base.read_config_alone(recipe.model).get_text_config()
        heads = config.num_attention_heads
        key_heads = min(fake_model.sizes_in_layers(config, "num_key_value_heads")) or heads
        width = max(fake_model.sizes_in_layers(config, "head_dim")) or config.hidden_size // heads
        window, whose = getattr(config, "sliding_window", None), recipe.model.base
    card = device.capability
    if card is None:
        return Examined("attention", "torch's own choice", "which kernel runs is not known for such a card")
    call = Call(getattr(torch, device.compute_dtype), heads, key_heads, width, width)
    taken = call.repeated if attention_kernels.needs_repeated_heads(call, card) else call
    kernel, packed = attention_kernels.kernel_of(taken, card), "padded to powers of two"
    if attention_kernels.suits_varlen(call, TRIED_PACK, window, card):
        fault = attention_kernels.varlen_fault(call, window is not None, torch.device(device.name))
        packed = "as they lie (varlen_attn)" if fault is None else f"padded, as varlen_attn fails ({fault})"
    meaning = ATTENTION_MEANS[kernel] + ("; grouped heads are repeated for it" if taken != call else "")
    return Examined("attention", f"{kernel}; packs {packed}", f"{whose}: {meaning}")


def _paged_memory(device: "Device") -> Examined:
    import torch

    from qtune import accelerator

    may_share = accelerator.may_share_paged_memory(torch.device(device.name))
    if may_share is None:
        return Examined("paged memory", "not told", 'leave train.optimizer at "adamw_8bit", which pages nothing')
    if may_share:
        return Examined("paged memory", "safe", "train.optimizer may be paged, should its state not fit")
    meaning = 'as on Windows and WSL2; leave train.optimizer at "adamw_8bit", which pages nothing'
    return Examined("paged memory", "not for card and processor at once", meaning)


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


def said(fault: UserError, options: Namespace) -> str:
    return arguments.said_by_line(fault, options) if options.recipe else str(fault)


VERB = Verb(
    name="doctor",
    help="what this machine has, or which servers can take a run",
    arguments=add_arguments,
    refuse=refuse,
    act=act,
    said=said,
    order=150,
)
