"""A thing is added by adding its file."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from qtune.registry import registered


@dataclass(frozen=True)
class Fruit:
    name: str
    order: int = 0


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty package `fruits_here`, forgotten again afterwards."""
    folder = tmp_path / "fruits_here"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("fruits_here")]:
        monkeypatch.delitem(sys.modules, name)
    return folder


def write(package: Path, module: str, *lines: str) -> None:
    text = "\n".join([f"from {__name__} import Fruit", *lines])
    (package / f"{module}.py").write_text(text, encoding="utf-8")


def test_every_file_of_the_package_adds_what_it_holds_in_their_order(package: Path) -> None:
    write(package, "a", "_PEAR = Fruit('pear', order=2)", "SIZE = 3")
    write(package, "b", "APPLE, FIG = Fruit('apple', order=2), Fruit('fig', order=1)")
    assert list(registered("fruits_here", Fruit)) == ["fig", "apple", "pear"]


def test_what_one_file_imports_of_another_is_one_thing(package: Path) -> None:
    write(package, "a", "PEAR = Fruit('pear')")
    write(package, "b", "from fruits_here.a import PEAR")
    assert list(registered("fruits_here", Fruit)) == ["pear"]


def test_two_of_one_name_are_refused(package: Path) -> None:
    write(package, "a", "PEAR = Fruit('pear')")
    write(package, "b", "PEAR = Fruit('pear')")
    with pytest.raises(ValueError, match=r"fruits_here\.b: pear is registered by another file"):
        registered("fruits_here", Fruit)
