"""The database: the only authority on what exists. This text is its reference.

Anything on disk that no row names is rubbish of a crash. Times are nanoseconds since 1970, sizes bytes, digests of
objects and maps raw BLAKE3, digests of OCI things text ("sha256:…").
"""

from __future__ import annotations

VERSION = 6
"""Kept in `PRAGMA user_version`. A newer one is refused, an older one migrated by `MIGRATIONS`."""

CHAINS_CHANGED = "chains_changed"
"""The setting that has another value whenever a committed snapshot has got another layer."""

_FRONT_ENDS = """
-- What containerd's differ read for an active snapshot: the layer lies below its own storage, and becomes it at commit.
CREATE TABLE applied (
    snapshot INTEGER PRIMARY KEY REFERENCES snapshot (id) ON DELETE CASCADE,
    layer    INTEGER NOT NULL REFERENCES layer (id)
);
CREATE INDEX applied_layer ON applied (layer);

-- Chain IDs (OCI image spec) of snapshots that have another key, where all layers' DiffIDs are known.
CREATE TABLE chain (
    snapshot INTEGER PRIMARY KEY REFERENCES snapshot (id) ON DELETE CASCADE,
    chain_id TEXT NOT NULL
);
CREATE INDEX chain_id ON chain (chain_id);

-- Compressed layers that were read: which tar is in them, so that one that comes again need not be.
CREATE TABLE blob (
    digest   TEXT PRIMARY KEY,            -- sha256 of the blob
    diff_id  TEXT NOT NULL,
    tar_size INTEGER NOT NULL
) WITHOUT ROWID;
"""

_SIZE_LIMIT = """
-- How much an active snapshot may keep, in bytes; those without a limit are not in here.
CREATE TABLE size_limit (
    snapshot INTEGER PRIMARY KEY REFERENCES snapshot (id) ON DELETE CASCADE,
    size     INTEGER NOT NULL
);
"""

_START_PROFILES = """
-- What a container of the image reads while it starts (hpmapper.cache.profile has the format).
CREATE TABLE start_profile (
    image    TEXT PRIMARY KEY REFERENCES image (id) ON DELETE CASCADE,
    profile  BLOB NOT NULL,
    recorded INTEGER NOT NULL
) WITHOUT ROWID;
"""

_CHAIN_PROFILES = """
-- What containers read while they start (hpmapper.cache.profile has the format), by the chain ID of their layers.
CREATE TABLE chain_profile (
    chain_id TEXT PRIMARY KEY,
    profile  BLOB NOT NULL,
    recorded INTEGER NOT NULL
) WITHOUT ROWID;
"""

_CHAINS = f"""
-- Not one of every active snapshot, which has none.
CREATE INDEX snapshot_layer ON snapshot (layer) WHERE layer IS NOT NULL;

-- Who remembers chains of layers finds here that they hold no longer, whoever changed them. Random, as what is rolled
-- back must not come again. (A snapshot that is committed or removed changes none: NULL is not <> anything.)
CREATE TRIGGER chain_changed AFTER UPDATE OF layer ON snapshot WHEN old.layer <> new.layer
BEGIN
    INSERT OR REPLACE INTO setting VALUES ('{CHAINS_CHANGED}', hex(randomblob(16)));
END;
"""

SCHEMA = (
    """
-- What holds for the whole root: 'driver', 'pool' (json), 'boot_id' of the last full reconciliation, 'chains_changed'
-- (see its trigger), and running totals, 'total:NAME' (hpmapper.meta.totals).
CREATE TABLE setting (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;

-- One immutable layer's storage. Several snapshots may use one: the same layer on different parents.
CREATE TABLE layer (
    id         INTEGER PRIMARY KEY,       -- the id of the snapshot that brought it; names its directory
    diff_id    TEXT NOT NULL,             -- sha256 of its uncompressed tar; '' for one that never was a tar
    bound      INTEGER NOT NULL,          -- 1: holds above its parent chain only (the tar left something to it)
    digest     BLOB,                      -- of the driver's own form of it (hpmapper: the map); NULL if it has none
    tar_size   INTEGER NOT NULL,          -- of the uncompressed tar
    size       INTEGER NOT NULL,          -- bytes that it newly occupied when it came; -1: not counted yet
    inodes     INTEGER NOT NULL,          -- members of the tar
    damaged    INTEGER NOT NULL,          -- 1: fsck could not repair it; the next pull of its image brings a new one
    sealed     INTEGER NOT NULL DEFAULT 0 -- 1: it is what was written to the snapshot of that id, as it lies there
);
CREATE INDEX layer_diff_id ON layer (diff_id);

-- A name in the forest of snapshots (containerd's terms). A committed one has a layer, an active one or a view storage
-- of its own under its id. Those whose key is a chain ID ("sha256:…") belong to the images and are collected with
-- them; all others belong to whoever named them. A front end's begin with its own name ("containerd:…").
CREATE TABLE snapshot (
    id      INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used twice: directories of old ones may linger
    key     TEXT NOT NULL UNIQUE,
    kind    TEXT NOT NULL CHECK (kind IN ('active', 'view', 'committed')),
    state   TEXT NOT NULL CHECK (state IN ('creating', 'ready', 'removing')),
    owner   TEXT,                         -- while not ready: the workspace of the process at work on it
    parent  INTEGER REFERENCES snapshot (id),
    layer   INTEGER REFERENCES layer (id),
    created INTEGER NOT NULL,
    updated INTEGER NOT NULL,
    CHECK ((kind = 'committed' AND state = 'ready') = (layer IS NOT NULL)),
    CHECK ((state = 'creating') <= (owner IS NOT NULL))
);
CREATE INDEX snapshot_parent ON snapshot (parent);
CREATE INDEX snapshot_unfinished ON snapshot (state) WHERE state <> 'ready';

-- Keeps the layers of an image that is being brought in until the image itself is recorded.
CREATE TABLE lease (
    holder   TEXT NOT NULL,               -- "TOKEN/N": a workspace, which dies with its process, and a number
    snapshot INTEGER NOT NULL REFERENCES snapshot (id) ON DELETE CASCADE,
    PRIMARY KEY (holder, snapshot)
) WITHOUT ROWID;
CREATE INDEX lease_snapshot ON lease (snapshot);

CREATE TABLE label (
    snapshot INTEGER NOT NULL REFERENCES snapshot (id) ON DELETE CASCADE,
    name     TEXT NOT NULL,
    value    TEXT NOT NULL,
    PRIMARY KEY (snapshot, name)
) WITHOUT ROWID;

-- Every object in the store, whole and on stable storage.
CREATE TABLE object (
    id     INTEGER PRIMARY KEY,
    digest BLOB NOT NULL UNIQUE,
    size   INTEGER NOT NULL
);

-- Which layers need which objects: what keeps an object alive.
CREATE TABLE layer_object (
    layer  INTEGER NOT NULL REFERENCES layer (id) ON DELETE CASCADE,
    object INTEGER NOT NULL REFERENCES object (id),
    PRIMARY KEY (layer, object)
) WITHOUT ROWID;
CREATE INDEX layer_object_object ON layer_object (object);

-- An image: its config, byte for byte, and the snapshot of its top layer (NULL: it has no layers).
CREATE TABLE image (
    id      TEXT PRIMARY KEY,             -- sha256 of the config, as in Docker
    config  BLOB NOT NULL,
    top     INTEGER REFERENCES snapshot (id),
    size    INTEGER NOT NULL,             -- of its layers' tars
    created INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE tag (
    name  TEXT PRIMARY KEY,               -- "docker.io/library/debian:12"
    image TEXT NOT NULL REFERENCES image (id)
) WITHOUT ROWID;

CREATE TABLE container (
    name     TEXT PRIMARY KEY,
    snapshot INTEGER NOT NULL UNIQUE REFERENCES snapshot (id),
    image    TEXT NOT NULL REFERENCES image (id),
    created  INTEGER NOT NULL
) WITHOUT ROWID;

"""
    + _FRONT_ENDS
    + _SIZE_LIMIT
    + _CHAIN_PROFILES
    + _CHAINS
)

MIGRATIONS: dict[int, str] = {
    1: "ALTER TABLE layer ADD COLUMN sealed INTEGER NOT NULL DEFAULT 0;\n" + _FRONT_ENDS,
    2: _SIZE_LIMIT,
    3: _START_PROFILES,
    4: _CHAIN_PROFILES
    + """
INSERT OR IGNORE INTO chain_profile SELECT snapshot.key, profile, recorded
FROM start_profile JOIN image ON image.id = start_profile.image JOIN snapshot ON snapshot.id = image.top
WHERE snapshot.key LIKE 'sha256:%';
DROP TABLE start_profile;
""",
    5: "DROP INDEX snapshot_layer;\n" + _CHAINS,
}
"""From version N to N + 1."""
