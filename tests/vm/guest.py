"""A guest for the tests that a pytest chose, in a process beside it: builds what is missing, boots, hands reports on.

    python -m tests.vm.guest < SELECTION > LINES

SELECTION is JSON: {"features": […], "arguments": [pytest's], "write_documents": bool}. LINES are what the guest sends
(`tests.vm.inside`), then remarks for the summary ({"remark": text}); {"died": text} if not all reports came. SIGTERM
ends it, and the guest.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from typing import Any

from tests.vm import program
from tests.vm.machine import Died, Machine


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    wanted = json.load(sys.stdin)
    try:
        _run(wanted["features"], wanted["arguments"], write_documents=wanted["write_documents"])
    except Died as error:
        _send({"died": str(error)})
    except Exception as error:
        _send({"died": f"the guest's image cannot be built: {error}"})


def _run(features: list[str], arguments: list[str], *, write_documents: bool) -> None:
    image, disks = program.images(features)
    started = time.monotonic()
    with Machine(image, features, arguments, disks=disks, write_documents=write_documents) as machine:
        for line in machine.lines():
            _send(line)
        _send({"died": f"the end of its console:\n{machine.tail(60)}"})
        for said in machine.tail(5).splitlines():
            if not said.startswith("[ "):
                _send({"remark": f"guest: {said}"})
        _send({"remark": f"guest: {machine.boots} boot(s), {time.monotonic() - started:.0f} s in all"})


def _send(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
