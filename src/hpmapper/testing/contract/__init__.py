"""The suite that every driver passes unchanged. It needs root, and pytest only if you like it:

    from hpmapper.testing import contract

    @pytest.mark.parametrize("case", contract.CASES, ids=contract.name_of)
    def test_mine(case: contract.Case, tmp_path: Path) -> None:
        with contract.subject(MyDriver(tmp_path / "data"), tmp_path) as subject:
            case(subject)

No case is left out: what a driver cannot do by its `Capabilities` is held to what it does instead. A driver with
`Capabilities.size_limits`, which depend on the file system, passes `LIMITS` too. After each case everything that it
made is removed through the engine, and nothing may be left on disk or mounted.

    subject        a driver under an engine, and verbs for cases
    lifecycle      made, used by many at once, removed; refused while in use
    changes        what containers do to files, seen in the mount, in the diff and after a commit
    layers         tars of every format, byte for byte
    hostile        tars and containers made to hurt
    capabilities   what the driver says of itself is true
    limits         how much a snapshot may keep
    graphtest      what Docker's suite for graph drivers checks, by its names
    containerd     what containerd's suite for snapshotters checks, by its names
"""

from __future__ import annotations

from hpmapper.testing.contract import capabilities as _capabilities
from hpmapper.testing.contract import changes as _changes
from hpmapper.testing.contract import containerd as _containerd
from hpmapper.testing.contract import graphtest as _graphtest
from hpmapper.testing.contract import hostile as _hostile
from hpmapper.testing.contract import layers as _layers
from hpmapper.testing.contract import lifecycle as _lifecycle
from hpmapper.testing.contract import limits as _limits
from hpmapper.testing.contract.subject import Case, Subject, subject

__all__ = ["CASES", "LIMITS", "Case", "Subject", "name_of", "subject"]

CASES: tuple[Case, ...] = (
    *_lifecycle.CASES,
    *_changes.CASES,
    *_layers.CASES,
    *_hostile.CASES,
    *_capabilities.CASES,
    *_limits.REFUSALS,
    *_graphtest.CASES,
    *_containerd.CASES,
)

LIMITS: tuple[Case, ...] = (*_limits.CASES, *_graphtest.LIMITS)


def name_of(case: Case) -> str:
    """A case's name, for pytest's `ids`."""
    return f"{case.__module__.rpartition('.')[2]}.{case.__name__}"
