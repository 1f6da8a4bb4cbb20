"""What stands beside the code says the same as the code: one way to check, one version."""

import re
from pathlib import Path

import yaml

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
