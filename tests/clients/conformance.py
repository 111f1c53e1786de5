"""Running containerd's snapshotter suite over a socket, and reading what it says."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from hpmapper.bench import gobuild
from tests.clients.servers import Server

SOURCE = Path(__file__).parent / "go/conformance"

SUBTESTS = (
    "Basic", "StatActive", "StatComitted", "TransitivityTest", "PreareViewFailingtest", "Update", "Remove", "Walk",
    "LayerFileupdate", "RemoveDirectoryInLowerLayer", "Chown", "DirectoryPermissionOnCommit",
    "RemoveIntermediateSnapshot", "DeletedFilesInChildSnapshot", "MoveFileFromLowerLayer", "Rename", "ViewReadonly",
    "StatInWalk", "CloseTwice", "RootPermission", "128LayersMount",
)  # fmt: skip
"""As the suite spells them, from 1.6 to 2.1."""

_TEST = "TestConformance"
_OUTCOMES = ("pass", "fail", "skip")


@dataclass
class Verdict:
    """What became of a subtest: "pass", "fail", "skip", or "" if it never ended; and all that it said."""

    outcome: str = ""
    output: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.output)


def run(binary: Path, server: Server, suite_name: str, roots: Path) -> dict[str, Verdict]:
    """Run the suite with a fresh server for each subtest, roots below `roots`; the whole's verdict is under "".

    The servers live in this process's mount namespace, as the suite does.
    """
    environment = os.environ | {
        "SNAPSHOTTER_COMMAND": server.command,
        "SNAPSHOTTER_NAME": suite_name,
        "TMPDIR": str(roots),
    }
    command = [*_converter(), str(binary), f"-test.run=^{_TEST}$", "-test.v", "-test.parallel=2"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    verdicts: dict[str, Verdict] = {}
    for line in done.stdout.splitlines():
        _take(line, verdicts)
    return verdicts


def _converter() -> list[str]:
    """Go's own program that turns a test's output into a stream of JSON."""
    tools = subprocess.run(["go", "env", "GOTOOLDIR"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    return [f"{tools}/test2json", "-t"]


def _take(line: bytes, verdicts: dict[str, Verdict]) -> None:
    try:
        event = json.loads(line)
    except ValueError:  # a word of a server, or of a program that it has started
        verdicts.setdefault("", Verdict()).output.append(line.decode(errors="replace") + "\n")
        return
    name = str(event.get("Test", "")).partition("/")[2]
    verdict = verdicts.setdefault(name, Verdict())
    if event["Action"] == "output":
        verdict.output.append(event["Output"])
    elif event["Action"] in _OUTCOMES:
        verdict.outcome = event["Action"]


def build(tree: Path | None = None) -> Path:
    """The suite of the host's containerd sources, or of a tree's."""
    return gobuild.build(gobuild.cache(), SOURCE, test=True, tree=tree)
