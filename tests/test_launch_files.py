"""The files for other launchers say what qtune takes, and the page that names them has them all."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from qtune.cli import build_parser

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "launch"
FILES = sorted(FOLDER.iterdir())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_they_have_qtune_do_it_does(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    commands = re.findall(r"(?:what=\"|qtune )((?:run|resume) .+?)\"?$", text, re.MULTILINE)
    for command in commands:
        words = command.replace('"', "").split()
        assert build_parser().parse_args(words).verb in ("run", "resume")
    assert len(commands) == (0 if "volume" in path.name else 2)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_they_are_whole(path: Path) -> None:
    if path.suffix == ".sh":
        assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    else:
        assert all(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def test_the_page_names_each() -> None:
    page = (FOLDER.parent / "cards.md").read_text(encoding="utf-8")
    assert {f"launch/{path.name}" for path in FILES} <= set(re.findall(r"\]\((launch/[^)]+)\)", page))


def test_the_pods_find_the_first_by_its_name() -> None:
    service, _, job = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text(encoding="utf-8"))
    pod = job["spec"]["template"]["spec"]
    name, service_name = job["metadata"]["name"], service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service_name
    script = pod["containers"][0]["args"][0]
    assert f"--master-addr {name}-0.{service_name} " in script
    assert f"--nnodes {job['spec']['completions']} " in script
    assert f"--nproc-per-node {pod['containers'][0]['resources']['limits']['nvidia.com/gpu']} " in script
