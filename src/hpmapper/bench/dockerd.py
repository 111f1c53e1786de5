"""Docker, started in a root file system of its own and asked over its API: today's, or 20.10 with devicemapper.

Docker 25 no longer has the driver, and distributions compiled it out before that; Debian 12's package still has it. Its
root file system is made by `tests.vm.docker` and entered with chroot; libdevmapper is told that no udev runs.
"""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import tarfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpmapper.image import oci
from hpmapper.testing.unixhttp import UnixConnection

_SECONDS = 180
_UNMOUNT_SECONDS = 0.2
"""20.10 unmounts what is not read any more at once; 26 leaves it to the container's removal."""
_SETUP = """
set -e
mount --bind "$1" "$1"
mount --rbind /dev "$1/dev"
mount --rbind /proc "$1/proc"
mount --rbind /sys "$1/sys"
mount -t tmpfs run "$1/run"
[ -z "$2" ] || mount --bind "$2" "$1/srv"
root=$1
shift 2
exec chroot "$root" /usr/sbin/dockerd "$@"
"""
_MOUNTS = {"devicemapper": ("mnt/{}", "/rootfs"), "overlay2": ("{}/merged", "")}
"""By driver: where it mounts what has a number, and where in that the root file system is."""


class Failed(Exception):
    """Docker did not start, or refused something."""


class Docker:
    """A daemon, for as long as the context lasts.

    Args:
        root: the root file system that it runs in.
        options: storage options ("dm.basesize=1G").
        driver: the storage driver.
        data: its data root, as a path in `root`.
        home: a directory that is seen at /srv in `root`.
    """

    def __init__(
        self,
        root: Path,
        options: Iterable[str] = (),
        driver: str = "devicemapper",
        data: str = "/var/lib/docker",
        home: Path | None = None,
    ) -> None:
        self._root = root
        self._data = data
        self._driver = driver
        self._log = root / "docker.log"
        words = ["--storage-driver", driver, "--data-root", data, "--host", "unix:///docker.sock"]
        # Without udev there is nothing to wait for; Docker wants to be told.
        given = [*options, *(["dm.override_udev_sync_check=true"] if driver == "devicemapper" else [])]
        words += [word for option in given for word in ("--storage-opt", option)]
        words += ["--bridge=none", "--iptables=false", "--ip-forward=false", "--ip-masq=false", "--experimental"]
        places = [str(root), str(home or "")]
        self._command = ["unshare", "-m", "--propagation", "private", "sh", "-c", _SETUP, "sh", *places, *words]

    def __enter__(self) -> Docker:
        socket_path = self._root / "docker.sock"
        socket_path.unlink(missing_ok=True)
        environment = {"PATH": os.environ["PATH"], "DM_DISABLE_UDEV": "1"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + _SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                self.call("GET", "/_ping")
            except OSError:
                time.sleep(0.1)
            else:
                return
        raise Failed(f"dockerd does not start:\n{self.log()}")

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()

    def log(self) -> str:
        """The end of what it said."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-40:])

    def call(self, method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> bytes:
        """One request; returns the answer's body. Failed: it was refused. OSError: nobody is there."""
        connection = UnixConnection(self._root / "docker.sock", _SECONDS * 10)
        try:
            connection.request(method, f"/v1.41{path}", body, {"Content-Type": kind} if body is not None else {})
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        if answer.status >= 400:
            raise Failed(f"{method} {path}: {answer.status} {data.decode(errors='replace').strip()}")
        return data

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """The same in JSON."""
        data = self.call(method, path, json.dumps(body).encode() if body is not None else None)
        return json.loads(data) if data else None

    def load(self, archive: bytes) -> None:
        """Bring in a docker-archive."""
        said = self.call("POST", "/images/load?quiet=1", archive, "application/x-tar")
        if b'"error"' in said:
            raise Failed(said.decode(errors="replace"))

    def create(self, image: str, command: Sequence[str] = ("true",)) -> str:
        """A container; its id."""
        body = {"Image": image, "Cmd": list(command), "HostConfig": {"NetworkMode": "none"}}
        made: str = self.ask("POST", "/containers/create", body)["Id"]
        return made

    def mount(self, container: str) -> None:
        """Have its root mounted, looked at, and unmounted: all that the API offers of that without a process in it."""
        self.call("HEAD", f"/containers/{container}/archive?path=/")

    @contextmanager
    def mounted(self, container: str) -> Iterator[Path]:
        """A container's root file system, mounted for as long as the context lasts.

        Without a process in it Docker mounts it only while somebody reads it: so an export is begun, and not read on.

        Raises:
            Failed: it is so small that the export ends by itself.
        """
        number = self._root_seen(f"{self._data}/image/{self._driver}/layerdb/mounts/{container}/mount-id").read_text()
        place, root = _MOUNTS[self._driver]
        inside = f"{self._data}/{self._driver}/{place.format(number)}"
        connection = UnixConnection(self._root / "docker.sock", _SECONDS * 10)
        try:
            connection.request("GET", f"/v1.41/containers/{container}/export")
            answer = connection.getresponse()
            if not self._is_mounted(inside):
                raise Failed(f"the root of {container} does not stay mounted: {answer.status}")
            yield self._root_seen(inside + root)
        finally:
            if connection.sock:
                connection.sock.shutdown(socket.SHUT_RDWR)  # the answer would hold on to a connection that is closed
            connection.close()
            deadline = time.monotonic() + _UNMOUNT_SECONDS
            while self._is_mounted(inside) and time.monotonic() < deadline:
                time.sleep(0.001)

    def _root_seen(self, inside: str) -> Path:
        """Where a path of Docker's is for others: it has mounts of its own."""
        return Path(f"/proc/{self._process.pid}/root{inside}")

    def _is_mounted(self, inside: str) -> bool:
        return f" {inside} " in Path(f"/proc/{self._process.pid}/mountinfo").read_text()

    def remove(self, container: str) -> None:
        """Remove a container."""
        self.call("DELETE", f"/containers/{container}?force=1")


def archive(name: str, layers: Sequence[bytes]) -> bytes:
    """A docker-archive with one image of these layers' tars (`docker save`'s form, which `docker load` reads)."""
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["true"], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [oci.sha256(layer) for layer in layers]},
    }
    data = json.dumps(config).encode()
    config_name = f"{oci.sha256(data).removeprefix('sha256:')}.json"
    names = [f"{number}/layer.tar" for number in range(len(layers))]
    manifest = [{"Config": config_name, "RepoTags": [name], "Layers": names}]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for member, content in [(config_name, data), *zip(names, layers, strict=True),
                                ("manifest.json", json.dumps(manifest).encode())]:  # fmt: skip
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()
