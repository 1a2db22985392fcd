"""Several hosts on this one machine, out of Linux namespaces: what a test of ranks on more than one host runs on.

A host has a network of its own (one interface on a switch that all share, and loopback), processes, host name,
/etc/hosts and /dev/shm of its own. Files and cores are the machine's: a folder is shared as one on NFS would be.

    with hosts(2, rate="1gbit") as (a, b):
        server = a.popen(["python", "-m", "http.server"])
        b.run(["curl", f"http://{a.address}:8000"], timeout=10)

Nothing here has a name outside the namespaces, and all of them end with a pipe that this process holds. So nothing
is left on any way out, its being killed included, and any number of tests may have hosts at once.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("ip", "tc", "unshare", "nsenter", "setpriv")
NAMESPACES = ("--net", "--pid", "--uts", "--mount")
# A TCP segment's headers: Ethernet 14, IPv4 20, TCP 20 and its timestamps 12.
HEADER_BYTES = 66
# The first process of a namespace: it takes in orphans, and ends (and all others with it) when its input does.
INIT = "trap '' INT TERM HUP; echo ready; while read -r; do :; done"


class NoHosts(RuntimeError):
    """Hosts, or such a network between them, cannot be made here."""


@cache
def why_not() -> str:
    """Why no hosts can be made here, in one sentence; empty if they can."""
    if sys.platform != "linux":
        return "hosts are made of Linux namespaces"
    if os.geteuid() != 0:
        return "hosts are made of namespaces, which needs root"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"hosts need the programs {', '.join(missing)} (Debian: iproute2, util-linux)"
    try:
        with hosts(2, rate="1gbit"):
            return ""
    except NoHosts as error:
        return str(error)


@cache
def why_no_delay() -> str:
    """Why no delay can be given to a link here, in one sentence; empty if it can."""
    try:
        with hosts(1, delay_ms=1):
            return ""
    except NoHosts as error:
        return str(error)


class Process(subprocess.Popen[str]):
    """A process of a host. Signals reach it; `pid` is that of nsenter, which took it there and waits for it."""

    def send_signal(self, number: int) -> None:
        inside = self._inside()
        if self.poll() is None and inside is not None:
            os.kill(inside, number)
        if number == signal.SIGCONT:  # nsenter stops when what it started does
            os.kill(self.pid, number)

    def _inside(self) -> int | None:
        """Its number out here, once nsenter has started it."""
        deadline = time.monotonic() + 5
        while self.poll() is None and time.monotonic() < deadline:
            try:
                if children := psutil.Process(self.pid).children():
                    return int(children[0].pid)
            except psutil.NoSuchProcess:
                break
            time.sleep(0.01)
        return None

    def __exit__(self, *error: Any) -> None:
        if self.poll() is None:
            self.kill()
        super().__exit__(*error)


@dataclass(frozen=True)
class Sent:
    """What a host has sent on its link so far: all bytes of its frames, and how many frames (up to 64 KiB each)."""

    frame_bytes: int
    frames: int

    @property
    def payload_bytes(self) -> int:
        """Without headers: what programs sent, to some hundred bytes a connection (its making, ARP)."""
        return self.frame_bytes - HEADER_BYTES * self.frames

    def __sub__(self, other: Sent) -> Sent:
        return Sent(self.frame_bytes - other.frame_bytes, self.frames - other.frames)


@dataclass(frozen=True)
class Host:
    """One host: `name` is its host name, `address` its IPv4 address on `eth0`, `init` its first process, seen here."""

    name: str
    address: str
    init: int
    _switch: int

    def popen(
        self,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path = ROOT,
        **options: Any,
    ) -> Process:
        """Start a command on this host, its output as text in pipes unless `stdout=` and `stderr=` say otherwise.

        Args:
            env: variables that it has besides this process's, or with other values.
            options: as `subprocess.Popen` takes them.
        """
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **options}
        # A shell's background jobs ignore SIGINT, and so would all that they start.
        signals = ["setpriv", "--pdeathsig", "KILL", "env", "--default-signal=INT"]
        return Process(
            [*_enter(self.init, NAMESPACES), *signals, "-C", str(cwd), *map(str, command)],
            env={**os.environ, **(env or {})},
            text=True,
            start_new_session=True,
            **options,
        )

    def run(
        self, command: Sequence[str | Path], *, timeout: float = 60, check: bool = True, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; CalledProcessError if it fails and `check`, TimeoutExpired after `timeout` s."""
        with self.popen(command, **options) as process:
            out, error = process.communicate(timeout=timeout)
        done = subprocess.CompletedProcess(process.args, process.returncode, out, error)
        if check and done.returncode:
            sys.stderr.write(error or "")
            done.check_returncode()
        return done

    def processes(self) -> dict[int, str]:
        """Every process of this host but its first: number, as `os.kill` out here takes it, and command line."""
        own = _namespace(self.init)
        found = {}
        for process in psutil.process_iter():
            try:
                if process.pid != self.init and _namespace(process.pid) == own:
                    found[process.pid] = " ".join(process.cmdline()) or process.name()
            except (psutil.Error, OSError):
                continue
        return found

    def cut(self) -> None:
        """Cut it off from the network, as if its cable were drawn: what it sends is lost, and nobody is told."""
        _ip(self._switch, "link", "set", self.name, "down")

    def restore(self) -> None:
        """Connect it again."""
        _ip(self._switch, "link", "set", self.name, "up")

    def sent(self) -> Sent:
        """What it has sent to the others so far; the difference of two of these is what it sent in between."""
        answer = _ip(self.init, "-j", "-s", "link", "show", "eth0")
        counts = json.loads(answer)[0]["stats64"]["tx"]
        return Sent(counts["bytes"], counts["packets"])

    def sockets(self) -> str:
        """Its open TCP connections, with what each has sent, as `ss` prints them."""
        return _tool([*_enter(self.init, ("--net",)), "ss", "-tinH"])


@contextmanager
def hosts(
    count: int, *, rate: str | None = None, delay_ms: float | None = None, own_name: str | None = None
) -> Iterator[tuple[Host, ...]]:
    """So many hosts, named host1, host2 and so on, on one switch.

    Args:
        rate: of each host's link, each way, as tc takes it: "1gbit", "100mbit".
        delay_ms: of each host's link, each way.
        own_name: the address that a host's own name has for itself, if not its address on the network: Debian's
            "127.0.1.1". The other hosts know it by its real one.

    Raises:
        NoHosts: if they, or such a network, cannot be made here.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="hosts-")))
        switch = stack.enter_context(_First(["--net"]))
        _ip(switch.pid, "link", "add", "switch", "type", "bridge")
        _ip(switch.pid, "link", "set", "switch", "up")
        firsts = [stack.enter_context(_First([*NAMESPACES, "--fork", "--mount-proc"])) for _ in range(count)]
        made = tuple(
            Host(f"host{number}", f"10.77.0.{number}", first.inner, switch.pid)
            for number, first in enumerate(firsts, 1)
        )
        for host in made:
            known = {"localhost": "127.0.0.1", **{other.name: other.address for other in made}}
            if own_name is not None:
                known[host.name] = own_name
            names = folder / host.name
            names.write_text("".join(f"{address} {name}\n" for name, address in known.items()))
            _furnish(host, names)
            _connect(host)
            _shape(host, rate, delay_ms)
        yield made


class _First:
    """The first process in namespaces of its own; they and all in them end with it."""

    def __init__(self, namespaces: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            ["unshare", *namespaces, "bash", "-c", INIT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process, which then ends them
        )
        self.pid = self._process.pid

    @property
    def inner(self) -> int:
        """The one that unshare forked into a namespace of processes, by its number out here."""
        return int(psutil.Process(self.pid).children()[0].pid)

    def __enter__(self) -> _First:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        if self._process.stdout.readline() != "ready\n":
            error = self._process.stderr.read().strip()
            self.__exit__(None, None, None)
            raise NoHosts(f"namespaces cannot be made here: {error}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        try:
            self._process.communicate(timeout=10)  # which closes its input
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


def _furnish(host: Host, names: Path) -> None:
    """Its own host name, names of hosts, shared memory and view of its devices."""
    mounts = f"mount --bind {names} /etc/hosts; mount -t tmpfs tmpfs /dev/shm"
    _tool([*_enter(host.init, NAMESPACES), "sh", "-ec", f"hostname {host.name}; {mounts}"])


def _connect(host: Host) -> None:
    """Its cable: eth0 on its side, a port of its name on the switch's."""
    inside = [*_enter(host.init, ("--net",)), "sysctl", "-qw"]
    _tool([*inside, "net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1"])  # which chatters
    _ip(host.init, "link", "set", "lo", "up")
    _ip(host.init, "link", "add", "eth0", "type", "veth", "peer", "name", host.name, "netns", str(host._switch))
    _ip(host._switch, "link", "set", host.name, "master", "switch", "up")
    _ip(host.init, "address", "add", f"{host.address}/24", "dev", "eth0")
    _ip(host.init, "link", "set", "eth0", "up")


def _shape(host: Host, rate: str | None, delay_ms: float | None) -> None:
    tc = [*_enter(host.init, ("--net",)), "tc", "qdisc", "add", "dev", "eth0"]
    if rate is not None:
        _tool([*tc, "root", "handle", "1:", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms"])
    if delay_ms is not None:
        try:
            _tool([*tc, *(("root",) if rate is None else ("parent", "1:1")), "netem", "delay", f"{delay_ms}ms"])
        except NoHosts as error:
            raise NoHosts(f"this kernel's tc has no netem, which delays a link ({error})") from None


def _namespace(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/pid")


def _ip(at: int, *words: str) -> str:
    return _tool([*_enter(at, ("--net",)), "ip", *words])


def _enter(at: int, namespaces: Sequence[str]) -> list[str]:
    return ["nsenter", "--target", str(at), *namespaces, "--"]


def _tool(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise NoHosts(f"{' '.join(command[4:])}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
