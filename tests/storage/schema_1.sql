-- The index of a store. `PRAGMA user_version` holds its version (index.py).
CREATE TABLE repositories (
    id       INTEGER PRIMARY KEY,
    upstream TEXT NOT NULL,
    name     TEXT NOT NULL,
    UNIQUE (upstream, name)
) STRICT;

-- Committed blobs. A manifest is a blob with a media type; `subject` is what it refers to.
-- `used` orders evictions: Unix seconds, but never going back.
CREATE TABLE blobs (
    digest     TEXT PRIMARY KEY,
    size       INTEGER NOT NULL,
    media_type TEXT,
    subject    TEXT,
    used       REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX blobs_by_use ON blobs (used, size);
CREATE INDEX blobs_by_subject ON blobs (subject) WHERE subject IS NOT NULL;

-- Repositories that were seen to hold a digest, be it in the store or not.
CREATE TABLE links (
    repository INTEGER NOT NULL,
    digest     TEXT NOT NULL,
    PRIMARY KEY (repository, digest)
) STRICT, WITHOUT ROWID;
CREATE INDEX links_by_digest ON links (digest);

-- What the manifests in the store name.
CREATE TABLE edges (
    parent TEXT NOT NULL,
    child  TEXT NOT NULL,
    size   INTEGER NOT NULL,
    PRIMARY KEY (parent, child)
) STRICT, WITHOUT ROWID;
CREATE INDEX edges_by_child ON edges (child);

CREATE TABLE tags (
    repository INTEGER NOT NULL,
    tag        TEXT NOT NULL,
    digest     TEXT NOT NULL,
    checked    REAL NOT NULL,
    PRIMARY KEY (repository, tag)
) STRICT, WITHOUT ROWID;
CREATE INDEX tags_by_digest ON tags (digest);
