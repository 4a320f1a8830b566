"""Two hosts on one machine: network namespaces with names, addresses and an SSH server of their own, and one disk.

What runs in one of them reaches the other, and this process, only over the wire between them.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TOOLS = ("ip", "unshare", "ssh", "sshd", "ssh-keygen", "pdsh")
BRIDGE = "kdrl-br"
NAMES = ("kdrl-node-1", "kdrl-node-2")
_NET = "10.231.77"


def why_not() -> str | None:
    """What this machine lacks for it."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)} (on Debian: apt-get install pdsh openssh-server iproute2)"
    if os.geteuid() != 0 or _run("unshare", "--net", "true", check=False):
        return "needs root, to make network namespaces"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoHosts:
    """Where they are."""

    hostfile: Path
    environment: Mapping[str, str]
    """With it `ssh` reaches them without a password."""


@contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Make them, with one slot each; afterwards they are gone with all that runs in them."""
    addresses = {os.uname().nodename: f"{_NET}.1", **{name: f"{_NET}.{11 + i}" for i, name in enumerate(NAMES)}}
    servers: list[subprocess.Popen[bytes]] = []
    folder.mkdir()
    try:
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
        _run("ip", "addr", "add", f"{_NET}.1/24", "dev", BRIDGE)
        _run("ip", "link", "set", BRIDGE, "up")
        config = _keys(folder, addresses)
        for index, name in enumerate(NAMES):
            _host(name, index, addresses)
            servers.append(_ssh_server(folder, name))
        _wrap_ssh(folder, config)
        (folder / "hosts").write_text("".join(f"{name} slots=1\n" for name in NAMES))
        environment = {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        _wait_for_servers(environment)
        yield TwoHosts(hostfile=folder / "hosts", environment=environment)
    finally:
        for name in NAMES:
            for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
                os.kill(int(pid), signal.SIGKILL)
        for server in servers:
            server.wait()
        for index, name in enumerate(NAMES):
            _run("ip", "link", "del", f"kdrl-v{index}", check=False)
            _run("ip", "netns", "del", name, check=False)
            shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)
        _run("ip", "link", "del", BRIDGE, check=False)


def processes_on(name: str) -> set[int]:
    """Process ids on one of the hosts, its SSH server aside."""
    pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True).stdout.split()
    return {int(pid) for pid in pids if b"sshd" not in Path("/proc", pid, "cmdline").read_bytes()}


def _host(name: str, index: int, addresses: Mapping[str, str]) -> None:
    """A namespace with a cable to the bridge and its own /etc/hosts."""
    _run("ip", "netns", "add", name)
    _run("ip", "link", "add", f"kdrl-v{index}", "type", "veth", "peer", "name", "eth0", "netns", name)
    _run("ip", "link", "set", f"kdrl-v{index}", "master", BRIDGE, "up")
    for command in (
        ("addr", "add", f"{addresses[name]}/24", "dev", "eth0"),
        ("link", "set", "eth0", "up"),
        ("link", "set", "lo", "up"),
    ):
        _run("ip", "-n", name, *command)
    etc = Path("/etc/netns", name)
    etc.mkdir(parents=True)
    lines = ["127.0.0.1 localhost", *(f"{address} {host}" for host, address in addresses.items())]
    (etc / "hosts").write_text("\n".join(lines) + "\n")


def _keys(folder: Path, addresses: Mapping[str, str]) -> Path:
    """Keys of both sides, and the client's configuration."""
    for key in ("host", "client"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
    config = folder / "ssh_config"
    for name in NAMES:
        with config.open("a") as file:
            file.write(f"Host {name}\n HostName {addresses[name]}\n")
    with config.open("a") as file:
        file.write(
            f"Host *\n IdentityFile {folder / 'client'}\n IdentitiesOnly yes\n BatchMode yes\n LogLevel ERROR\n"
            f" StrictHostKeyChecking no\n UserKnownHostsFile {folder / 'known'}\n"
        )
    return config


def _ssh_server(folder: Path, name: str) -> subprocess.Popen[bytes]:
    Path("/run/sshd").mkdir(exist_ok=True)
    options = [
        f"HostKey={folder / 'host'}",
        f"AuthorizedKeysFile={folder / 'client.pub'}",
        f"PidFile={folder / name}.pid",
        "StrictModes=no",
        "UsePAM=no",
        "PermitRootLogin=prohibit-password",
    ]
    server = [str(shutil.which("sshd")), "-D", "-e", "-f", "/dev/null", *(f"-o{option}" for option in options)]
    named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name, *server]
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(["ip", "netns", "exec", name, *named], stdout=log, stderr=log)


def _wrap_ssh(folder: Path, config: Path) -> None:
    """`ssh` with that configuration: what calls it here takes no options."""
    script = folder / "bin" / "ssh"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {config} "$@"\n')
    script.chmod(0o755)


def _wait_for_servers(environment: Mapping[str, str]) -> None:
    deadline = time.monotonic() + 10
    for name in NAMES:
        while _run("ssh", name, "true", check=False, env={**os.environ, **environment}):
            assert time.monotonic() < deadline, f"the SSH server of {name} does not answer"
            time.sleep(0.1)


def _run(*command: str, check: bool = True, env: Mapping[str, str] | None = None) -> int:
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.returncode
