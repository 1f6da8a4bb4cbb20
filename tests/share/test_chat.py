"""A chat as a user has it: words as they are made, commands, Ctrl-C, and every kind of model it can be held with."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from at_a_terminal import AtTerminal
from bitsandbytes.nn import Linear4bit
from conftest import byte_tokenizer
from rich.console import Console
from stopped_runs import qtune, write_recipe

from qtune.data.formats import Message
from qtune.evaluate.generate import Choosing, Spoken, answer
from qtune.model.open_model import open_run
from qtune.rundir import RunDir
from qtune.share import chat as talk
from qtune.share.chat import Chat
from qtune.share.chat_models import Speaker, opened

QUESTION = "what is xxxx?"


@pytest.fixture(scope="module")
def speaker(finished: Path) -> Iterator[Speaker]:
    with opened(RunDir.open(finished)) as speaker:
        yield speaker


def told(chat: Chat, question: str = QUESTION) -> list[str]:
    pieces: list[str] = []
    chat.ask(question, pieces.append)
    return pieces


def test_characters_of_many_bytes_are_told_whole_and_special_tokens_not_at_all() -> None:
    """Decoded token by token, 你 would be three replacement characters."""
    tokenizer, pieces = byte_tokenizer(), []
    ids = tokenizer("  naïve 你好 🙂\n\nend ", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    spoken = Spoken(tokenizer, pieces.append)
    spoken.put(torch.tensor([[1, 2, 3]]))
    for token in ids:
        spoken.put(torch.tensor([token]))
    spoken.end()
    assert "".join(pieces) == "naïve 你好 🙂\n\nend"
    assert " 你" in pieces
    assert "\n\ne" in pieces


def test_an_replythat_ends_in_half_a_character_says_so() -> None:
    tokenizer, pieces = byte_tokenizer(), []
    spoken = Spoken(tokenizer, pieces.append)
    spoken.put(torch.tensor([[1]]))
    for token in tokenizer("a你", add_special_tokens=False)["input_ids"][:3]:
        spoken.put(torch.tensor([token]))
    assert pieces == ["a"]
    spoken.end()
    assert "".join(pieces) == "a\ufffd"


def test_the_words_told_are_those_of_the_scored_answer(finished: Path, speaker: Speaker) -> None:
    """Dequantised once, and one token at a time: the same answer as that of the model the run was scored with."""
    run, lock = open_run(RunDir.open(finished)), RunDir.open(finished).read_lock()
    prompt = speaker._prompt([Message("user", QUESTION)])
    (whole,) = answer(run, [prompt], lock.stop_token_ids, 40)
    pieces = told(Chat(speaker, Choosing(), max_new_tokens=40))
    assert "".join(pieces) == whole
    assert len(pieces) > 3
    assert not any(isinstance(module, Linear4bit) for module in speaker.loaded.model.modules())
    assert any(isinstance(module, Linear4bit) for module in run.model.modules())


def test_words_are_told_while_the_next_are_made(speaker: Speaker) -> None:
    seen: list[int] = []
    steps = 0

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1

    hook = speaker.loaded.model.get_base_model().model.norm.register_forward_hook(count)
    try:
        Chat(speaker, Choosing(), max_new_tokens=20).ask(QUESTION, lambda piece: seen.append(steps))
    finally:
        hook.remove()
    assert seen[0] <= 4  # of 20 passes: the first is the prompt's
    assert seen == sorted(set(seen))


def test_the_same_seed_draws_the_same_conversation(speaker: Speaker) -> None:
    def conversation(seed: int) -> list[Message]:
        chat = Chat(speaker, Choosing(2.0, 0.95, seed), max_new_tokens=12)
        told(chat)
        told(chat)
        return chat.turns

    first = conversation(1)
    assert first == conversation(1)
    assert first != conversation(2)
    assert first[1] != first[3]  # the same question draws anew


def test_a_small_share_draws_from_fewer_tokens(finished: Path, capsys: pytest.CaptureFixture) -> None:
    def said(*given: str) -> str:
        capsys.readouterr()
        assert qtune("chat", finished, "--prompt", QUESTION, "--max-new-tokens", "12", *given) == 0
        return capsys.readouterr().out

    drawn = ("--temperature", "5", "--seed", "1")
    assert said(*drawn, "--top-p", "1") == said(*drawn) != said(*drawn, "--top-p", "0.01")


def test_the_base_is_asked_beside_and_leaves_no_trace(speaker: Speaker) -> None:
    chat, base = Chat(speaker, Choosing(), max_new_tokens=12), []
    chat.ask_base(QUESTION, base.append)
    assert chat.turns == []
    assert "".join(base) != "".join(told(chat))


def test_a_row_that_was_saved_is_one_to_train_on(
    speaker: Speaker, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    chat = Chat(speaker, Choosing(), "Be brief.", max_new_tokens=8)
    assert "no answer to learn" in talk._obey(chat, "/save", str(tmp_path / "t.jsonl"))
    assert "is no .jsonl file" in talk._obey(chat, "/save", str(tmp_path / "t.txt"))
    chat.turns = [Message("user", "größer?"), Message("assistant", "ja, und", is_trained=False)]
    assert "no answer to learn" in talk._obey(chat, "/save", str(tmp_path / "t.jsonl"))  # the only one was cut short
    assert "cannot be written" in talk._obey(
        Chat(speaker, Choosing(), turns=[Message("user", "a"), Message("assistant", "ü")]), "/save", "/nowhere/t.jsonl"
    )
    for reply in ("ja", "nein"):
        chat.turns = [
            *(Message("user", "erst?"), Message("assistant", "wohl", is_trained=False)),
            *(Message("user", "größer?"), Message("assistant", reply)),
        ]
        assert "Added to" in talk._obey(chat, "/save", str(tmp_path / "t.jsonl"))
    lines = (tmp_path / "t.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2
    assert "größer?" in lines[0]
    turns = json.loads(lines[0])["messages"]
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "assistant"]
    assert [turn.get("weight", 1) for turn in turns] == [1, 1, 0, 1, 1]
    recipe = write_recipe(tmp_path, tiny_base, data={"train": "t.jsonl", "held_out_fraction": 0})
    assert qtune("data", "check", recipe) == 0
    assert "messages" in capsys.readouterr().out


def test_commands_are_obeyed_and_unknown_ones_not_sent_to_the_model(speaker: Speaker) -> None:
    """/help and /reset were answered by the model."""
    chat = Chat(speaker, Choosing(), turns=[Message("user", "a"), Message("assistant", "b")])
    assert talk._obey(chat, "/help", "") == talk.HELP
    assert talk._obey(chat, "/sytem", "x").startswith("/sytem is no command")
    assert talk._obey(chat, "/save", "").startswith("/save is no command, or lacks what belongs to it")
    assert len(chat.turns) == 2
    assert 'now "Be kind."; it was none' in talk._obey(chat, "/system", "Be kind.")
    assert chat.messages[0] == Message("system", "Be kind.")
    assert 'now none; it was "Be kind."' in talk._obey(chat, "/system", "")
    assert talk._obey(chat, "/reset", "") == "Starting over."
    assert chat.messages == []


def test_what_a_model_says_cannot_drive_the_terminal(capsys: pytest.CaptureFixture) -> None:
    class Evil:
        system = None

        def speak(self, messages, choosing, max_new_tokens, say) -> bool:
            say("\x1b[2Jgone")
            return False

    talk.converse(Chat(Evil(), Choosing()), Console(), False, "x")
    assert capsys.readouterr().out == "␛[2Jgone\ncut after 256 tokens; --max-new-tokens allows more\n"


class Typed(AtTerminal):
    """`qtune chat` with somebody at the keyboard."""

    output = ""

    def until(self, wanted: str) -> str:
        """What is printed up to and with `wanted`; it is taken away."""
        while wanted not in self.output:
            assert self.more(), f"ended without {wanted!r}: {self.output}"
        before, _, self.output = self.output.partition(wanted)
        return before + wanted

    def more(self) -> bool:
        printed = self.read().decode(errors="replace")
        self.output += printed.replace("\r\n", "\n")
        return bool(printed)


@pytest.fixture
def typed(finished: Path, tmp_path: Path) -> Iterator[Typed]:
    drawn = ("--max-new-tokens", "100000", "--temperature", "5", "--seed", "1")
    chat = Typed([sys.executable, "-m", "qtune", "chat", finished, *drawn], tmp_path, is_forked=True, TERM="dumb")
    yield chat
    chat.close()


def test_a_chat_at_a_terminal(typed: Typed, tmp_path: Path) -> None:
    """Commands, Ctrl-C in an answer, which keeps the conversation, and the word quit, which the model used to get."""
    typed.until("you ")
    typed.type("/help\n")
    assert "/system TEXT" in typed.until("you ")
    typed.type("/nonsense\n")
    assert "/nonsense is no command" in typed.until("you ")
    typed.type("\n")
    typed.until("you ")
    typed.type(f"{QUESTION}\n")
    typed.until(f"{QUESTION}\n")
    while len(typed.output) < 40:
        assert typed.more()
    typed.type("\x03")
    assert "stopped; the conversation goes on" in typed.until("you ")
    typed.type("/save talk.jsonl\n")
    assert "Not saved: every answer has the weight 0" in typed.until("you ")  # half an answer is none to learn
    assert not (tmp_path / "talk.jsonl").exists()
    typed.type("quit\n")
    while typed.more():
        pass
    assert typed.process.wait(timeout=20) == 0


def test_ctrl_c_at_the_prompt_ends_the_chat(typed: Typed) -> None:
    typed.until("you ")
    for _ in range(12):  # one that comes while readline sets itself up is seen with the next key
        typed.type("\x03")
        with contextlib.suppress(subprocess.TimeoutExpired):
            typed.process.wait(timeout=5)
            break
    while typed.more():
        pass
    assert typed.process.wait(timeout=20) == 0
    assert "Traceback" not in typed.output


def test_a_merged_folder_is_talked_to(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    merged = tmp_path / "merged"
    assert qtune("merge", finished, "--output", merged, "--onto", "dequantised") == 0
    capsys.readouterr()
    assert qtune("chat", finished, "--prompt", QUESTION, "--max-new-tokens", "4") == 0
    of_run = capsys.readouterr().out
    assert qtune("chat", merged, "--prompt", QUESTION, "--max-new-tokens", "4") == 0
    assert capsys.readouterr().out == of_run
    assert qtune("chat", merged, "--compare") == 2
    assert f"--compare: {merged} holds one model" in capsys.readouterr().err


def test_a_gguf_file_is_talked_to(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("llama_cpp", reason="the extra `verify` is not installed")
    recipe = write_recipe(tmp_path, Path("demo"), train={"max_steps": 2}, memory={"rehearse": False})
    run, folder = tmp_path / "run", tmp_path / "out"
    assert qtune("run", recipe, "--output", run) == 0
    assert qtune("export", run, "--quant", "f16", "--output", folder) == 0
    capsys.readouterr()
    assert qtune("chat", run, "--prompt", QUESTION, "--max-new-tokens", "12") == 0
    of_run = capsys.readouterr().out
    assert qtune("chat", folder, "--prompt", QUESTION, "--max-new-tokens", "12") == 0
    assert capsys.readouterr().out == of_run
    drawn = ["--prompt", QUESTION, "--max-new-tokens", "12", "--temperature", "2", "--seed"]
    texts = []
    for seed in ("1", "1", "2"):
        assert qtune("chat", folder, *drawn, seed) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_what_cannot_be_is_refused_before_torch_is_imported(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "empty").mkdir()
    code = (
        "import sys; from qtune import cli; sys.modules['llama_cpp'] = None; "
        "status = cli.main(sys.argv[1:]); sys.exit(status if 'torch' not in sys.modules else 99)"
    )
    for arguments, words in (
        ([finished, "--top-p", "0.9"], "--top-p: has no effect without --temperature"),
        ([finished, "--seed", "3"], "--seed: has no effect without --temperature"),
        ([tmp_path / "m.gguf"], "needs llama-cpp-python, which is not installed"),
        ([tmp_path / "nowhere.gguf"], "there is no such run folder"),
        ([tmp_path / "empty"], "is no run folder"),
    ):
        command = [sys.executable, "-c", code, "chat", *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (result.returncode, words in result.stderr) == (2, True), result.stderr
