"""Programs at work on data that lies in their image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hpmapper.bench import images
from hpmapper.bench.harness import Bench, NotHere, Run, Side, Turn, case, container, image
from hpmapper.bench.images import inside
from hpmapper.bench.images import run as run_program
from hpmapper.bench.measure import drop_caches
from hpmapper.bench.results import Quantity

_BARE = "the same on the bare file system"


_Work = Callable[[Path, Turn], None]
"""What a program does in a container's root."""


@contextmanager
def _each_run(
    side: Side, bench: Bench, work: _Work, build: Callable[[Path], Path] = images.applications
) -> Iterator[Run]:
    """Each run has a container of its own, of the image that `build` makes."""
    if bench.short:
        raise NotHere("the image takes minutes to build")

    def run(turn: Turn) -> None:
        with container(side, f"application-{turn.number}", "applications") as root:
            work(root, turn)

    with image(side, build(bench.images), "applications"):
        yield run


def _figures(script: str, *quantities: str) -> _Work:
    """A script that prints a figure for each of these quantities."""

    def work(root: Path, turn: Turn) -> None:
        for quantity, figure in zip(quantities, run_program(inside(root, script)).split(), strict=True):
            turn.note(quantity, float(figure))

    return work


def _cold_and_warm(script: str, cold: str, warm: str) -> _Work:
    """A script that is timed from empty caches, and once more."""

    def work(root: Path, turn: Turn) -> None:
        drop_caches()
        for quantity in (cold, warm):
            with turn.timed(quantity, scale=1):
                run_program(inside(root, script))

    return work


_SQLITE = """python3 -c "
import random, sqlite3, time
begin, n, first = time.monotonic(), 0, 0
db = sqlite3.connect('/data/sqlite/db', isolation_level=None)
while (now := time.monotonic() - begin) < 4:
    db.execute('update t set v = ? where id = ?', (str(n) * 20, random.randrange(500000)))
    n += 1
    first = first or time.monotonic() - begin
print(first * 1000, n / 4)
" """


@case(
    "apps",
    quantities=[
        Quantity("first transaction", "ms", "lower", _BARE),
        Quantity("transactions", "per second", "higher", _BARE),
    ],
    cold=True,
)
@contextmanager
def sqlite(side: Side, bench: Bench) -> Iterator[Run]:
    """SQLite updates random rows of a database in the image (500,000 rows, 120 MB), each in a durable transaction, for
    4 s; and how long the first one takes, with connecting."""
    with _each_run(side, bench, _figures(_SQLITE, "first transaction", "transactions")) as run:
        yield run


_POSTGRES = """bin=/usr/lib/postgresql/15/bin; begin=$(date +%s%N)
su postgres -s /bin/sh -c "$bin/pg_ctl -D /data/pg -w -o '-k /tmp -c listen_addresses=' start >/dev/null
  psql -h /tmp -Atc 'select 1' bench >/dev/null"
end=$(date +%s%N)
su postgres -s /bin/sh -c "pgbench -h /tmp -n -c 4 -j 2 -T 5 bench 2>/dev/null" >/tmp/said
su postgres -s /bin/sh -c "$bin/pg_ctl -D /data/pg -m immediate stop >/dev/null"
echo $(((end - begin) / 1000000)) $(sed -n 's/^tps = \\([0-9.]*\\).*/\\1/p' /tmp/said)
"""


@case(
    "apps",
    quantities=[
        Quantity("first answer", "ms", "lower", _BARE),
        Quantity("transactions", "per second", "higher", _BARE),
    ],
    cold=True,
)
@contextmanager
def postgresql(side: Side, bench: Bench) -> Iterator[Run]:
    """PostgreSQL 15 on a database in the image (pgbench's, scale 10, 160 MB): from its start to the first answer, and
    then pgbench's own transactions by four clients for 5 s."""
    with _each_run(side, bench, _figures(_POSTGRES, "first answer", "transactions")) as run:
        yield run


_NGINX = """nginx -c /data/nginx.conf & sleep 0.3
python3 -c "
import http.client, time
begin, n = time.monotonic(), 0
connection = http.client.HTTPConnection('127.0.0.1', 8080)
for f in range(1, 1001):
    connection.request('GET', f'/{f}'); assert len(connection.getresponse().read()) == 16384
print(1000 / (time.monotonic() - begin))
"
ab -q -k -c 8 -n 20000 http://127.0.0.1:8080/7 | sed -n 's/^Requests per second: *\\([0-9.]*\\).*/\\1/p'
"""


@case(
    "apps",
    quantities=[
        Quantity("each file once, cold", "per second", "higher", _BARE),
        Quantity("one file", "per second", "higher", _BARE),
    ],
    cold=True,
)
@contextmanager
def nginx(side: Side, bench: Bench) -> Iterator[Run]:
    """nginx serves 1,000 static files of 16 KiB, each once, from empty caches; then one of them again and again, to
    eight clients (ab)."""
    with _each_run(side, bench, _figures(_NGINX, "each file once, cold", "one file")) as run:
        yield run


@case(
    "apps",
    quantities=[Quantity("cold", "s", "lower", _BARE), Quantity("warm", "s", "lower", _BARE)],
)
@contextmanager
def imports(side: Side, bench: Bench) -> Iterator[Run]:
    """Python imports Flask and SQLAlchemy (600 modules, compiled in the image) in a new container: from empty caches,
    and once more."""
    script = "exec python3 -B -c 'import flask, sqlalchemy.orm, sqlite3'"
    with _each_run(side, bench, _cold_and_warm(script, "cold", "warm"), images.debian_web) as run:
        yield run


@case(
    "apps",
    quantities=[Quantity("first, cold", "s", "lower", _BARE), Quantity("again", "s", "lower", _BARE)],
)
@contextmanager
def git_status(side: Side, bench: Bench) -> Iterator[Run]:
    """git status in a repository of 20,000 files in the image: first from empty caches, where git reads every file
    again, since they have other inodes than when it was built; and once more, when its index is fresh."""
    script = "cd /data/git && git -c safe.directory='*' status --short"
    with _each_run(side, bench, _cold_and_warm(script, "first, cold", "again")) as run:
        yield run
