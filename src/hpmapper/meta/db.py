"""The connection: SQLite with a write-ahead log, one writer at a time, typed rows by hand."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from hpmapper.errors import Corrupt, FailedPrecondition, NoSpace, Unsupported
from hpmapper.meta.schema import MIGRATIONS, SCHEMA, VERSION
from hpmapper.model import SnapshotId

_BUSY_SECONDS = 60.0


class Database:
    """One root's database, for use by several threads: each has its own connection.

    Raises (from any method):
        Corrupt: SQLite says that the file is damaged.
        NoSpace: the file system is full.
    """

    def __init__(self, path: Path) -> None:
        """Open the database, made on first use.

        Raises:
            Unsupported: a newer hpmapper wrote it.
        """
        self.path = path
        self._local = threading.local()
        self.chains: dict[SnapshotId, tuple[str | None, list[SnapshotId]]] = {}
        """What `snapshots.layers_below` keeps of what it found."""
        self._writer = threading.Lock()  # SQLite's own waiting between connections is by sleeping
        self._connections: list[sqlite3.Connection] = []
        with translated(path):
            self._prepare()

    @property
    def files(self) -> list[Path]:
        """The database's files, which this process must neither open nor close otherwise while it is open.

        SQLite's locks are POSIX locks, which go with any closing of the file (sqlite.org/howtocorrupt.html, 2.2):
        another process would then take the database for unused, and delete the log behind the connections here.
        """
        names = (self.path, Path(f"{self.path}-wal"), Path(f"{self.path}-shm"))
        return [name for name in names if name.exists()]

    def close(self) -> None:
        """Close every thread's connection."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()

    @contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """A write transaction, committed at the end or rolled back on an error.

        A durable one is on stable storage when this returns, with all that came before it. One that is not may be
        lost with the machine's power, whole, but never torn: enough where losing it does no harm (a container nobody
        has written to yet), and ten times cheaper.
        """
        connection = self._connection()
        batch: _Batch | None = self._local.batch
        try:
            # One generator in the other: starting a container waits for this, and each `with` takes its time.
            yield from batch.part(connection) if batch else self._transaction(connection, durable=durable)
        except sqlite3.DatabaseError as error:
            raise _explained(error, self.path) from error

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Let this thread's transactions in the body be parts of one, which is durable when this returns.

        Each can still fail by itself. Should the whole fail, none has happened.
        """
        connection = self._connection()
        with translated(self.path), ExitStack() as stack:
            begin = contextmanager(self._transaction)
            batch = _Batch(lambda: stack.enter_context(begin(connection, durable=True)))
            self._local.batch = batch
            try:
                yield
            finally:
                self._local.batch = None
        for act in batch.afterwards:
            act()

    def afterwards(self, act: Callable[[], object]) -> None:
        """Do something once what this thread has recorded is: now, or after its batch, if that succeeds."""
        self._connection()
        if self._local.batch is None:
            act()
        else:
            self._local.batch.afterwards.append(act)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Let this thread's queries in the body see one and the same state."""
        connection = self._connection()
        if connection.in_transaction:
            yield
            return
        with translated(self.path):
            connection.execute("BEGIN")
            try:
                yield
            finally:
                connection.execute("ROLLBACK")

    def _transaction(self, connection: sqlite3.Connection, *, durable: bool) -> Iterator[sqlite3.Connection]:
        with self._writer:
            if self._local.durable is not durable:
                connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                self._local.durable = durable
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # SQLite ends it by itself when there is no space left
                    connection.execute("ROLLBACK")
                raise

    def in_transaction(self) -> bool:
        """Whether this thread's queries see its own state of the database, not the one that all see now."""
        return self._connection().in_transaction

    def rows(self, sql: str, *values: object) -> list[Any]:
        """The rows of a query, as `sqlite3.Row`."""
        try:
            return self._connection().execute(sql, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise _explained(error, self.path) from error

    def row(self, sql: str, *values: object) -> Any:
        """The first row of a query, or None."""
        try:
            return self._connection().execute(sql, values).fetchone()
        except sqlite3.DatabaseError as error:
            raise _explained(error, self.path) from error

    def setting(self, key: str) -> str | None:
        """A setting of the root, None where it was never set."""
        row = self.row("SELECT value FROM setting WHERE key = ?", key)
        return str(row[0]) if row else None

    def set_setting(self, key: str, value: str) -> None:
        """Set a setting of the root."""
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO setting VALUES (?, ?)", (key, value))

    def forget_setting(self, key: str) -> None:
        """Have a setting of the root as if it had never been set."""
        with self.transaction() as db:
            db.execute("DELETE FROM setting WHERE key = ?", (key,))

    def integrity_errors(self) -> list[str]:
        """What SQLite's own check finds wrong with the file."""
        found = [str(row[0]) for row in self.rows("PRAGMA integrity_check")]
        found += [f"{row[0]} row {row[1]} refers to nothing" for row in self.rows("PRAGMA foreign_key_check")]
        return [line for line in found if line != "ok"]

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(
                self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA foreign_keys = ON")
            self._local.connection = connection
            self._local.durable = None
            self._local.batch = None
            self._connections.append(connection)
        return connection

    def _prepare(self) -> None:
        db = self._connection()
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version == VERSION:
            return
        if version > VERSION:
            raise Unsupported(
                f"{self.path} has format {version}, this hpmapper knows up to {VERSION}", hint="use the newer hpmapper"
            )
        db.execute("PRAGMA journal_mode = WAL")
        with self.transaction() as db:
            # Another process may have been first: look again, now that nobody else can write.
            version = db.execute("PRAGMA user_version").fetchone()[0]
            for script in [SCHEMA] if version == 0 else [MIGRATIONS[old] for old in range(version, VERSION)]:
                for statement in _statements(script):
                    db.execute(statement)
            db.execute(f"PRAGMA user_version = {VERSION}")


class _Batch:
    """A thread's batch: its transaction begins with the first part."""

    def __init__(self, begin: Callable[[], object]) -> None:
        self.afterwards: list[Callable[[], object]] = []
        self._begin = begin
        self._begun = False

    def part(self, connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
        """A transaction that is a part of it, for `Database.transaction`."""
        if not self._begun:
            self._begin()
            self._begun = True
        # SQLite may have ended the whole of it for lack of space: the savepoint would begin another.
        if not connection.in_transaction:
            raise NoSpace("the database could not take what was recorded together with this", hint="try again")
        connection.execute("SAVEPOINT part")
        try:
            yield connection
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK TO part")
                connection.execute("RELEASE part")
            raise
        connection.execute("RELEASE part")


def _statements(script: str) -> Iterator[str]:
    """Split a script; `executescript` would commit the transaction around it."""
    pending = ""
    for line in script.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            yield pending
            pending = ""


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn SQLite's errors that a user can act on into ours."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise _explained(error, path) from error


def _explained(error: sqlite3.DatabaseError, path: Path) -> Exception:
    """What an error of SQLite's is for the user; itself if it is a bug."""
    match getattr(error, "sqlite_errorcode", None):
        case sqlite3.SQLITE_FULL:
            return NoSpace(f"no space left for {path}", hint="free some space on its file system")
        case sqlite3.SQLITE_BUSY:
            return FailedPrecondition(f"{path} has been locked for {_BUSY_SECONDS:.0f} s", hint="try again")
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_READONLY:
            return FailedPrecondition(f"{path} cannot be opened: {error}", hint="run as root; see --root")
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return Corrupt(f"{path} is damaged: {error}", hint="restore it from a backup")
    return error
