-- The index of a store. `PRAGMA user_version` is its version; queries.py upgrades older ones.
--
-- The repositories that rows of other tables refer to. `used` is the last use of any blob at the time when
-- links or tags were last written, and orders evictions from the index. `manifests` counts the links to
-- stored manifests; the triggers below keep it.
CREATE TABLE IF NOT EXISTS repositories (
    id        INTEGER PRIMARY KEY,
    upstream  TEXT NOT NULL,
    name      TEXT NOT NULL,
    used      REAL NOT NULL DEFAULT 0,
    manifests INTEGER NOT NULL DEFAULT 0,
    UNIQUE (upstream, name)
) STRICT;
CREATE INDEX IF NOT EXISTS repositories_by_use ON repositories (used);

-- The repositories that have a stored manifest, by the names that clients pull by: those of docker.io are
-- without the upstream. Lists and searches read nothing else, so it has a table of its own, which the
-- triggers keep.
CREATE TABLE IF NOT EXISTS catalog (
    name     TEXT NOT NULL,
    upstream TEXT NOT NULL,
    PRIMARY KEY (name, upstream)
) STRICT, WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS repository_listed AFTER UPDATE OF manifests ON repositories
    WHEN old.manifests = 0 AND new.manifests > 0
BEGIN
    INSERT OR IGNORE INTO catalog (name, upstream) VALUES (
        CASE new.upstream WHEN 'docker.io' THEN new.name ELSE new.upstream || '/' || new.name END,
        new.upstream);
END;
CREATE TRIGGER IF NOT EXISTS repository_unlisted AFTER UPDATE OF manifests ON repositories
    WHEN old.manifests > 0 AND new.manifests = 0
BEGIN
    DELETE FROM catalog WHERE upstream = old.upstream AND name =
        CASE old.upstream WHEN 'docker.io' THEN old.name ELSE old.upstream || '/' || old.name END;
END;

-- Committed blobs. A manifest is a blob with a media type; `subject` is the digest it refers to.
-- `used` is the time of the last use in Unix seconds, unique, and orders evictions. Blobs of pinned
-- images are `pinned`; `blobs_by_use`, which evictions read, leaves them out.
CREATE TABLE IF NOT EXISTS blobs (
    digest     TEXT PRIMARY KEY,
    size       INTEGER NOT NULL,
    media_type TEXT,
    subject    TEXT,
    used       REAL NOT NULL,
    pinned     INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS blobs_by_use ON blobs (used, size, pinned) WHERE NOT pinned;
CREATE INDEX IF NOT EXISTS blobs_pinned ON blobs (used, size, pinned) WHERE pinned;
CREATE INDEX IF NOT EXISTS blobs_manifests ON blobs (used, pinned) WHERE media_type IS NOT NULL;
CREATE INDEX IF NOT EXISTS blobs_by_subject ON blobs (subject) WHERE subject IS NOT NULL;

-- The stored blobs that each repository may be served (proxy/cache/access.py). `media_type` is what
-- upstream calls the manifest there, if that is not the type in `blobs`.
CREATE TABLE IF NOT EXISTS links (
    repository INTEGER NOT NULL,
    digest     TEXT NOT NULL,
    media_type TEXT,
    PRIMARY KEY (repository, digest)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS links_by_digest ON links (digest);

CREATE TRIGGER IF NOT EXISTS manifest_linked AFTER INSERT ON links
    WHEN EXISTS (SELECT 1 FROM blobs WHERE digest = new.digest AND media_type IS NOT NULL)
BEGIN
    UPDATE repositories SET manifests = manifests + 1 WHERE id = new.repository;
END;
CREATE TRIGGER IF NOT EXISTS manifest_unlinked AFTER DELETE ON links
    WHEN EXISTS (SELECT 1 FROM blobs WHERE digest = old.digest AND media_type IS NOT NULL)
BEGIN
    UPDATE repositories SET manifests = manifests - 1 WHERE id = old.repository;
END;
CREATE TRIGGER IF NOT EXISTS manifest_added AFTER INSERT ON blobs WHEN new.media_type IS NOT NULL
BEGIN
    UPDATE repositories SET manifests = manifests + 1
        WHERE id IN (SELECT repository FROM links WHERE digest = new.digest);
END;
CREATE TRIGGER IF NOT EXISTS manifest_removed AFTER DELETE ON blobs WHEN old.media_type IS NOT NULL
BEGIN
    UPDATE repositories SET manifests = manifests - 1
        WHERE id IN (SELECT repository FROM links WHERE digest = old.digest);
END;
CREATE TRIGGER IF NOT EXISTS manifest_changed AFTER UPDATE OF media_type ON blobs
    WHEN (new.media_type IS NULL) <> (old.media_type IS NULL)
BEGIN
    UPDATE repositories SET manifests = manifests + iif(new.media_type IS NULL, -1, 1)
        WHERE id IN (SELECT repository FROM links WHERE digest = new.digest);
END;

-- The upstreams that have sent all bytes of a stored blob, under any repository.
CREATE TABLE IF NOT EXISTS senders (
    digest   TEXT NOT NULL,
    upstream TEXT NOT NULL,
    PRIMARY KEY (digest, upstream)
) STRICT, WITHOUT ROWID;

-- The digests that each stored manifest names. `size` is -1 if the manifest states none. Registries do
-- not hold foreign layers.
CREATE TABLE IF NOT EXISTS edges (
    parent     TEXT NOT NULL,
    child      TEXT NOT NULL,
    size       INTEGER NOT NULL,
    is_foreign INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (parent, child)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS edges_by_child ON edges (child);

-- Tags. `subject` is the manifest that the content of a tag for referrers refers to (proxy/oci/referrers.py).
CREATE TABLE IF NOT EXISTS tags (
    repository INTEGER NOT NULL,
    tag        TEXT NOT NULL,
    digest     TEXT NOT NULL,
    checked    REAL NOT NULL,
    subject    TEXT,
    PRIMARY KEY (repository, tag)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS tags_by_digest ON tags (digest);
CREATE INDEX IF NOT EXISTS tags_by_subject ON tags (subject) WHERE subject IS NOT NULL;

-- What upstream had of referrers of a manifest when a preload asked: a `ReferrerRecord` as JSON.
CREATE TABLE IF NOT EXISTS referrer_records (
    subject    TEXT NOT NULL,
    repository INTEGER NOT NULL,
    record     TEXT NOT NULL,
    PRIMARY KEY (subject, repository)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS referrer_records_by_repository ON referrer_records (repository);

-- What tags meant: each digest of a tag with the first and the last time that the cache saw it there.
-- `tag` is empty for content that was asked for by digest. `pushed` is when Docker Hub says that it was
-- pushed; `ripe` is set once it has reached the minimum age of a policy, and never cleared. `source` is the
-- bundle that said it, `import` for one that did not say it, and empty for what this cache saw itself.
CREATE TABLE IF NOT EXISTS tag_history (
    repository INTEGER NOT NULL,
    tag        TEXT NOT NULL,
    digest     TEXT NOT NULL,
    first_seen REAL NOT NULL,
    last_seen  REAL NOT NULL,
    pushed     REAL,
    ripe       INTEGER NOT NULL DEFAULT 0,
    source     TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (repository, tag, digest)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS tag_history_by_digest ON tag_history (repository, digest);

-- What Docker Hub, or a bundle, said about repositories, and when.
CREATE TABLE IF NOT EXISTS facts (
    repository  INTEGER PRIMARY KEY,
    badge       TEXT NOT NULL,
    publisher   TEXT NOT NULL,
    description TEXT NOT NULL,
    stars       INTEGER NOT NULL,
    pulls       INTEGER NOT NULL,
    archived    INTEGER NOT NULL,
    asked       REAL NOT NULL,
    source      TEXT NOT NULL
) STRICT;

-- Images that policies allow until a time, whatever their rules say.
CREATE TABLE IF NOT EXISTS policy_exceptions (
    repository INTEGER NOT NULL,
    digest     TEXT NOT NULL,
    made       REAL NOT NULL,
    until      REAL NOT NULL,
    reason     TEXT NOT NULL,
    PRIMARY KEY (repository, digest)
) STRICT, WITHOUT ROWID;

-- The last decisions of policies that were not a plain hit.
CREATE TABLE IF NOT EXISTS policy_decisions (
    id       INTEGER PRIMARY KEY,
    at       REAL NOT NULL,
    policy   INTEGER NOT NULL,
    decision TEXT NOT NULL,
    image    TEXT NOT NULL,
    digest   TEXT NOT NULL,
    reason   TEXT NOT NULL,
    request  TEXT NOT NULL
) STRICT;

-- Totals of traffic by local day (proxy/traffic.py). `scope` says what `name` is: an upstream, a repository,
-- an image or a client. An empty name has the totals of the names that are not kept.
CREATE TABLE IF NOT EXISTS traffic (
    scope     TEXT NOT NULL,
    day       TEXT NOT NULL,
    name      TEXT NOT NULL,
    hits      INTEGER NOT NULL,
    partials  INTEGER NOT NULL,
    misses    INTEGER NOT NULL,
    requests  INTEGER NOT NULL,
    sent      INTEGER NOT NULL,
    received  INTEGER NOT NULL,
    preloaded INTEGER NOT NULL,
    avoided   INTEGER NOT NULL,
    PRIMARY KEY (scope, day, name)
) STRICT, WITHOUT ROWID;

-- When clients last pulled an image, by its full name. Preloads, exports and imports are no pulls.
CREATE TABLE IF NOT EXISTS pulls (
    name TEXT PRIMARY KEY,
    at   REAL NOT NULL
) STRICT, WITHOUT ROWID;

-- The audit trail: acts, and evictions (action `evict`). `images` is JSON: bytes by name.
CREATE TABLE IF NOT EXISTS trail (
    id      INTEGER PRIMARY KEY,
    at      REAL NOT NULL,
    action  TEXT NOT NULL,
    actor   TEXT NOT NULL,
    images  TEXT NOT NULL,
    outcome TEXT NOT NULL,
    detail  TEXT NOT NULL
) STRICT;

-- What was read of stored layers and of stored manifests of images for one platform: JSON, compressed by
-- zstd, which proxy/contents makes. `version` is that of the reader, 0 while rows are still being added;
-- `size` is what the rows take.
CREATE TABLE IF NOT EXISTS layer_contents (
    digest   TEXT PRIMARY KEY,
    version  INTEGER NOT NULL,
    read     REAL NOT NULL,
    size     INTEGER NOT NULL,
    document BLOB NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS layer_contents_by_age ON layer_contents (read, size);
CREATE TABLE IF NOT EXISTS image_contents (
    id       INTEGER PRIMARY KEY,
    digest   TEXT NOT NULL UNIQUE,
    platform TEXT NOT NULL,
    version  INTEGER NOT NULL,
    read     REAL NOT NULL,
    size     INTEGER NOT NULL,
    document BLOB NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS image_contents_by_age ON image_contents (read, size);

-- The packages that questions are about, and the images of `image_contents` that have them.
CREATE TABLE IF NOT EXISTS packages (
    id             INTEGER PRIMARY KEY,
    name           TEXT NOT NULL,
    kind           TEXT NOT NULL,
    version        TEXT NOT NULL,
    source         TEXT NOT NULL,
    source_version TEXT NOT NULL,
    UNIQUE (name, kind, version, source, source_version)
) STRICT;
CREATE INDEX IF NOT EXISTS packages_by_source ON packages (source) WHERE source <> '';
CREATE TABLE IF NOT EXISTS image_packages (
    package INTEGER NOT NULL,
    image   INTEGER NOT NULL,
    PRIMARY KEY (package, image)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS image_packages_by_image ON image_packages (image);

-- What the scanner of the operator found in manifests of images: JSON, compressed by zstd.
CREATE TABLE IF NOT EXISTS scan_reports (
    digest   TEXT PRIMARY KEY,
    made     REAL NOT NULL,
    size     INTEGER NOT NULL,
    document BLOB NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS scan_reports_by_age ON scan_reports (made, size);

-- Pinned images, by tag or digest. `digest` is the tag's last known one; null before the first pull.
CREATE TABLE IF NOT EXISTS pins (
    repository INTEGER NOT NULL,
    reference  TEXT NOT NULL,
    digest     TEXT,
    PRIMARY KEY (repository, reference)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS pins_by_digest ON pins (digest);

-- Images: tags, pins, and manifests that were pulled by digest only. Manifests that belong to an index
-- or to a subject in the same repository are not images, nor are the tags for referrers of such a subject.
CREATE VIEW IF NOT EXISTS tagged AS
    SELECT repository, tag AS reference, digest FROM tags t
    WHERE t.subject IS NULL OR t.subject = t.digest OR NOT EXISTS (
        SELECT 1 FROM links s JOIN blobs USING (digest)
        WHERE s.digest = t.subject AND s.repository = t.repository);
CREATE VIEW IF NOT EXISTS roots AS
    SELECT repository, reference, digest FROM tagged
    UNION ALL
    SELECT repository, reference, digest FROM pins WHERE digest IS NOT NULL
    UNION ALL
    SELECT repository, digest AS reference, digest FROM untagged;
CREATE VIEW IF NOT EXISTS untagged AS
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
