-- The index of a store in version 2, which 0.1.0 wrote.
CREATE TABLE repositories (
    id       INTEGER PRIMARY KEY,
    upstream TEXT NOT NULL,
    name     TEXT NOT NULL,
    UNIQUE (upstream, name)
) STRICT;

-- Committed blobs. A manifest is a blob with a media type; `subject` is the digest it refers to.
-- `used` is the time of the last use in Unix seconds, unique, and orders evictions. Blobs of pinned
-- images are `pinned`; `blobs_by_use`, which evictions read, leaves them out.
CREATE TABLE blobs (
    digest     TEXT PRIMARY KEY,
    size       INTEGER NOT NULL,
    media_type TEXT,
    subject    TEXT,
    used       REAL NOT NULL,
    pinned     INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;
CREATE INDEX blobs_by_use ON blobs (used, size, pinned) WHERE NOT pinned;
CREATE INDEX blobs_pinned ON blobs (used, size, pinned) WHERE pinned;
CREATE INDEX blobs_manifests ON blobs (digest) WHERE media_type IS NOT NULL;
CREATE INDEX blobs_by_subject ON blobs (subject) WHERE subject IS NOT NULL;

-- The digests that each repository is known to have, stored here or not.
CREATE TABLE links (
    repository INTEGER NOT NULL,
    digest     TEXT NOT NULL,
    PRIMARY KEY (repository, digest)
) STRICT, WITHOUT ROWID;
CREATE INDEX links_by_digest ON links (digest);

-- The digests that each stored manifest names.
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

-- Pinned images, by tag or digest. `digest` is the tag's last known one; null before the first pull.
CREATE TABLE pins (
    repository INTEGER NOT NULL,
    reference  TEXT NOT NULL,
    digest     TEXT,
    PRIMARY KEY (repository, reference)
) STRICT, WITHOUT ROWID;
CREATE INDEX pins_by_digest ON pins (digest);

-- Images: tags, pins, and manifests that were pulled by digest only. Manifests that belong to an index
-- or to a subject in the same repository are not images.
CREATE VIEW roots AS
    SELECT repository, tag AS reference, digest FROM tags
    UNION ALL
    SELECT repository, reference, digest FROM pins WHERE digest IS NOT NULL
    UNION ALL
    SELECT repository, digest AS reference, digest FROM untagged;
CREATE VIEW untagged AS
    SELECT l.repository, l.digest FROM blobs b CROSS JOIN links l ON l.digest = b.digest
    WHERE b.media_type IS NOT NULL
    AND NOT EXISTS (
        SELECT 1 FROM tags t WHERE t.digest = l.digest AND t.repository = l.repository)
    AND NOT EXISTS (
        SELECT 1 FROM pins p WHERE p.digest = l.digest AND p.repository = l.repository)
    AND NOT EXISTS (
        SELECT 1 FROM edges e JOIN links p ON p.digest = e.parent
        WHERE e.child = l.digest AND p.repository = l.repository)
    AND NOT EXISTS (
        SELECT 1 FROM links s JOIN blobs USING (digest)
        WHERE s.digest = b.subject AND s.repository = l.repository);
