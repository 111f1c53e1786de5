"""Run a Python module of this checkout in a guest, and get what it found: for benchmarks that need the guest's kernel.

    python -m tests.vm.program [--feature dm]... MODULE [ARGUMENT]...

The module writes JSON to its standard output; what it writes to standard error goes to the console, and is shown if it
fails. The guest's processor is emulated: only ratios within one run mean something.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.vm import docker, image, zfs
from tests.vm.machine import Died, Machine

_TAIL = 60


def images(features: Sequence[str]) -> tuple[image.Image, dict[str, Path]]:
    """The image for a guest, and those of the disks that go with its features; built now if they have not been."""
    system = image.build()
    disks = {}
    if "docker" in features:
        disks["docker"] = docker.build()
    if "zfs" in features:
        disks["zfs"] = zfs.build(system)
    return system, disks


def run(module: str, arguments: Sequence[str] = (), features: Sequence[str] = ("dm",)) -> Any:
    """Run `python -m MODULE ARGUMENT...` in a guest of its own; returns its standard output, read as JSON.

    Args:
        features: what is loaded for it: keys of `tests.vm.inside.MODULES`, and "docker" for a disk with Docker 20.10.

    Raises:
        Died: the guest did not come up, or went down, or the module failed; with the end of the console.
    """
    root, disks = images(features)
    with Machine(root, features, arguments, module=module, disks=disks) as machine:
        for line in machine.lines():
            if line.get("status") == 0:
                return json.loads(line["output"])
        raise Died(f"{module} failed in the guest; the end of its console:\n{machine.tail(_TAIL)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--feature", action="append", default=[], help="what the guest is to have [dm]")
    parser.add_argument("module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    found = run(given.module, given.arguments, given.feature or ("dm",))
    json.dump(found, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
