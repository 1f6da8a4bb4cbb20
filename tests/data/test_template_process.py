"""Templates run in a child process: they write what transformers would have them write, and stop when they must."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import byte_tokenizer
from transformers import PreTrainedTokenizerBase

from qtune.data import template_process
from qtune.data.formats import Message
from qtune.data.template_process import Asked, Renderer, Untraceable
from qtune.errors import MachineError, ModelError

SYSTEM, QUESTION, ANSWER = (
    Message("system", "Be brief."),
    Message("user", " Hi\nthere "),
    Message("assistant", "Hé! 🙂"),
)
CHATS = (
    [QUESTION],
    [QUESTION, ANSWER],
    [SYSTEM, QUESTION, ANSWER],
    [SYSTEM, QUESTION, ANSWER, QUESTION],
    [QUESTION, ANSWER, QUESTION, Message("assistant", "<think>hm</think>\n\nYes.")],
    [ANSWER, QUESTION],
)
OWN = (
    "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}{% endfor %}",
    "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ tools }}{{ documents }}{{ undefined_thing }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% for m in messages %}{% generation %}{% set x = 1 %}{{ m.content }}{% endgeneration %}{{ x }}\n{% endfor %}",
    "{% for m in messages %}  {% if loop.index > 2 %}{% break %}{% endif %}\n  {{ m.content }}\n{% endfor %}\n",
    "{{ dict(a=1) }}{{ dict.fromkeys(['a']) }}",
    "{{ strftime_now('%Y-%m-%d') }}{{ range(3) | list }}{{ '<b>' }}",
    "{{ messages[0].content.strip().split('\n') }}{{ messages | length }}{{ messages[0].get('tool_calls') }}",
)
REJECTED = (
    "{% if %}",
    "{{ 1 / 0 }}",
    "{{ raise_exception('no') }}",
    "{{ raise_exception('') }}",
    "{{ nothing.at.all }}",
    "{{ messages.append(1) }}",
    "{{ ''.__class__.__mro__ }}",
    "{% set ns = namespace(_x=1) %}",
    "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "{% include '/etc/passwd' %}",
    "{{ cycler.__init__.__globals__ }}",
)
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def with_template(template: str) -> PreTrainedTokenizerBase:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def in_process(tokenizer: PreTrainedTokenizerBase, asked: Asked) -> str | None:
    """What transformers writes, None where it fails."""
    turns = [{"role": message.role, "content": message.content} for message in asked.messages]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asked.add_generation_prompt)
    except Exception:
        return None


def assert_the_same(template: str) -> None:
    tokenizer = with_template(template)
    asked = [Asked(chat, prompt) for chat, prompt in itertools.product(CHATS, (False, True))]
    texts = Renderer.of(tokenizer).render(asked)
    assert [None if isinstance(text, Untraceable) else text for text in texts] == [
        in_process(tokenizer, each) for each in asked
    ]


def test_every_published_template_writes_what_transformers_writes(material: Path) -> None:
    templates = sorted((material / "chat_templates").glob("*.jinja"))
    assert templates
    for path in templates:
        assert_the_same(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("template", [*OWN, *REJECTED])
def test_every_part_of_the_language_is_that_of_transformers(template: str) -> None:
    assert_the_same(template)


@pytest.mark.parametrize("template", REJECTED)
def test_what_a_template_may_not_do_is_a_reason_on_one_line(template: str) -> None:
    (reason,) = Renderer.of(with_template(template)).render([Asked([QUESTION])])
    assert isinstance(reason, Untraceable)
    assert str(reason).startswith("the chat template rejects it (")
    assert "\n" not in str(reason)


def test_half_a_character_is_refused() -> None:
    template = "{{ '\\ud800' }}"
    (reason,) = Renderer.of(with_template(template)).render([Asked([QUESTION])])
    assert isinstance(reason, Untraceable)


def runs_away_on(word: str, how: str) -> PreTrainedTokenizerBase:
    return with_template(f"{{% if '{word}' in messages[0].content %}}{how}{{% endif %}}{{{{ messages[0].content }}}}")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (LOOPS, "runs for more than 2 seconds"),
        pytest.param(
            "{{ (messages | length + 8) ** (9 ** 9) }}", "runs for more than 2 seconds", marks=pytest.mark.long
        ),
        ("{{ 'x' * 999999999 }}", "needs more than 256 MiB"),
        ("{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", "needs more than 256 MiB"),
    ],
    ids=["loop", "power", "string", "output"],
)
def test_one_that_runs_away_is_stopped_and_the_rows_around_it_are_kept(how: str, reason: str) -> None:
    asked = [Asked([Message("user", text)]) for text in ("a", "b", "bad", "c")]
    started = time.process_time()
    texts = Renderer.of(runs_away_on("bad", how)).render(asked)
    assert texts[:2] + texts[3:] == ["a", "b", "c"]
    assert str(texts[2]) == f"the chat template {reason}"
    assert time.process_time() - started < 2, "the work is the child's"


def test_a_template_that_runs_away_again_and_again_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand such rows would take six hours."""
    monkeypatch.setattr(template_process, "MAX_STOPS", 1)
    asked = [Asked([Message("user", "bad")])] * 3
    with pytest.raises(ModelError, match=r"needs more than 256 MiB, on 2 conversations by now"):
        Renderer.of(runs_away_on("bad", "{{ 'x' * 999999999 }}{{ 'given up' }}")).render(asked)


def test_one_that_sleeps_is_stopped_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that is stopped uses no processor time."""
    monkeypatch.setattr(template_process, "WALL_SECONDS", 0.2)
    found = Renderer.of(with_template("{{ 'the clock' }}"))
    assert found.render([Asked([QUESTION])]) == ["the clock"]
    os.kill(found._child._process.pid, signal.SIGSTOP)
    (reason,) = found.render([Asked([QUESTION])])
    assert str(reason) == "the chat template is not done after 0.2 seconds"
    monkeypatch.undo()
    assert found.render([Asked([QUESTION])]) == ["the clock"]


def test_one_child_serves_all_conversations_of_a_tokenizer_and_ends_with_it() -> None:
    found = Renderer.of(with_template("{{ 'once' }}"))
    found.render([Asked([QUESTION])])
    process = found._child._process
    Renderer.of(with_template("{{ 'once' }}")).render([Asked([QUESTION])] * 5000)
    assert found._child._process is process
    found._child = None
    assert process.returncode is not None


def test_the_child_knows_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_unique")
    found = Renderer.of(with_template("{{ 'environment' }}"))
    found.render([Asked([QUESTION])])
    held = Path(f"/proc/{found._child._process.pid}/environ").read_bytes()
    names = {line.partition(b"=")[0] for line in held.split(b"\0") if line}
    assert names <= {b"LC_ALL", b"TZ", b"LD_LIBRARY_PATH"}


def test_rows_of_any_size_pass() -> None:
    long = "é" * 3_000_000
    texts = Renderer.of(with_template("{{ messages[0].content }}")).render([Asked([Message("user", long)])] * 3)
    assert texts == [long] * 3


def test_a_child_that_does_not_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "_library_folders", list)
    with pytest.raises(MachineError, match=r"does not start \(exit status 1\)"):
        Renderer("{{ 'x' }}", {}).render([Asked([QUESTION])])


def test_the_child_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; import qtune.data.template_worker;"
        "sys.exit(bool({'torch', 'transformers', 'qtune.data.template_process'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
