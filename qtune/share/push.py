"""A run's adapter, or the model it was merged into, uploaded to the Hugging Face hub: what was listed, nothing else."""

import glob
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qtune.atomic_files import write_text
from qtune.errors import MachineError, RunFolderError, UserError
from qtune.recipe.base_kind import ADAPTER_CONFIG
from qtune.report import model_card, run_record
from qtune.report.model_card import What
from qtune.report.wording import one_line
from qtune.rundir import MERGE_REPORT, RunDir
from qtune.units import counted, format_bytes

LEFT_OUT = {MERGE_REPORT}  # it quotes held-out rows and names folders of this machine
BASE_KEY = "base_model_name_or_path"


@dataclass(frozen=True)
class Upload:
    """What will be uploaded, and where to: `files` are (name, bytes), each in `folder`."""

    folder: Path
    address: str
    files: tuple[tuple[str, int], ...]

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.files)


def prepare(run: RunDir, address: str, what: What) -> Upload:
    """The adapter or the merged model of `run`, with its model card, ready for `address` (`owner/name`).

    A card that the user wrote or changed stays as it is. Raises UserError for a name that the hub would not take, and
    RunFolderError for a run without what is asked for, or one that nobody else could load.
    """
    _refuse_bad_name(address)
    found = run_record.read(run)
    folder = run.adapter if what == "adapter" else _merged_folder(run, found.merge)
    if not folder.is_dir() or found.lock is None:
        raise RunFolderError(f"{run.path}: has no {folder.name}, so there is nothing to push.")
    if what == "adapter":
        _refuse_local_base(folder / ADAPTER_CONFIG)
    _address_card(folder / model_card.FILE, model_card.card(found, what), model_card.card(found, what, address))
    return Upload(folder, address, tuple(_files(folder)))


def _address_card(path: Path, made: str, addressed: str) -> None:
    """Put the address into the card that was made; one that the user wrote or changed stays."""
    if not path.is_file() or path.read_text(encoding="utf-8") == made:
        write_text(path, addressed)


def _refuse_bad_name(address: str) -> None:
    try:
        validate_repo_id(address)
    except HFValidationError:
        is_right = False
    else:
        is_right = bool(re.fullmatch(r"[^/]+/[^/]+", address))
    if not is_right:
        raise UserError(f"{address}: is no name on the hub. Give it as owner/name, of letters, digits, - _ and dots.")


def _merged_folder(run: RunDir, merge: dict[str, object] | None) -> Path:
    if merge is None:
        raise RunFolderError(f"{run.path}: was not merged yet. First: qtune merge {run.path} --output FOLDER")
    folder = Path(str(merge["output"]))
    if not folder.is_dir():
        raise RunFolderError(f"{folder}: the merged model is not there any more. Merge again: qtune merge {run.path}")
    return folder


def _refuse_local_base(config: Path) -> None:
    """An adapter whose base is a folder of this machine loads nowhere else, and would tell where that folder is."""
    try:
        base = str(json.loads(config.read_text(encoding="utf-8"))[BASE_KEY])
    except (OSError, ValueError, KeyError, TypeError):
        raise RunFolderError(f"{config}: is not the configuration of an adapter, so it is not pushed.") from None
    if Path(base).is_absolute():
        raise RunFolderError(
            f"{config}: names the base by its folder here, {base}, which nobody else has. Put the base's name on the"
            f" hub there as {BASE_KEY}, then push again."
        )


def _files(folder: Path) -> list[tuple[str, int]]:
    """(name, bytes) of every file in `folder`; links and hidden files stay here."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    names = [path.relative_to(folder) for path in paths]
    return [
        (name.as_posix(), path.stat().st_size)
        for name, path in zip(names, paths, strict=True)
        if name.as_posix() not in LEFT_OUT and not any(part.startswith(".") for part in name.parts)
    ]


def table(upload: Upload, public: bool) -> RenderableType:
    """What would be uploaded, to be read before one agrees."""
    files = Table.grid(padding=(0, 3, 0, 0))
    files.add_column(overflow="fold")
    files.add_column(justify="right", no_wrap=True)
    for name, size in upload.files:
        files.add_row(Text(one_line(name)), format_bytes(size))
    kind = "public" if public else "private"
    head = f"{counted(len(upload.files), 'file')} of {upload.folder}, {format_bytes(upload.bytes)}, to {upload.address}"
    return Group(Text(head, "bold"), Text(f"a repository that is new will be {kind}", "dim"), Text(), files, Text())


def refuse_without_token(api: HfApi) -> None:
    """Raises UserError where nobody is logged in; the token itself is never shown."""
    if not (api.token or get_token()):
        raise UserError("No token for the hub. Log in with `hf auth login`, or set HF_TOKEN to one that may write.")


def push(upload: Upload, public: bool, api: HfApi) -> str:
    """Upload, into a new repository if there is none; returns its address on the web.

    A new repository is private unless `public`. Raises UserError where the hub refuses, MachineError where it cannot be
    reached.
    """

    def send() -> str:
        place = api.create_repo(upload.address, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=upload.address,
            folder_path=upload.folder,
            allow_patterns=[glob.escape(name) for name, _ in upload.files],
            commit_message="Trained with qtune",
        )
        return str(place)

    return _asking_the_hub(upload.address, send)


def _asking_the_hub(address: str, ask: Callable[[], str]) -> str:
    owner = address.split("/")[0]
    try:
        return ask()
    except OfflineModeIsEnabled:
        raise MachineError("HF_HUB_OFFLINE is set, so nothing can be uploaded. Unset it, then push again.") from None
    except HfHubHTTPError as fault:
        status = fault.response.status_code
        if status == 401:
            raise UserError("The hub does not know this token. Log in again with `hf auth login`.") from None
        if status in (403, 404):
            raise UserError(
                f"{address}: the hub has no owner {owner} whom your token may write for. Check the name, and that the"
                " token may write."
            ) from None
        said = f", {fault.server_message.splitlines()[0]}" if fault.server_message else ""
        raise MachineError(f"{address}: the hub answered with an error ({status}{said}). Push again later.") from None
    except Exception as fault:  # the hub's client and the network fail in as many ways as there are layers
        raise MachineError(
            f"{address}: the hub cannot be reached, or the upload broke off ({type(fault).__name__}). Push again where"
            " there is a network; what was uploaded is not sent twice."
        ) from None
