"""Who can serve a run: what qtune would write is asked of what writes it, what others refuse is said before they do."""

import json
from pathlib import Path

import pytest
from made_bases import make_base
from made_runs import edit_json, make_run
from rich.console import Console

from qtune import cli
from qtune.errors import ModelError
from qtune.recipe import chat_templates
from qtune.report import run_record
from qtune.report.serving_snippets import peft_snippet, with_template
from qtune.rundir import RunDir, write_json
from qtune.share.servers import Server, servers, table


def asked(run: RunDir) -> dict[str, Server]:
    """The servers of a run made by hand, which has no recipe in its lock."""
    edit_json(run.lock, name="clinic")
    return {server.name: server for server in servers(run)}


def test_a_plain_lora_on_a_known_base_is_taken_by_everyone(tmp_path: Path) -> None:
    found = asked(make_run(tmp_path / "x", make_base(tmp_path / "base", "llama"), {"r": 20}))
    assert all(form.is_taken for server in found.values() for form in (server.adapter, server.merged))
    assert f"--max-lora-rank 32 --lora-modules clinic={tmp_path}/x/adapter" in found["vLLM"].adapter.lines[0]
    merge = f"qtune merge {tmp_path}/x --output merged/x"
    assert found["vLLM"].merged.lines == (merge, "vllm serve merged/x")
    export = f"qtune export {tmp_path}/x --to gguf"
    assert found["llama.cpp"].merged.lines == (export, "llama-server -m exports/x-q8_0/model.gguf")
    assert found["Ollama"].merged.lines[1] == "ollama create clinic -f exports/x-ollama-q8_0/Modelfile"
    assert found["Ollama"].adapter.lines[-1] == "ADAPTER exports/x-adapter/adapter.gguf"


def test_an_adapter_with_a_chat_template_of_its_own_is_served_with_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", make_base(tmp_path / "base", "llama"))
    (run.adapter / chat_templates.FILE).write_text("{{ messages }}")
    found = asked(run)
    for name, option in (("vLLM", "--chat-template"), ("SGLang", "--chat-template"), ("llama.cpp", "--jinja")):
        (line,) = (line for line in found[name].adapter.lines if not line.startswith("qtune "))
        assert f" {option} " in line
        assert line.endswith(f" {run.adapter}/chat_template.jinja")
    local, on_hub = (peft_snippet(run_record.read(run), "base", place) for place in (str(run.adapter), "me/clinic"))
    assert f"open('{run.adapter}/chat_template.jinja'" in local
    assert "hf_hub_download('me/clinic', 'chat_template.jinja')" in on_hub
    command = with_template("vllm serve base", "--chat-template", run, "me/clinic")
    assert command.splitlines() == [
        "hf download me/clinic chat_template.jinja --local-dir .",
        "vllm serve base --chat-template chat_template.jinja",
    ]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_every_command_is_a_line_of_its_own(tmp_path: Path, width: int) -> None:
    """In a column of a table they were cut in mid-word, and could not be copied."""
    found = asked(make_run(tmp_path / "x", make_base(tmp_path / "base", "llama"), {"use_dora": True}))
    console = Console(width=width)
    with console.capture() as shown:
        console.print(table(list(found.values())), crop=False)
    lines = [line.strip() for line in shown.get().splitlines()]
    answers = [answer for server in found.values() for answer in (server.adapter, server.merged)]
    assert all(command in lines for answer in answers for command in answer.lines)
    assert "adapter no, it is DoRA, which" in " ".join(" ".join(lines).split())


LORAS = {
    "dora": ({"use_dora": True}, {"vLLM", "SGLang", "llama.cpp", "Ollama"}, "DoRA"),
    "rslora": ({"use_rslora": True}, {"SGLang"}, "too weakly"),
    "patterns": ({"alpha_pattern": {"q_proj": 3}}, {"vLLM", "SGLang"}, "differ by module"),
    "whole": ({"modules_to_save": ["lm_head"]}, {"vLLM", "SGLang", "llama.cpp", "Ollama"}, "lm_head"),
    "high": ({"r": 513}, {"vLLM"}, "highest is 512"),
}


@pytest.mark.parametrize(("lora", "refusing", "why"), LORAS.values(), ids=LORAS)
def test_what_an_adapter_does_that_a_server_cannot(tmp_path: Path, lora: dict, refusing: set, why: str) -> None:
    found = asked(make_run(tmp_path / "x", make_base(tmp_path / "base", "llama"), lora))
    assert {name for name, server in found.items() if not server.adapter.is_taken} == refusing
    assert all(why in found[name].adapter.why for name in refusing)
    assert all(server.merged.is_taken for server in found.values())


def test_a_base_that_gguf_has_no_form_for_still_merges(tmp_path: Path) -> None:
    folder = make_base(tmp_path / "base", "llama")
    run = make_run(tmp_path / "x", folder)
    edit_json(folder / "config.json", hidden_act="gelu")
    found = asked(run)
    assert found["vLLM"].merged.is_taken
    assert not found["llama.cpp"].merged.is_taken
    assert "llama.cpp computes silu" in found["Ollama"].adapter.why


def test_a_merge_that_cannot_be_made_is_told_for_every_server(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", make_base(tmp_path / "base", "llama"))
    edit_json(run.adapter / "adapter_config.json", lora_bias=True)
    found = asked(run)
    assert {server.merged.is_taken for server in found.values()} == {False}
    assert "cannot be merged: lora_bias = True" in found["vLLM"].merged.why
    assert found["transformers + peft"].adapter.is_taken


def test_without_the_base_what_needs_it_is_left_open(tmp_path: Path) -> None:
    folder = make_base(tmp_path / "base", "llama")
    run = make_run(tmp_path / "x", folder)
    (folder / "config.json").unlink()
    found = asked(run)
    assert found["vLLM"].adapter.is_taken
    assert found["vLLM"].merged.is_taken is found["llama.cpp"].adapter.is_taken is None
    assert "is not on this machine" in found["llama.cpp"].merged.why
    console = Console(width=100)
    with console.capture() as shown:
        console.print(table(list(found.values())))
    assert "not known, cannot be said here" in " ".join(shown.get().split())


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = make_run(tmp_path / "x", make_base(tmp_path / "base", "llama"))
    asked(run)
    assert cli.main(["doctor", "--run", str(run.path), "--json"]) == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)} >= {"vLLM", "Ollama"}
    assert cli.main(["doctor", "--run", str(run.path)]) == 0
    assert "vLLM" in capsys.readouterr().out


def test_a_run_without_an_adapter_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = make_run(tmp_path / "x", make_base(tmp_path / "base", "llama"))
    (run.adapter / "adapter_model.safetensors").unlink()
    assert cli.main(["doctor", "--run", str(run.path)]) == 2
    assert capsys.readouterr().err == f"{run.adapter}: holds no adapter weights, it has no adapter_model.safetensors.\n"
    write_json(run.adapter / "adapter_config.json", {"peft_type": "LOHA"})
    with pytest.raises(ModelError, match=r"describes no LoRA adapter \(peft_type = 'LOHA'\)"):
        servers(run)
    assert cli.main(["doctor", "--run", str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err
