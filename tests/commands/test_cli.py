"""The command line as a user meets it: verbs, exit codes, words, and no traceback for anything typed wrongly."""

import importlib.metadata
import json
import os
import re
import resource
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import forked
import pytest

from qtune import cli

GOOD = '{"question": "Which class of drug is captopril?", "answer": "ACE inhibitor"}\n'


def recipe_text(data: str, extra: str = "", base: str = "demo", data_extra: str = "") -> str:
    return (
        f'name = "t"\n[model]\nbase = "{base}"\n[data]\ntrain = "{data}"\nheld_out_fraction = 0.2\n{data_extra}\n'
        "[train]\nmax_steps = 2\nepochs = 50\n"
        f'[evaluate]\nmetric = "exact_match"\nrows = 4\nmax_new_tokens = 4\n{extra}\n'
    )


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with a good recipe, t.toml, over ten rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(cli, "_terminate", cli._terminate)
    before = signal.getsignal(signal.SIGTERM)
    (tmp_path / "rows.jsonl").write_text(GOOD * 10)
    (tmp_path / "t.toml").write_text(recipe_text("rows.jsonl"))
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


def qtune(*arguments: str, **kwargs: object) -> subprocess.CompletedProcess:
    """qtune in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "qtune", *arguments], capture_output=True, text=True, timeout=300, check=False, **kwargs
    )


def test_without_arguments_it_says_how_to_start() -> None:
    result = qtune()
    assert result.returncode == 0
    assert "start here" in result.stdout
    assert qtune("--help").stdout == result.stdout


def test_help_is_quick_and_light() -> None:
    """Half a second is promised; of the processor's time, as what else the machine does is no matter."""
    seconds = []
    for _ in range(3):
        began = seconds_of_children()
        assert qtune("--help").returncode == 0
        seconds.append(seconds_of_children() - began)
    assert min(seconds) < 0.5


def seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(
    "verb",
    [
        "run",
        "check",
        "recipes",
        "chat",
        "eval",
        "merge",
        "report",
        "push",
        "ls",
        "rm",
        "doctor",
        "schema",
        "completion",
    ],
)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main([verb, "--help"])
    assert exit.value.code == 0
    assert "usage: qtune " + verb in capsys.readouterr().out


def test_an_unknown_verb_is_the_users_input() -> None:
    result = qtune("rum")
    assert result.returncode == 2
    assert "invalid choice: 'rum'" in result.stderr


def test_a_wrong_recipe_fails_before_torch(workplace: Path) -> None:
    (workplace / "t.toml").write_text(recipe_text("rows.jsonl", extra="[lora]\nalhpa = 3"))
    code = (
        "import sys; from qtune import cli; status = cli.main(['check', 't.toml']); "
        "sys.exit(status if 'torch' not in sys.modules else 99)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "lora.alhpa is not a setting. Did you mean alpha?" in result.stderr


def write_bytes(name: str, data: bytes):
    return lambda folder: (folder / name).write_bytes(data)


def excel_named_csv(folder: Path) -> None:
    with zipfile.ZipFile(folder / "rows.csv", "w") as file:
        file.writestr("[Content_Types].xml", "<Types/>")
        file.writestr("xl/workbook.xml", "<workbook/>")
    (folder / "t.toml").write_text(recipe_text("rows.csv"))


def uses(data: str, **kwargs: str):
    return lambda folder: (folder / "t.toml").write_text(recipe_text(data, **kwargs))


def no_chat_template(folder: Path) -> None:
    from conftest import byte_tokenizer, tiny_config
    from transformers import LlamaForCausalLM

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder / "base")
    LlamaForCausalLM(tiny_config()).save_pretrained(folder / "base")
    uses("rows.jsonl", base="./base")(folder)


def not_a_causal_model(folder: Path) -> None:
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}')
    (folder / "base" / "model.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    uses("rows.jsonl", base="./base")(folder)


BAD_INPUT = {
    "unknown key": (uses("rows.jsonl", extra="[lora]\nrnak = 3"), "t.toml:16: lora.rnak is not a setting"),
    "wrong type": (uses("rows.jsonl", extra='[lora]\nrank = "3"'), "t.toml:16"),
    "toml that is none": (write_bytes("t.toml", b"name = \n"), "t.toml:1"),
    "missing data file": (uses("rwos.jsonl"), "rows.jsonl?"),
    "a directory for a file": (lambda f: ((f / "d.jsonl").mkdir(), uses("d.jsonl")(f)), "d.jsonl"),
    "empty data": (write_bytes("rows.jsonl", b""), "rows.jsonl"),
    "malformed line": (write_bytes("rows.jsonl", (GOOD * 2 + '{"question": \n').encode()), "rows.jsonl:3"),
    "leading null": (write_bytes("rows.jsonl", ("null\n" + GOOD).encode()), "rows.jsonl:1"),
    "invalid utf-8": (write_bytes("rows.jsonl", GOOD.encode() + b'{"question": "\xff"}\n'), "rows.jsonl:2"),
    "excel named csv": (excel_named_csv, "Excel"),
    "wrong columns": (write_bytes("rows.jsonl", b'{"a": "x", "b": "y"}\n'), "data.columns"),
    "a column that is not there": (
        uses("rows.jsonl", data_extra='columns = { prompt = "ask" }'),
        "t.toml:7: /",  # and behind it the file of the rows, which tests/recipe/test_load.py has in full
    ),
    "empty messages": (write_bytes("rows.jsonl", b'{"messages": []}\n'), "rows.jsonl:1"),
    "a role that does not exist": (
        write_bytes("rows.jsonl", b'{"messages": [{"role": "bot", "content": "x"}]}\n'),
        "rows.jsonl:1",
    ),
    "an answer that is null": (
        write_bytes("rows.jsonl", (GOOD + '{"question": "x", "answer": null}\n').encode()),
        "rows.jsonl:2",
    ),
    "all rows too long": (uses("rows.jsonl", data_extra="max_tokens = 8"), "max_tokens"),
    "no chat template": (no_chat_template, "t.toml:3: model.base: this base has no chat template"),
    "no causal model": (not_a_causal_model, "t.toml:3: model.base: "),
    "a base that is called otherwise": (
        lambda f: (f / "t.toml").write_text(recipe_text("rows.jsonl").replace("base =", "base_model =")),
        "t.toml:3: model.base_model is not a setting. Did you mean base?",
    ),
    "a base that is not there": (uses("rows.jsonl", base="./nowhere"), "nowhere"),
    "a hub model without a network": (uses("rows.jsonl", base="some/model"), "--demo"),
    "a hub dataset without a network": (uses("some/dataset"), "some/dataset"),
    "no such recipe": (lambda folder: (folder / "t.toml").unlink(), "t.toml"),
    "a target that matches nothing": (
        uses("rows.jsonl", extra='[lora]\ntargets = ["q_prj"]'),
        "t.toml:16: lora.targets: no linear layer is named 'q_prj'. Did you mean q_proj?",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_clear_message(name: str, workplace: Path, capsys: pytest.CaptureFixture) -> None:
    spoil, words = BAD_INPUT[name]
    spoil(workplace)
    status = cli.main(["run", "t.toml", "--output", "out"])
    printed = capsys.readouterr()
    assert status == 2, printed.err
    assert words in printed.err
    assert "Traceback" not in printed.err + printed.out
    assert not (workplace / "out").exists()


def test_a_used_run_folder_is_refused_and_left_alone(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    (workplace / "out").mkdir()
    (workplace / "out" / "work").write_text("precious")
    assert cli.main(["run", "t.toml", "--output", "out"]) == 2
    assert "exists already and is not empty" in capsys.readouterr().err
    assert [path.name for path in (workplace / "out").iterdir()] == ["work"]


def test_no_disk_space_is_said_before_training(workplace: Path, monkeypatch, capsys) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    assert cli.main(["run", "t.toml", "--output", "out"]) == 2
    assert "disk" in capsys.readouterr().err


def test_our_own_fault_is_exit_1_with_the_details_in_a_file(workplace: Path, monkeypatch, capsys) -> None:
    from qtune.recipe import load

    monkeypatch.setattr(load, "json_schema", lambda: 1 / 0)
    assert cli.main(["schema"]) == 1
    error = capsys.readouterr().err
    assert "ZeroDivisionError" in error
    details = Path(error.rsplit("details are in ", 1)[1].strip().rstrip("."))
    assert "Traceback" in details.read_text()
    details.unlink()


def test_a_run_that_diverges_keeps_the_weights_of_its_last_good_step(workplace: Path, monkeypatch, capsys) -> None:
    from qtune.train import loop

    original = loop.MeteredTrainer.compute_loss

    def not_a_number(self, *args, **kwargs):
        return original(self, *args, **kwargs) * (float("nan") if self.state.global_step == 1 else 1.0)

    monkeypatch.setattr(loop.MeteredTrainer, "compute_loss", not_a_number)
    assert cli.main(["run", "t.toml", "--output", "out", "--set", "train.warmup_fraction=0"]) == 1
    assert "Step 2: the loss is not a finite number" in capsys.readouterr().err
    from safetensors.torch import load_file

    weights = load_file(workplace / "out" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)


def test_check_trains_nothing_and_speaks_json(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["check", "t.toml", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["data"]["train_rows"] == 8
    assert answer["plan"]["steps"] == 2
    assert not (workplace / "runs").exists()


def test_check_without_a_plan_reads_and_refuses_as_with_one(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["check", "t.toml", "--no-plan", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["data"]["train_rows"], answer["plan"]) == (8, None)
    assert cli.main(["check", "t.toml", "--no-plan"]) == 0
    assert "8 rows" in capsys.readouterr().out
    for change in ("data.max_tokens=16", "evaluate.general=none.txt", "evaluate.metric=policy"):
        told = []
        for more in ([], ["--no-plan"]):
            assert cli.main(["check", "t.toml", "--set", change, *more]) == 2
            told.append(capsys.readouterr().err)
        assert told[0] == told[1] != ""


def test_schema_and_completion(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["lora"]
    assert cli.main(["completion", "bash"]) == 0
    assert "qtune" in capsys.readouterr().out


def test_recipes_are_listed_shown_and_copied(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["recipes", "ls", "--json"]) == 0
    assert "medical" in [row["name"] for row in json.loads(capsys.readouterr().out)]
    assert cli.main(["recipes", "show", "medical"]) == 0
    assert capsys.readouterr().out.count("[model]") == 1
    assert cli.main(["recipes", "copy", "medical", "mine.toml"]) == 0
    assert cli.main(["check", "mine.toml", "--demo"]) == 0


def test_doctor_looks_for_real(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    found = {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert found["4-bit weights"]["is_fine"]
    assert "torch" in found


def test_doctor_says_what_is_wrong_and_by_its_exit_code_that_something_is(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch>=99", "no-such-package>=1", "pytest"])
    assert cli.main(["doctor", "--json"]) == 2
    found = {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert (found["torch"]["is_fine"], found["torch"]["meaning"]) == (False, "qtune needs >=99")
    assert found["no-such-package"]["meaning"] == "pip install 'no-such-package>=1'"
    assert found["pytest"]["is_fine"]


def test_a_whole_life(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    """Run, report, chat and merge, in one go; then the merged folder loads as any model does."""
    assert cli.main(["run", "t.toml", "--output", "out", "--json"]) == 0
    json.loads(capsys.readouterr().out)
    names = {path.name for path in (workplace / "out").iterdir()}
    assert names >= {
        "recipe.toml",
        "plan.json",
        "lock.json",
        "data.json",
        "metrics.jsonl",
        "memory.jsonl",
        "scores.json",
        "summary.md",
        "log.txt",
        "adapter",
    }
    assert (workplace / "out" / "recipe.toml").read_bytes() == (workplace / "t.toml").read_bytes()
    assert cli.main(["report", "out"]) == 0
    assert cli.main(["report", "out", "--json"]) == 0
    capsys.readouterr()
    assert cli.main(["chat", "out", "--prompt", "Which class of drug is enalapril?", "--compare"]) == 0
    assert "tuned" in capsys.readouterr().out
    assert cli.main(["merge", "out", "--output", "merged"]) == 0
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(workplace / "merged")
    assert not getattr(merged.config, "quantization_config", None)
    assert cli.main(["merge", "out", "--output", "merged"]) == 2


def test_ctrl_c_saves_the_adapter_and_exits_130(workplace: Path) -> None:
    (workplace / "t.toml").write_text(recipe_text("rows.jsonl").replace("max_steps = 2", "max_steps = 100000"))
    command = ["-m", "qtune", "run", "t.toml", "--output", "out", "--set", "train.epochs=1000"]
    reading, printing = os.pipe()
    with open(os.devnull) as nothing, open("said.txt", "w+") as told, open(reading) as printed:
        child = forked.Forked(command, (nothing.fileno(), printing, told.fileno()))
        os.close(printing)
        for line in printed:
            if line.startswith("step 3"):
                os.kill(child.pid, signal.SIGINT)
                break
        said = printed.read()
        code, error = child.wait(timeout=120), Path("said.txt").read_text()
    assert code == 130, error
    assert "  finishing this step, then saving; Ctrl-C again drops it\n" in said
    assert re.search(r"^stopped at step \d+ of 1,?000", said, re.MULTILINE)
    commands = [line.strip() for line in said.splitlines() if line.startswith("  qtune ")]
    assert commands[:2] == ["qtune resume out", "qtune chat out"]
    assert (workplace / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert "Traceback" not in error
