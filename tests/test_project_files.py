"""What stands beside the code says the same as the code: one way to check, one version."""

import re
from pathlib import Path

import yaml
from test_architecture import ROOMS

from qtune import __version__

ROOT = Path(__file__).resolve().parent.parent


def read_yaml(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_forge_runs_what_a_newcomer_runs_and_gives_it_time_enough() -> None:
    job = read_yaml(".github/workflows/ci.yml")["jobs"]["ci"]
    assert job["steps"][-1] == {"run": ".ci/run"}
    assert job["timeout-minutes"] > 25


def test_before_a_commit_the_checks_of_ci_are_run() -> None:
    hook = read_yaml(".pre-commit-config.yaml")["repos"][0]["hooks"][0]
    assert hook["entry"] == "scripts/lint"
    assert "scripts/lint" in (ROOT / ".ci/run").read_text(encoding="utf-8")


def test_the_changelog_names_the_version_and_what_is_new_since() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    versions = [heading.split(" ")[0] for heading in headings]
    assert versions[0] == "Unreleased"
    assert versions[1] == __version__
    assert all(re.fullmatch(r"\S+ \(\d{4}-\d\d-\d\d\)", heading) for heading in headings[1:])


def test_the_tour_names_what_is_there() -> None:
    tour = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"`((?:tests/|scripts/)?[a-z_/]+(?:\.py|/))`", tour))
    assert len(paths) > 20
    assert [path for path in sorted(paths) if not ((ROOT / path).exists() or (ROOT / "qtune" / path).exists())] == []


def test_the_tour_has_the_rooms_in_the_order_in_which_they_import() -> None:
    tour = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = tour.split("| room |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    assert [room for row in rows for room in re.findall(r"`([a-z_.]+)`", row.split("|")[1])] == ROOMS
