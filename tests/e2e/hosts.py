"""Several hosts on one machine: network namespaces on one virtual switch, each with an address of its own.

They share the file system, except for Ray's temporary folder, and a user namespace that makes the caller their root.
Nothing outside them changes, and all of it is gone when their processes are.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NETWORK = "10.77.0"

RAY_FOLDER = Path("/tmp/ray")
"""Two nodes of a cluster that share it mistake each other's address for their own."""

NEW_USER = ("unshare", "--user", "--map-root-user", "--net", "--mount")


@dataclass(frozen=True)
class Host:
    """A network namespace, by the process that holds it open."""

    holder: subprocess.Popen[bytes]
    address: str

    def command(self, *command: str) -> list[str]:
        """`command`, to run on this host."""
        return [*_entering(self.holder), *command]

    def request(self, method: str, url: str, body: Any = None) -> tuple[int, bytes]:
        """The status and body of the response to an HTTP request from this host; status 0 if there is none."""
        command = ["curl", "--silent", "--max-time", "120", "--request", method, "--write-out", "\n%{http_code}", url]
        if body is not None:
            command += ["--header", "content-type: application/json", "--data", json.dumps(body)]
        answer, _, status = subprocess.run(self.command(*command), capture_output=True).stdout.rpartition(b"\n")
        return int(status), answer


def can_be_made() -> bool:
    """Whether this machine lets its users make namespaces, as most Linux machines do."""
    tools = all(shutil.which(tool) for tool in ("unshare", "nsenter", "ip", "curl"))
    return tools and subprocess.run([*NEW_USER, "true"], capture_output=True).returncode == 0


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """`count` hosts that can reach each other."""
    RAY_FOLDER.mkdir(exist_ok=True)
    with ExitStack() as stack:
        switch = stack.enter_context(_held_open(NEW_USER))
        _run(switch, "ip link add switch type bridge")
        _run(switch, "ip link set switch up")
        found = []
        for number in range(1, count + 1):
            holder = stack.enter_context(_held_open([*_entering(switch), "unshare", "--net", "--mount"]))
            host = Host(holder, f"{NETWORK}.{number}")
            _run(switch, f"ip link add port{number} type veth peer name eth0 netns {holder.pid}")
            _run(switch, f"ip link set port{number} master switch up")
            _run(holder, "ip link set lo up")
            _run(holder, f"ip address add {host.address}/24 dev eth0")
            _run(holder, "ip link set eth0 up")
            # Ray looks up its address on the route to the internet.
            _run(holder, "ip route add default dev eth0")
            _run(holder, f"mount -t tmpfs tmpfs {RAY_FOLDER}")
            # No name server can be reached, and a lookup (torch does one) would wait for it.
            _run(holder, "mount --bind /dev/null /etc/resolv.conf")
            found.append(host)
        yield found


def _entering(holder: subprocess.Popen[bytes]) -> list[str]:
    namespaces = ["--user", "--net", "--mount"]
    return ["nsenter", "--target", str(holder.pid), *namespaces, "--preserve-credentials", f"--wd={Path.cwd()}"]


@contextmanager
def _held_open(unshare: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """New namespaces that last as long as the context."""
    before = Path("/proc/self/ns/net").readlink()
    with subprocess.Popen([*unshare, "sleep", "infinity"]) as holder:
        try:
            while Path(f"/proc/{holder.pid}/cmdline").read_bytes() != b"sleep\0infinity\0":
                if holder.poll() is not None:
                    raise RuntimeError(f"{unshare} ended with status {holder.returncode}")
                time.sleep(0.01)
            assert Path(f"/proc/{holder.pid}/ns/net").readlink() != before
            yield holder
        finally:
            holder.kill()


def _run(holder: subprocess.Popen[bytes], command: str) -> None:
    subprocess.run([*_entering(holder), *command.split()], check=True)
