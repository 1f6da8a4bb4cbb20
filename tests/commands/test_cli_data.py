"""`qtune data check` and `qtune data show` as a user meets them."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_faults import CARD, KEY, LINES, MAIL, good, write_faulty

from qtune import cli

RECIPE = 'name = "t"\n[model]\nbase = "demo"\n[data]\n'


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with the faulty rows and their recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = signal.getsignal(signal.SIGTERM)
    write_faulty(tmp_path)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


def data(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["data", *arguments])
    return status, *capsys.readouterr()


def test_every_fault_is_told_by_line_and_the_exit_code_is_two(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    status, out, err = data(capsys, "check", "faulty.toml")
    assert (status, err) == (2, "")
    for code, line in LINES.items():
        assert f"[{code}]" in out
        assert f"faulty.jsonl:{line}:" in out
    assert "held_out.jsonl:1: is faulty.jsonl:1" in out
    assert "9 faults and 9 warnings in 26 rows." in out
    for secret in (KEY, MAIL, CARD):
        assert secret not in out


def test_as_json_it_is_all_there(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    status, out, err = data(capsys, "check", "faulty.toml", "--json")
    found = json.loads(out)
    assert (status, err) == (2, "")
    assert found["outcome"] == "faults"
    assert {finding["code"] for finding in found["findings"]} == {*LINES, "overlap"}
    assert [source["is_held_out"] for source in found["sources"]] == [False, True]
    assert sum(bar["rows"] for bar in found["tokens"]["bars"]) == found["tokens"]["rows"]
    for secret in (KEY, MAIL, CARD):
        assert secret not in out


def test_good_rows_pass_with_zero(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    Path("good.jsonl").write_text("".join(f"{good(number)}\n" for number in range(1, 9)))
    Path("good.toml").write_text(RECIPE + 'train = "good.jsonl"\n')
    status, out, err = data(capsys, "check", "good.toml", "--plot", ".")
    assert (status, err) == (0, "")
    assert out.rstrip().endswith("Nothing is wrong with 8 rows.")
    assert Path("tokens.png").is_file()


@pytest.mark.parametrize(("limit", "status"), [("0.5", 0), ("0.1", 2)])
def test_thresholds_are_the_recipes(workplace: Path, capsys: pytest.CaptureFixture, limit: str, status: int) -> None:
    Path("twice.jsonl").write_text((good(1) + "\n") * 2 + good(9) + "\n" + good(5) + "\n")
    Path("twice.toml").write_text(RECIPE + f'train = "twice.jsonl"\n[data.check]\nmax_duplicate_fraction = {limit}\n')
    assert data(capsys, "check", "twice.toml")[0] == status


def test_a_row_is_shown_by_its_line_and_a_bad_one_says_why(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    Path("rows.jsonl").write_text(f"{good(1)}\n\nnull\n")
    Path("rows.toml").write_text(RECIPE + 'train = "rows.jsonl"\n')
    status, out, _ = data(capsys, "show", "rows.toml", "--row", "rows.jsonl:1")
    assert status == 0
    assert "»Because of 31 and 1 reasons, said bbb.<|end|>«" in out
    status, out, _ = data(capsys, "show", "rows.toml", "--row", "2")
    assert status == 0
    assert out.splitlines()[:2] == ["rows.jsonl:3 · row 2", "not used: is null, not an object with columns"]
    status, _, err = data(capsys, "show", "rows.toml", "--row", "3")
    assert (status, err) == (2, "rows.jsonl: has 2 rows, so there is no row 3.\n")


def test_a_held_out_row_as_json(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    status, out, _ = data(capsys, "show", "faulty.toml", "--held-out", "--row", "2", "--json")
    row = json.loads(out)
    assert status == 0
    assert row["place"] == "held_out.jsonl:2"
    assert any(stretch["is_trained"] for stretch in row["stretches"])


def test_one_row_is_refused_by_the_check_too(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    """ "Nothing is wrong with 1 rows", it said, and `qtune check` had nothing to train on."""
    Path("one.jsonl").write_text(good(1))
    Path("one.toml").write_text(RECIPE + 'train = "one.jsonl"\n')
    status, out, err = data(capsys, "check", "one.toml")
    assert (status, err) == (2, "")
    assert "fault[nothing-left]: data.held_out_fraction = 0.05 leaves nothing to train on" in out
    assert out.rstrip().endswith("1 fault in 1 row.")
    assert data(capsys, "check", "one.toml", "--set", "data.held_out_fraction=0")[0] == 0


def test_a_general_text_that_is_none_is_refused_by_the_check_too(
    workplace: Path, capsys: pytest.CaptureFixture
) -> None:
    Path("good.jsonl").write_text("".join(f"{good(number)}\n" for number in range(1, 9)))
    Path("blank.txt").write_text("\n \n")
    Path("good.toml").write_text(RECIPE + 'train = "good.jsonl"\n[evaluate]\ngeneral = "blank.txt"\n')
    status, _, err = data(capsys, "check", "good.toml")
    assert status == 2
    assert "evaluate.general holds no text" in err


def test_an_answer_of_weight_0_is_shown_as_read_only(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    turns = [("user", "q"), ("assistant", "bad"), ("user", "again"), ("assistant", "good")]
    messages = [{"role": role, "content": text} for role, text in turns]
    messages[1] |= {"weight": 0, "mood": "hm"}  # type: ignore[dict-item]
    Path("rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    Path("rows.toml").write_text(RECIPE + 'train = "rows.jsonl"\n')
    status, out, _ = data(capsys, "show", "rows.toml")
    assert status == 0
    assert "»good<|end|>«" in out
    assert out.count("»") == 2
    assert "nobody reads `mood`" in out


def test_data_alone_says_what_there_is(capsys: pytest.CaptureFixture) -> None:
    status, out, _ = data(capsys)
    assert status == 0
    assert "check" in out
    assert "show" in out


@pytest.mark.parametrize("recipe", ["medical", "support", "code", "style", "tools"])
def test_the_shipped_samples_have_no_fault(recipe: str, capsys: pytest.CaptureFixture) -> None:
    status, out, err = data(capsys, "check", recipe, "--demo")
    assert (status, err) == (0, ""), out


@pytest.mark.parametrize(
    ("name", "status", "place"),
    [
        ("medquad/medquad_3000.jsonl", 0, "medquad_3000.jsonl:2,908"),
        ("formats/alpaca_en_demo.json", 0, "alpaca_en_demo.json row 276"),
        ("formats/c4.parquet", 0, ""),
        ("formats/sharegpt.jsonl", 0, ""),
        ("messy/one_broken_row.jsonl", 2, "one_broken_row.jsonl:6"),
        ("messy/pretty_printed_json_named.jsonl", 2, "pretty_printed_json_named.jsonl"),
        ("messy/excel_file_named.tsv", 2, "excel_file_named.tsv"),
    ],
)
def test_real_files(
    workplace: Path, material: Path, capsys: pytest.CaptureFixture, name: str, status: int, place: str
) -> None:
    train = json.dumps(str(material / "datasets" / name))
    Path("real.toml").write_text(RECIPE + f"train = {train}\nmax_tokens = 4096\n")
    found, out, err = data(capsys, "check", "real.toml")
    assert (found, err) == (status, "")
    assert place in out
