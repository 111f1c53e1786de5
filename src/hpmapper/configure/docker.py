"""What Docker's daemon.json must say.

There are two ways to Docker. Which one is there depends on its version:

    image store   Docker 24 and newer: Docker leaves images to containerd, whose snapshotter we are
    plugin        Docker up to 26: we are a graph driver plugin (removed in 28; 27 wants an environment variable too)

Sources: moby, daemon/image_store_choice.go of v29; pkg/plugins and daemon/graphdriver/plugin.go of v26.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from hpmapper.configure.draft import ABSENT, Draft
from hpmapper.configure.version import Version
from hpmapper.errors import InvalidArgument, Unsupported

DEFAULT_FILE = "/etc/docker/daemon.json"
PLUGIN_DIRECTORY = "/run/docker/plugins"

_IMAGE_STORE = Version(24, 0, 0)
_NO_PLUGINS = Version(27, 0, 0)
_PLUGINS = Version(1, 13, 0)


class Way(StrEnum):
    """How Docker reaches us."""

    IMAGE_STORE = "image-store"
    PLUGIN = "plugin"


def draft(content: Mapping[str, Any], version: Version, name: str, way: Way | None) -> Draft:
    """Compare daemon.json's content with what it should say; `way` None: the one that Docker's version prefers.

    Raises:
        Unsupported: this version of Docker does not have that way.
    """
    chosen = way or (Way.IMAGE_STORE if version >= _IMAGE_STORE else Way.PLUGIN)
    result = Draft(dict(content))
    _image_store(result, version) if chosen is Way.IMAGE_STORE else _plugin(result, version, name)
    was = result.get(("storage-driver",))
    result.set(("storage-driver",), name, "Docker's storage driver")
    if was not in (ABSENT, name):
        result.note(f"images and containers of {was!r} stay on the disk, but Docker shows them only under that driver")
    return result


def _image_store(result: Draft, version: Version) -> None:
    if version < _IMAGE_STORE:
        raise Unsupported(
            f"Docker {version} has no containerd image store", hint=f"{_IMAGE_STORE} or newer, or --way plugin"
        )
    if result.get(("userns-remap",)):
        result.conflicts.append("userns-remap is set, and Docker's containerd image store does not work with it")
    result.set(
        ("features", "containerd-snapshotter"), True, "images are containerd's; needed where Docker had images before"
    )
    if result.get(("storage-opts",)):
        result.note("storage-opts stay, but Docker's containerd image store ignores them; see hpmapper's own config")
    result.note(
        "dockerd must use the system's containerd, as packages' units do with --containerd=…: the one that it "
        "starts itself has no proxy plugins. `hpmapper config containerd` prepares the system's"
    )


def _plugin(result: Draft, version: Version, name: str) -> None:
    if not _PLUGINS <= version < _NO_PLUGINS:
        raise Unsupported(
            f"Docker {version} takes no graph driver plugins",
            hint="--way image-store" if version >= _NO_PLUGINS else "a newer Docker is needed",
        )
    result.set(("experimental",), True, "Docker takes graph driver plugins only then")
    if result.get(("features", "containerd-snapshotter")):
        result.conflicts.append("features.containerd-snapshotter is set, and then Docker asks no graph driver")
    if result.get(("storage-opts",)):
        result.note("storage-opts are passed on to the plugin, which refuses those that it does not know")
    result.note(f"before dockerd starts: hpmapper serve --docker-plugin {PLUGIN_DIRECTORY}/{name}.sock")


def require_name(name: str) -> str:
    """Raise InvalidArgument unless a name can be that of a plugin; returns it."""
    if not name or not name.isascii() or not name.replace("-", "").replace("_", "").isalnum():
        raise InvalidArgument(f"{name!r} is no name for a plugin", hint="letters, digits, - and _")
    return name
