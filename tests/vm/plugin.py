"""Tests marked `guest("FEATURE")` run in a guest under QEMU, whose kernel has what this host's may lack.

    @pytest.mark.guest("dm")                 run by ./test --vm
    @pytest.mark.guest("dm", short=True)     and by ./test

The feature "zfs" needs modules that are built from source once (tests/vm/zfs.py), which ./test leaves to ./test --vm.

The host's pytest collects them; all that are chosen run in one guest, beside the host's own tests, and each report that
it sends is the test's own: failures show as if they had happened here. The image of the guest is built meanwhile, if it
has not been. Without --vm they are skipped, loudly.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.vm import image, zfs
from tests.vm.image import REPOSITORY
from tests.vm.machine import QEMU

INSIDE = "HPMAPPER_GUEST" in os.environ
"""Whether this is the guest."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--vm",
        choices=("all", "short", "none"),
        default="none",
        help="run the tests that need a guest kernel: all, the short ones, none [none]",
    )

    parser.addoption("--write-documents", action="store_true", help="write the documents that guest tests produce")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "guest(feature, short=False): needs a kernel with FEATURE; runs in a guest (tests/vm)"
    )
    if not INSIDE:
        config.pluginmanager.register(Guests(config), "guests")


def _is_quick(feature: str) -> bool:
    """Whether a feature needs nothing that takes long to be built."""
    found = image.cached()
    return feature != "zfs" or (found is not None and zfs.cached(found) is not None)


_BUILD_SECONDS = 3600
"""More than building images takes, ZFS's modules included."""


class Beside:
    """The process that runs the guest, beside this pytest: a thread would not do, since tests fork."""

    def __init__(self, selection: dict[str, Any]) -> None:
        self._lines = os.memfd_create("guest")
        self._read = 0
        with tempfile.TemporaryFile("w+") as file:
            json.dump(selection, file)
            file.seek(0)
            command = [sys.executable, "-m", "tests.vm.guest"]
            self._process = subprocess.Popen(command, cwd=REPOSITORY, stdin=file, stdout=self._lines)

    def lines(self) -> Iterator[dict[str, Any]]:
        """What comes, waited for until the process ends."""
        while True:
            ended = self._process.poll() is not None
            yield from self._arrived()
            if ended:
                return
            time.sleep(0.2)

    def _arrived(self) -> Iterator[dict[str, Any]]:
        # The process writes through the same open file: pread leaves the place alone at which it writes.
        while data := os.pread(self._lines, 1 << 20, self._read):
            whole, newline, _ = data.rpartition(b"\n")
            if not newline:
                return
            self._read += len(whole) + 1
            for line in whole.splitlines():
                yield json.loads(line)

    def end(self) -> None:
        """End the process, and with it the guest."""
        self._process.terminate()
        self._process.wait()
        os.close(self._lines)


class Guests:
    """Runs guest tests in a guest, and shows their reports after all other tests."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._chosen: list[pytest.Item] = []
        self._left_out: list[str] = []
        self._guest: Beside | None = None
        self._died = ""
        self._seen: dict[str, list[pytest.TestReport]] = {}
        self._remarks: list[str] = []
        self._arriving: Iterator[dict[str, Any]] = iter(())

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        guest = [item for item in items if item.get_closest_marker("guest")]
        if not guest:
            return
        why = self._why_not()
        self._chosen = [] if why else [item for item in guest if self._wanted(item)]
        left = [item for item in guest if item not in self._chosen]
        for item in left:
            item.add_marker(pytest.mark.skip(reason=why or "is left to ./test --vm"))
        if left:
            self._left_out = [f"{len(left)} of {len(guest)} tests in a guest kernel NOT RUN: {why or './test --vm'}"]
            counts = Counter(item.nodeid.partition("[")[0] for item in left)
            self._left_out += [f"    {name}" + f" ({count} cases)" * (count > 1) for name, count in counts.items()]
        for item in self._chosen:
            item.add_marker(pytest.mark.timeout(self._patience(item)), append=False)
        others = [item for item in items if item not in self._chosen]
        items[:] = [*others, *self._chosen]

    def _patience(self, item: pytest.Item) -> float:
        """How long a report is waited for, in seconds: the guest's pytest ends the test sooner, once it has begun."""
        own = item.get_closest_marker("timeout")
        return (own.args[0] if own else float(self._config.getini("timeout"))) + _BUILD_SECONDS

    def _why_not(self) -> str:
        mode = self._config.getoption("--vm")
        if mode == "none":
            return "needs a guest kernel: ./test --vm"
        if os.geteuid() != 0:
            return "needs root: sudo ./test --vm"
        if shutil.which(QEMU) is None:
            return f"{QEMU} is not installed: apt install qemu-system-x86"
        return ""

    def _wanted(self, item: pytest.Item) -> bool:
        if self._config.getoption("--vm") == "all":
            return True
        marker = item.get_closest_marker("guest")
        return bool(marker and marker.kwargs.get("short") and _is_quick(str(marker.args[0])))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if item not in self._chosen:
            return None
        hook = item.ihook
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports(item):
            hook.pytest_runtest_logreport(report=report)
        hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if not self._chosen or session.config.option.collectonly:
            return
        marked = {str(marker.args[0]) for item in self._chosen for marker in item.iter_markers("guest")}
        arguments = [item.nodeid for item in self._chosen]
        wanted = {"features": sorted(marked), "arguments": arguments, "write_documents": self._writes}
        self._guest = Beside(wanted)
        self._arriving = self._guest.lines()

    def pytest_report_collectionfinish(self) -> str | None:
        if not self._chosen:
            return None
        how = "" if image.cached() else ", whose image is built first: a minute or more"
        return f"{len(self._chosen)} tests run in a guest kernel beside the others{how}"

    def _reports(self, item: pytest.Item) -> list[pytest.TestReport]:
        """The item's reports, waited for; if the guest is gone, one that says so."""
        while not any(report.when == "teardown" for report in self._seen.get(item.nodeid, ())):
            line = next(self._arriving, None)
            if line is None:
                text = f"the guest sent no result of this test; {self._died or 'it ended'}"
                self._died = "see above"
                return [pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "call")]
            self._take(line)
        return self._seen.pop(item.nodeid)

    def _take(self, line: dict[str, Any]) -> None:
        if "report" in line:
            report = self._config.hook.pytest_report_from_serializable(config=self._config, data=line["report"])
            if isinstance(report.longrepr, list):  # of a skipped test: JSON knows no tuples
                report.longrepr = tuple(report.longrepr)
            self._seen.setdefault(report.nodeid, []).append(report)
            self._write_documents(report)
        elif "died" in line:
            self._died = line["died"]
        else:
            self._remarks.append(": ".join(str(value) for value in line.values()))

    @property
    def _writes(self) -> bool:
        return bool(self._config.getoption("--write-documents"))

    def _write_documents(self, report: pytest.TestReport) -> None:
        if self._writes and report.when == "call":
            for name, text in report.user_properties:
                if name.startswith("document "):
                    (REPOSITORY / "docs" / name.removeprefix("document ")).write_text(str(text))
                    self._remarks.append(f"written: docs/{name.removeprefix('document ')}")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if self._guest is not None:
            if exitstatus != pytest.ExitCode.INTERRUPTED:
                for line in self._arriving:
                    self._take(line)
            self._guest.end()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not (self._remarks or self._left_out):
            return
        terminalreporter.section("guest kernel")
        for remark in self._remarks:
            terminalreporter.line(remark)
        for line in self._left_out:
            terminalreporter.line(line, yellow=True, bold=True)
