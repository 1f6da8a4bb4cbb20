"""What is uploaded, where to, and how a refusal is said. The hub is not here: HfApi alone is stood in for."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from made_events import LOCK
from rich.console import Console

from qtune import cli
from qtune.errors import MachineError, RunFolderError, UserError
from qtune.report import model_card, run_record
from qtune.rundir import RunDir, write_json
from qtune.share import push

httpx = sys.modules[HfHubHTTPError.__mro__[1].__module__.split(".")[0]]  # the client that the hub's own uses
TOKEN = "hf_notarealtokenbutsecret"


class Hub:
    """Takes what HfApi is given, and does what the hub would with it: keep the files, or answer with `fault`."""

    def __init__(self, fault: Exception | None = None, token: str | None = TOKEN):
        self.fault, self.token = fault, token
        self.repositories: dict[str, bool] = {}
        self.kept: dict[str, list[str]] = {}

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> str:
        if self.fault:
            raise self.fault
        assert exist_ok
        self.repositories.setdefault(repo_id, private)
        return f"https://hub.example/{repo_id}"

    def upload_folder(self, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str) -> None:
        from huggingface_hub.utils import filter_repo_objects

        names = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()]
        self.kept[repo_id] = sorted(filter_repo_objects(names, allow_patterns=allow_patterns))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run whose adapter folder holds more than an adapter."""
    made = RunDir.create(tmp_path / "run", "", {})
    recipe = {"about": "", "data": {}}
    base = {"name": "owner/base", "folder": str(tmp_path), "sha256": "0" * 64}
    write_json(made.lock, {**LOCK, "name": "r", "base": base, "recipe": recipe, "versions": {}})
    made.adapter.mkdir()
    write_json(made.adapter / "adapter_config.json", {"base_model_name_or_path": "owner/base"})
    (made.adapter / "adapter_model.safetensors").write_bytes(b"x" * 2048)
    (made.adapter / ".secret").write_text("not for the hub")
    return made


ADAPTER_FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_the_adapter_and_its_card_are_uploaded_and_nothing_else(run: RunDir) -> None:
    (run.adapter / "link.txt").symlink_to(run.lock)
    upload, hub = push.prepare(run, "me/r", "adapter"), Hub()
    assert [name for name, _ in upload.files] == ADAPTER_FILES
    assert upload.bytes == sum((run.adapter / name).stat().st_size for name in ADAPTER_FILES)
    assert push.push(upload, False, hub) == "https://hub.example/me/r"  # type: ignore[arg-type]
    assert hub.kept == {"me/r": ADAPTER_FILES}
    assert hub.repositories == {"me/r": True}


def test_files_that_come_after_the_listing_stay_here(run: RunDir) -> None:
    upload, hub = push.prepare(run, "me/r", "adapter"), Hub()
    (run.adapter / "late.txt").write_text("x")
    push.push(upload, True, hub)  # type: ignore[arg-type]
    assert hub.kept == {"me/r": ADAPTER_FILES}
    assert hub.repositories == {"me/r": False}


def test_the_card_is_addressed_and_one_of_the_users_own_is_kept(run: RunDir) -> None:
    path = run.adapter / "README.md"
    model_card.write_card(run)
    assert "OWNER/r" in path.read_text()
    push.prepare(run, "me/r", "adapter")
    assert path.read_text() == model_card.card(run_record.read(run), "adapter", "me/r")
    path.write_text("# Mine\n")
    push.prepare(run, "me/r", "adapter")
    assert path.read_text() == "# Mine\n"


def test_a_merged_model_goes_without_the_report_that_quotes_held_out_rows(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"was not merged yet. First: qtune merge"):
        push.prepare(run, "me/r", "merged")
    merged = tmp_path / "merged"
    write_json(run.merge, {"output": str(merged), "onto": "original", "dtype": "bfloat16"})
    with pytest.raises(RunFolderError, match="is not there any more"):
        push.prepare(run, "me/r", "merged")
    merged.mkdir()
    for name in ("config.json", "model.safetensors", "merge_report.json"):
        (merged / name).write_text("{}")
    upload = push.prepare(run, "me/r", "merged")
    assert [name for name, _ in upload.files] == ["README.md", "config.json", "model.safetensors"]
    assert "library_name: transformers" in (merged / "README.md").read_text()


@pytest.mark.parametrize(
    "address", ["r", "me/r/x", "me/", "/r", "me/r r", "me/..", "../r", "me/-r", "", "me/" + "r" * 97]
)
def test_a_name_the_hub_would_not_take_is_refused_here(run: RunDir, address: str) -> None:
    with pytest.raises(UserError, match="owner/name"):
        push.prepare(run, address, "adapter")


def test_an_adapter_that_loads_nowhere_else_is_not_pushed(run: RunDir) -> None:
    write_json(run.adapter / "adapter_config.json", {"base_model_name_or_path": "/home/me/base"})
    with pytest.raises(RunFolderError, match=r"Put the base's name on the hub there as base_model_name_or_path"):
        push.prepare(run, "me/r", "adapter")
    (run.adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(RunFolderError, match="is not the configuration of an adapter"):
        push.prepare(run, "me/r", "adapter")


def test_a_run_without_an_adapter_has_nothing_to_push(tmp_path: Path, run: RunDir) -> None:
    run.adapter.rename(tmp_path / "gone")
    with pytest.raises(RunFolderError, match="has no adapter, so there is nothing to push"):
        push.prepare(run, "me/r", "adapter")


def answer(status: int, message: str | None = None, kind: type = HfHubHTTPError) -> Exception:
    request = httpx.Request("POST", "https://hub.example/api")
    fault = kind("many lines\nof the client's own", response=httpx.Response(status, request=request))
    fault.server_message = message
    return fault


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        (answer(401), UserError, "does not know this token"),
        (answer(403), UserError, "me/r: the hub has no owner me whom your token may write for"),
        (answer(404, kind=RepositoryNotFoundError), UserError, "has no owner me"),
        (answer(500, "on fire\nreally"), MachineError, r"\(500, on fire\)"),
        (httpx.ConnectError("no route"), MachineError, r"cannot be reached, or the upload broke off \(ConnectError\)"),
        (OfflineModeIsEnabled("offline"), MachineError, "HF_HUB_OFFLINE is set"),
    ],
)
def test_what_the_hub_says_becomes_one_sentence_or_two(run: RunDir, fault: Exception, kind: type, said: str) -> None:
    upload = push.prepare(run, "me/r", "adapter")
    with pytest.raises(kind, match=said) as raised:
        push.push(upload, False, Hub(fault))  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)
    assert TOKEN not in str(raised.value)


def test_without_a_network_the_real_client_gives_up_in_a_sentence(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    upload = push.prepare(run, "me/r", "adapter")
    with pytest.raises(MachineError, match="cannot be reached"):
        push.push(upload, False, HfApi(endpoint="http://127.0.0.1:9", token=TOKEN))


def test_the_listing_has_every_file_with_its_size(run: RunDir) -> None:
    console = Console(width=300, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(push.table(push.prepare(run, "me/r", "adapter"), public=False))
    text = capture.get()
    assert "adapter_model.safetensors   2.0 KiB" in text
    assert "to me/r" in text
    assert "will be private" in text


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool, str, Hub], Hub]:
    """A terminal, or none, at which something is typed, and a hub behind it."""

    def stand_in(is_terminal: bool, typed: str, hub: Hub) -> Hub:
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
        monkeypatch.setattr("qtune.share.push.get_token", lambda: None)
        for name, stream in (("stdin", io.StringIO(typed)), ("stderr", io.StringIO())):
            stream.isatty = lambda: is_terminal  # type: ignore[method-assign]
            monkeypatch.setattr(f"sys.{name}", stream)
        return hub

    return stand_in


@pytest.mark.parametrize(
    ("typed", "options", "uploads"),
    [
        ("y\n", [], True),
        ("yes\n", [], True),
        ("n\n", [], False),
        ("\n", [], False),
        ("", [], False),
        ("", ["--yes"], True),
    ],
)
def test_it_asks_before_it_uploads(run: RunDir, at: Any, typed: str, options: list[str], uploads: bool) -> None:
    hub = at(True, typed, Hub())
    assert cli.main(["push", str(run.path), "me/r", *options]) == 0
    assert bool(hub.kept) == uploads


def test_without_a_terminal_it_uploads_only_when_told_to(run: RunDir, at: Any, capsys: pytest.CaptureFixture) -> None:
    hub = at(False, "y\n", Hub())
    assert cli.main(["push", str(run.path), "me/r"]) == 2
    assert not hub.kept
    assert cli.main(["push", str(run.path), "me/r", "--yes", "--json"]) == 0
    assert hub.kept == {"me/r": ADAPTER_FILES}
    told = capsys.readouterr().out
    answer = json.loads(told[told.index("{\n") :])
    assert (answer["address"], answer["files"]) == ("https://hub.example/me/r", ADAPTER_FILES)


def test_without_a_token_nothing_is_listed(run: RunDir, at: Any, capsys: pytest.CaptureFixture) -> None:
    hub = at(True, "y\n", Hub(token=None))
    assert cli.main(["push", str(run.path), "me/r"]) == 2
    assert not hub.kept
    assert "adapter_model" not in capsys.readouterr().out
