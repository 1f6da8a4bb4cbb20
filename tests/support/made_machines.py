"""Two machines of one: network namespaces with a wire between them, and a host name each; the first is `node0`, too."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

FIRST, SECOND = "10.77.0.1", "10.77.0.2"


@dataclass(frozen=True)
class Machine:
    """`name` is that of its namespace and host, `wire` its end of the wire."""

    name: str
    address: str
    wire: str

    def start(self, arguments: Sequence[str | Path], folder: Path, before: str = "", **env: str) -> subprocess.Popen:
        """Python there, with a network and a host name of its own; `before` is a line of shell, as root."""
        hosts = folder / f"hosts of {self.wire}"
        hosts.write_text(f"127.0.0.1 localhost\n{FIRST} node0\n{self.address} {self.name}\n", encoding="utf-8")
        command = f'hostname {self.name}; mount --bind "{hosts}" /etc/hosts; {before or ":"}; exec "$@"'
        words = ["ip", "netns", "exec", self.name, "unshare", "--uts", "--mount", "sh", "-c", command, "sh"]
        environment = {**os.environ, **env}
        out = subprocess.PIPE
        words += [sys.executable, *map(str, arguments)]
        return subprocess.Popen(words, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT, text=True)


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Skips the test where this process may not make network namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces are root's, and made with `ip`")
    first = Machine(f"qtune-a{os.getpid()}", FIRST, "wire-a")
    second = Machine(f"qtune-b{os.getpid()}", SECOND, "wire-b")
    if subprocess.run(["ip", "netns", "add", first.name], check=False, capture_output=True).returncode != 0:
        pytest.skip("this kernel forbids network namespaces")
    _ip("netns", "add", second.name)
    try:
        ends = (first.wire, "netns", first.name, "type", "veth", "peer", "name", second.wire, "netns", second.name)
        _ip("link", "add", *ends)
        for machine in (first, second):
            _ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", machine.wire)
            _ip("-n", machine.name, "link", "set", "lo", "up")
            _ip("-n", machine.name, "link", "set", machine.wire, "up")
        yield first, second
    finally:
        for machine in (first, second):
            subprocess.run(["ip", "netns", "del", machine.name], check=False, capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
