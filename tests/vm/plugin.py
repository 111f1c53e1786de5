"""Tests marked `guest("FEATURE")` run in a guest under QEMU, whose kernel has what this host's may lack.

    @pytest.mark.guest("dm")                 run by ./test --vm
    @pytest.mark.guest("dm", short=True)     and by ./test, if the guest's image is in the cache

The host's pytest collects them; all that are chosen run in one guest, and each report that it sends is the test's own:
failures show as if they had happened here. Without --vm they are skipped, loudly.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.vm import image
from tests.vm.machine import QEMU, Died, Machine

INSIDE = "HPMAPPER_GUEST" in os.environ
"""Whether this is the guest."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--vm",
        choices=("all", "short", "none"),
        default="none",
        help="run the tests that need a guest kernel: all, the short ones if the image is cached, none [none]",
    )

    parser.addoption("--write-documents", action="store_true", help="write the documents that guest tests produce")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "guest(feature, short=False): needs a kernel with FEATURE; runs in a guest (tests/vm)"
    )
    if not INSIDE:
        config.pluginmanager.register(Guests(config), "guests")


class Guests:
    """Runs guest tests in a guest, after all others."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._chosen: list[pytest.Item] = []
        self._left_out = ""
        self._stack = ExitStack()
        self._machine: Machine | None = None
        self._gone = False
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
            item.add_marker(pytest.mark.skip(reason=why or "is not short: ./test --vm"))
        if left:
            self._left_out = f"{len(left)} of {len(guest)} tests in a guest kernel NOT RUN: {why or './test --vm'}"
        others = [item for item in items if item not in self._chosen]
        items[:] = [*others, *self._chosen]

    def _why_not(self) -> str:
        mode = self._config.getoption("--vm")
        if mode == "none":
            return "needs a guest kernel: ./test --vm"
        if os.geteuid() != 0:
            return "needs root: sudo ./test --vm"
        if shutil.which(QEMU) is None:
            return f"{QEMU} is not installed: apt install qemu-system-x86"
        if mode == "short" and image.cached() is None:
            return "the guest's image has not been built: ./test --vm builds it"
        return ""

    def _wanted(self, item: pytest.Item) -> bool:
        marker = item.get_closest_marker("guest")
        return self._config.getoption("--vm") == "all" or bool(marker and marker.kwargs.get("short"))

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

    def _reports(self, item: pytest.Item) -> list[pytest.TestReport]:
        """The item's reports, waited for; if the guest is gone, one that says so."""
        try:
            self._start()
            while not any(report.when == "teardown" for report in self._seen.get(item.nodeid, ())):
                self._take(next(self._arriving))
            return self._seen.pop(item.nodeid)
        except (Died, StopIteration) as error:
            tail = self._machine.tail(60) if self._machine and not self._gone else ""
            text = f"{error}\nthe guest sent no result of this test; the end of its console:\n{tail or 'see above'}"
            self._gone = True
            return [pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "call")]

    def _start(self) -> None:
        if self._machine is not None:
            return
        features = sorted({str(marker.args[0]) for item in self._chosen for marker in item.iter_markers("guest")})
        arguments = [item.nodeid for item in self._chosen]
        machine = Machine(image.build(), features, arguments, write_documents=self._writes)
        self._machine = self._stack.enter_context(machine)
        self._arriving = machine.lines()

    def _take(self, line: dict[str, Any]) -> None:
        if "report" in line:
            report = self._config.hook.pytest_report_from_serializable(config=self._config, data=line["report"])
            if isinstance(report.longrepr, list):  # of a skipped test: JSON knows no tuples
                report.longrepr = tuple(report.longrepr)
            self._seen.setdefault(report.nodeid, []).append(report)
            self._write_documents(report)
        else:
            self._remarks.append(": ".join(str(value) for value in line.values()))

    @property
    def _writes(self) -> bool:
        return bool(self._config.getoption("--write-documents"))

    def _write_documents(self, report: pytest.TestReport) -> None:
        if self._writes and report.when == "call":
            for name, text in report.user_properties:
                if name.startswith("document "):
                    (image.REPOSITORY / "docs" / name.removeprefix("document ")).write_text(str(text))
                    self._remarks.append(f"written: docs/{name.removeprefix('document ')}")

    def pytest_sessionfinish(self) -> None:
        if self._machine is not None:
            for line in self._arriving:
                self._take(line)
            closing = [line for line in self._machine.tail(5).splitlines() if not line.startswith("[ ")]
            self._remarks += [f"guest: {line}" for line in closing]
            seconds = time.monotonic() - self._machine.started
            self._remarks.append(f"guest: {self._machine.boots} boot(s), {seconds:.0f} s in all")
        self._stack.close()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not (self._remarks or self._left_out):
            return
        terminalreporter.section("guest kernel")
        for remark in self._remarks:
            terminalreporter.line(remark)
        if self._left_out:
            terminalreporter.line(self._left_out, yellow=True, bold=True)
