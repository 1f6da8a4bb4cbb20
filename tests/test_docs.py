"""The pages hold: commands parse, recipes validate, links lead somewhere, figures are those of the tables."""

import ast
import inspect
import re
import shlex
import sys
import tomllib
from argparse import ArgumentParser, _SubParsersAction
from collections.abc import Iterator
from pathlib import Path

import pytest

import qtune
from qtune.cli import build_parser
from qtune.evaluate.metrics import METRICS
from qtune.recipe import load

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import build_settings  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_FIGURES = [*PAGES, *sorted((ROOT / "benchmarks").glob("*.md"))]
ALL = [*WITH_FIGURES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
README = PAGES[0].read_text(encoding="utf-8")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")


def blocks(path: Path, language: str) -> list[str]:
    return [text for kind, text in FENCED.findall(path.read_text(encoding="utf-8")) if kind == language]


def prose(path: Path) -> str:
    """A page without its code blocks; a line feed inside a command is a space."""
    return " ".join(FENCED.sub("", path.read_text(encoding="utf-8")).split("\n"))


def whole_commands() -> Iterator[tuple[str, str]]:
    """(page, command) of every line of a code block that starts with qtune, without its comment."""
    for path in PAGES:
        for block in blocks(path, ""):
            for line in block.splitlines():
                if line.startswith("qtune "):
                    yield path.name, re.split(r"\s+#|\s+>", line)[0]


def mentions() -> Iterator[tuple[str, str]]:
    """(page, command) of every `qtune ...` in a sentence, which may leave out what it needs."""
    for path in WITH_FIGURES:
        for text in INLINE.findall(prose(path)):
            if text.startswith("qtune "):
                yield path.name, re.split(r"\s+>", text)[0]


def verb_of(parser: ArgumentParser, words: list[str]) -> ArgumentParser:
    """The parser of the verb that `words` begin with; an unknown verb is a KeyError."""
    actions = [action for action in parser._actions if isinstance(action, _SubParsersAction)]
    if not actions or not words or words[0].startswith("-"):
        return parser
    return verb_of(actions[0].choices[words[0]], words[1:])


@pytest.mark.parametrize(("page", "command"), list(whole_commands()))
def test_a_command_to_paste_is_one_that_qtune_takes(page: str, command: str) -> None:
    assert build_parser().parse_args(shlex.split(command)[1:]).verb


@pytest.mark.parametrize(("page", "command"), sorted(set(mentions())))
def test_verbs_and_options_in_sentences_are_there(page: str, command: str) -> None:
    words = shlex.split(command)[1:]
    verb = verb_of(build_parser(), words)
    known = set(verb._option_string_actions)
    assert {word for word in words if word.startswith("--")} <= known


def test_options_in_sentences_belong_to_some_verb() -> None:
    """Those of our own scripts and of other programs are named beside them, in one piece of code."""

    def options(parser: ArgumentParser) -> set[str]:
        inner = [action.choices.values() for action in parser._actions if isinstance(action, _SubParsersAction)]
        return set(parser._option_string_actions).union(*(options(each) for group in inner for each in group))

    of_others = {"--lora"}  # llama.cpp's
    alone = {text for path in PAGES for text in INLINE.findall(prose(path)) if text.startswith("--")}
    assert {text.split()[0] for text in alone} <= options(build_parser()) | of_others


@pytest.mark.parametrize(
    ("page", "snippet"),
    [(path.name, text) for path in PAGES for text in blocks(path, "toml")],
    ids=lambda text: text[:9],
)
def test_a_recipe_in_a_page_is_one_that_qtune_takes(
    page: str, snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the settings that every recipe has to have, where the page leaves them out."""
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "tickets.csv", "prose.txt"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "my.toml").write_text(snippet, encoding="utf-8")
    given = tomllib.loads(snippet)
    needed = {"name": "name=my", "model": "model.base=demo", "data": "data.train=rows.jsonl"}
    sets = [value for key, value in needed.items() if key not in given]
    if "data" in given and not {"train", "sources"} & given["data"].keys():
        sets.append(needed["data"])
    load.load(tmp_path / "my.toml", sets, False)


def targets(path: Path) -> Iterator[Path]:
    """What the links and pictures of a page lead to, without those on the web and those within the page."""
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", FENCED.sub("", path.read_text(encoding="utf-8"))):
        if "://" not in target:
            yield path.parent / target


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    assert [str(target) for target in targets(path) if not target.exists()] == []


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_links_within_a_page_lead_to_a_heading(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    headings = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.*)$", text, re.M)}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_scripts_that_are_named_are_there(path: Path) -> None:
    named = re.findall(r"\bscripts/[\w/]+(?:\.py)?(?![\w{])", path.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_verbs_that_answer_programs_are_all_named() -> None:
    verbs = next(action.choices for action in build_parser()._actions if isinstance(action, _SubParsersAction))
    answering = {name for name, verb in verbs.items() if "--json" in verb._option_string_actions}
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").split("## For programs")[1].split("`--json`")[0]
    assert {name.split()[0] for name in INLINE.findall(text)} == answering | {"data", "recipes"}


def test_the_readme_is_a_screen_and_a_half() -> None:
    assert len(README.splitlines()) <= 90
    assert max(map(len, README.splitlines())) <= 120
    assert README.count(".venv/bin/activate") == 1


def test_every_page_is_named_in_the_readme() -> None:
    assert {path.name for path in PAGES[1:]} == set(re.findall(r"\(docs/(\w+\.md)\)", README))


def test_the_library_is_told_of_as_it_is() -> None:
    """Every name with its parameters; code blocks can be read by Python, and use names that there are."""
    page = ROOT / "docs" / "python.md"
    told = {}
    for cell in (row[0] for row in rows(page)):
        for name, parameters in re.findall(r"`(\w+)(?:\(([^)]*)\))?`", cell):
            told[name] = [text.split("=")[0].strip(" *") for text in (parameters or "").split(",") if text.strip()]
    functions = {name: getattr(qtune, name) for name in qtune.__all__ if inspect.isroutine(getattr(qtune, name))}
    functions |= {name: getattr(qtune.Run, name) for name in dir(qtune.Run) if not name.startswith("_")}
    functions["Training"] = qtune.Training
    assert set(functions) - {"folder"} == set(told) - {"Run"}
    for name, function in functions.items():
        if callable(function):
            parameters = [each for each in inspect.signature(function).parameters if each not in ("self", "doing")]
            assert told[name] == (["tables"] if name == "make_recipe" else parameters), name
    for block in blocks(page, "python"):
        used = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Attribute)]
        named = {node.attr for node in used if isinstance(node.value, ast.Name) and node.value.id == "qtune"}
        assert named <= set(qtune.__all__)
    errors = {
        name
        for name in qtune.__all__
        if inspect.isclass(getattr(qtune, name)) and issubclass(getattr(qtune, name), Exception)
    }
    assert errors <= set(re.findall(r"\w+", page.read_text(encoding="utf-8").split("## Errors")[1]))


def test_all_settings_are_on_their_page_as_the_schema_has_them() -> None:
    assert build_settings.PAGE.read_text(encoding="utf-8") == build_settings.page()


def test_all_metrics_are_told_of_by_their_names() -> None:
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", text, re.M)) == {
        name: metric.label.name for name, metric in METRICS.items()
    }


def test_extras_are_those_of_the_project_and_asked_for_where_they_are() -> None:
    """`pip install 'qtune[verify]'` would ask an index that has no qtune, or one day a stranger's."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for path in ALL:
        text = path.read_text(encoding="utf-8")
        assert "qtune[" not in text
        assert set(re.findall(r"pip install '\.\[(\w+)\]'", text)) <= set(extras)


def rows(path: Path) -> list[list[str]]:
    """The cells of every line of the tables of a page."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_the_readmes_figures_of_the_demo_are_those_of_the_table() -> None:
    demo = next(row for row in rows(ROOT / "benchmarks" / "domains.md") if row[0] == "medical")
    _, _, base, tuned, _, _, asked, seconds, _ = demo
    assert f"none of {asked} questions, afterwards to {100 * float(tuned):.1f} % of them" in " ".join(README.split())
    assert float(base) == 0
    assert f"[{seconds} seconds]" in README


CONFIGS = {
    "Llama-3.2-1B": "llama3_2_1b_instruct",
    "Llama-3.2-3B": "llama3_2_3b_instruct",
    "Llama-3.1-8B": "llama3_1_8b_instruct",
    "Qwen3-1.7B": "qwen3_1_7b",
    "Qwen3-4B": "qwen3_4b",
    "Qwen3-14B": "qwen3_14b",
    "Qwen3-32B": "Qwen3-32B",
    "Phi-4 (14B)": "phi4",
}


def test_which_base_fits_which_card_is_what_the_plans_say() -> None:
    found = {row[0]: row for row in rows(ROOT / "benchmarks" / "README.md")}
    cards = found["model"]
    told = [row for row in rows(ROOT / "README.md") if row[0].endswith("GiB")]
    assert len(told) == 5
    for card, as_it_is, with_techniques in told:
        column = cards.index(card)
        assert found[CONFIGS[as_it_is]][column].endswith("nothing needed")
        plan = found[CONFIGS[with_techniques]][column]
        assert "recompute" in plan
        assert float(plan.split(" GiB")[0]) <= float(card.split()[0])


def test_what_matters_stands_below_or_behind_the_link_too() -> None:
    """The first table of the figures quotes others; a figure that is in none of them was made up, or is old."""
    page = ROOT / "benchmarks" / "README.md"
    text = page.read_text(encoding="utf-8")
    first = [row for row in rows(page) if len(row) == 6]
    assert first[0] == ["what", "figure", "machine", "date", "command", "more"]
    for what, figure, *_, more in first[2:]:
        file = re.findall(r"\(([\w.]+)\)", more)
        source = (page.parent / file[0]).read_text(encoding="utf-8") if file else text.split("\n## ", 1)[1]
        numbers = re.findall(r"\d+\.\d+|\b\d{2,}\b", figure)
        assert [number for number in numbers if number not in source] == [], what
