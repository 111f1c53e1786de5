"""The daemon: one per root, from lock to graceful stop."""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

from hpmapper.cache.manager import CacheManager
from hpmapper.cache.start import StartSettings
from hpmapper.cache.starts import Starts
from hpmapper.caretaker import Caretaker
from hpmapper.config import Config
from hpmapper.containerd.content import ContentStore
from hpmapper.containerd.diff import SERVICE as DIFF
from hpmapper.containerd.diff import DiffService
from hpmapper.containerd.health import HealthService
from hpmapper.containerd.snapshots import SERVICE as SNAPSHOTS
from hpmapper.containerd.snapshots import SnapshotService
from hpmapper.docker import plugin
from hpmapper.engine import Engine
from hpmapper.forest import Forest
from hpmapper.root import only_daemon, open_root
from hpmapper.rpc.calls import Calls
from hpmapper.rpc.server import Method, Server

log = logging.getLogger(__name__)

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_LISTEN_FDS_START = 3
_DRAIN_SECONDS = 30.0
"""How long calls that are under way may take when the daemon is told to stop; then they are cut off and undone."""

_SWITCH_SECONDS = 0.0005
"""How long a thread that reads a layer may hold Python's lock while a call waits for it: a tenth of the default."""


def serve(
    config: Config,
    address: Path,
    containerd: str,
    docker_plugin: Path | None = None,
    start: StartSettings | None = None,
) -> None:
    """Serve the root's snapshots on a unix socket until SIGTERM or SIGINT.

    Args:
        address: the socket's path; mode 0600. Under systemd's socket activation its socket is taken instead.
        containerd: path of containerd's own socket, whose content the differ reads.
        docker_plugin: a socket for Docker's graph driver plugin protocol, too.
        start: what is done about containers' starts.

    Raises:
        FailedPrecondition: another daemon serves the root or a socket. InvalidArgument: `config.metrics` is no address.
            Else as `open_root`.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    # Blocked before any thread is made, and waited for: a handler would run only once the main thread woke.
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    _allow_many_files()
    config.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with only_daemon(config.root), open_root(config) as opened:
        engine = opened.engine
        caretaker = Caretaker(engine)
        content = ContentStore(containerd)
        starts = Starts(engine.db, engine.driver, start)
        server = Server(methods(engine, caretaker, content, starts), engine.db.batch)
        _listen(server, address)
        manager = CacheManager(engine.db, engine.driver)
        calls = {"containerd": server.calls, "docker": Calls()}
        with (
            _at_work(manager),
            _at_work(starts),
            _running(server, caretaker, content),
            plugin.serving(engine, caretaker, docker_plugin, calls["docker"], starts)
            if docker_plugin
            else nullcontext(),
            _metrics(config.metrics, engine, manager, starts, calls),
        ):
            notify(f"READY=1\nSTATUS=serving {config.root} on {address}")
            log.info("serving %s on %s with the driver %s", config.root, address, engine.driver.name)
            signal.sigwait(_STOP_SIGNALS)
            notify("STOPPING=1")
            log.info("stopping: waiting for calls under way")


def methods(
    engine: Engine, caretaker: Caretaker, content: ContentStore, starts: Starts | None = None
) -> dict[str, Method]:
    """What is served to containerd, by path."""
    forest = Forest(engine, "containerd", caretaker, starts)
    services = (
        SnapshotService(forest, caretaker.clean_up),
        DiffService(forest, content),
        HealthService({SNAPSHOTS, DIFF}),
    )
    return {path: method for service in services for path, method in service.methods().items()}


@contextmanager
def _running(server: Server, caretaker: Caretaker, content: ContentStore) -> Iterator[None]:
    """Serve while the body runs; a server that cannot go on asks the daemon to stop, and is then started anew."""
    server.start(lambda: os.kill(os.getpid(), signal.SIGTERM))
    caretaker.start()
    try:
        yield
    finally:
        server.stop(_DRAIN_SECONDS)
        caretaker.stop()
        content.close()  # ends the reading of layers that nobody waits for any more
        server.close()


@contextmanager
def _at_work(helper: CacheManager | Starts) -> Iterator[None]:
    """Let it do its work while the body runs."""
    helper.start()
    try:
        yield
    finally:
        helper.stop()


@contextmanager
def _metrics(
    address: str | None, engine: Engine, manager: CacheManager, starts: Starts, calls: Mapping[str, Calls]
) -> Iterator[None]:
    """Tell Prometheus while the body runs, if an address is given."""
    if address is None:
        yield
        return
    from hpmapper.metrics.collect import registry  # 80 ms to import: only for those who want it
    from hpmapper.metrics.serve import serving

    with serving(address, registry(engine, manager, starts, calls)):
        yield


def _allow_many_files() -> None:
    """Every connection is an open file, and so are layers; the soft limit is there for select(2), which is not used."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _listen(server: Server, address: Path) -> None:
    """On systemd's socket, if it gave one (sd_listen_fds(3)), else on a new one."""
    if os.environ.get("LISTEN_PID") == str(os.getpid()) and int(os.environ.get("LISTEN_FDS", "0")) >= 1:
        os.set_inheritable(_LISTEN_FDS_START, False)
        server.adopt(socket.socket(fileno=_LISTEN_FDS_START))
    else:
        server.bind(address)


def notify(state: str) -> None:
    """Tell systemd, if it asked to be told (sd_notify(3))."""
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where:
        return
    name = "\0" + where[1:] if where.startswith("@") else where
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notifier:
        notifier.connect(name)
        notifier.sendall(state.encode())
