"""What a result was measured on: the machine's facts, and what else went on during each run."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from hpmapper.bench.results import Noise
from hpmapper.kernel.fs import filesystem_name
from hpmapper.pool.base import format_size

_TOOLS = {
    "mkfs.xfs": ["-V"],
    "mkfs.ext4": ["-V"],
    "mkfs.btrfs": ["--version"],
    "mkfs.erofs": ["--version"],
    "fio": ["--version"],
}


def facts(work: Path) -> dict[str, str]:
    """Kernel, processor, memory, disk and versions, each as text; nothing that names the machine."""
    found = {
        "kernel": platform.release(),
        "processor": _processor(),
        "processors": f"{os.cpu_count()}, of which {len(os.sched_getaffinity(0))} may be used; nothing is pinned",
        "memory": format_size(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
        "hypervisor": _hypervisor(),
        "frequency": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "not told",
        "huge pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "page cache": _reclaimer(),
        "work directory": filesystem_name(work),
        "disk": _disk(work),
        "python": platform.python_version(),
        "hpmapper": version(),
    }
    return found | {name: said for name in _TOOLS if (said := _said(name))}


def version() -> str:
    """hpmapper's version, with the commit where it runs out of a checkout."""
    top = Path(__file__).parents[3]
    commit = ""
    if (top / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(top), "-c", "safe.directory=*", "describe", "--always", "--dirty"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        commit = f" ({done.stdout.strip()})" if done.returncode == 0 else ""
    try:
        return metadata.version("hpmapper") + commit
    except metadata.PackageNotFoundError:  # it runs from its sources, as in a guest
        return f"not installed{commit}"


def _processor() -> str:
    models = re.findall(r"^model name\s*: (.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return models[0] if models else platform.machine()


def _hypervisor() -> str:
    if "hypervisor" not in _read("/proc/cpuinfo"):
        return "none seen"
    return _read("/sys/class/dmi/id/product_name") or _read("/sys/hypervisor/type") or "one that has no name"


def _reclaimer() -> str:
    """Whether pages are taken away though memory is free (Documentation/admin-guide/mm/damon/usage.rst)."""
    threads = Path("/sys/kernel/mm/damon/admin/kdamonds").glob("[0-9]*")
    running = [thread for thread in threads if _read(thread / "state") == "on"]
    actions = {_read(action) for thread in running for action in thread.glob("contexts/*/schemes/*/action")}
    return "DAMON takes away what is not used for a while" if "pageout" in actions else "kept while memory is free"


def _disk(work: Path) -> str:
    """The device below the work directory, and how it is driven."""
    number = work.stat().st_dev
    place = Path("/sys/dev/block", f"{os.major(number)}:{os.minor(number)}").resolve()
    if not place.exists():
        return "not a block device"
    whole = place if (place / "queue").exists() else place.parent
    model = _read(whole / "device/model") or whole.name
    kind = "rotating" if _read(whole / "queue/rotational") == "1" else "not rotating"
    return f"{model}, {kind}, scheduler {_read(whole / 'queue/scheduler')}, {_read(whole / 'queue/write_cache')}"


def _said(name: str) -> str:
    if shutil.which(name) is None:
        return ""
    done = subprocess.run([name, *_TOOLS[name]], capture_output=True, text=True, check=False)
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0] if lines else "does not say"


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def watch() -> Callable[[], Noise]:
    """Begin to watch the machine; what is returned ends it and tells."""
    begin, waited, ticks = time.monotonic(), _waited(), _ticks()
    load = os.getloadavg()[0]

    def end() -> Noise:
        seconds = max(time.monotonic() - begin, 1e-6)
        now = _ticks()
        every = max(sum(now) - sum(ticks), 1)
        stolen = (now[7] - ticks[7]) / every
        return Noise(round(load, 2), round(min(1.0, (_waited() - waited) / seconds), 3), round(stolen, 3))

    return end


def _waited() -> float:
    """Seconds in which some task waited for a CPU, since the boot (Documentation/accounting/psi.rst)."""
    found = re.search(r"^some .*total=(\d+)", _read("/proc/pressure/cpu"), re.MULTILINE)
    return int(found[1]) / 1e6 if found else 0.0


def _ticks() -> list[int]:
    """Time of all CPUs by kind (proc_stat(5)): the eighth is stolen."""
    return [int(word) for word in _read("/proc/stat").splitlines()[0].split()[1:9]]
