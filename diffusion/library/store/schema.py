"""Tables of the index."""

VERSION = 1

TABLES = """
CREATE TABLE adapter (
    id INTEGER PRIMARY KEY,
    location BLOB NOT NULL UNIQUE,
    name TEXT NOT NULL UNIQUE,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    ctime_ns INTEGER NOT NULL,
    config TEXT NOT NULL,
    reader INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    digest TEXT NOT NULL,
    family TEXT NOT NULL,
    dialect TEXT NOT NULL,
    rank_min INTEGER NOT NULL,
    rank_mean REAL NOT NULL,
    rank_max INTEGER NOT NULL,
    norm REAL,
    modules BLOB NOT NULL,
    norms BLOB NOT NULL,
    title TEXT NOT NULL,
    triggers TEXT NOT NULL,
    tags TEXT NOT NULL,
    license TEXT NOT NULL,
    text TEXT NOT NULL,
    flags TEXT NOT NULL,
    searchable INTEGER NOT NULL,
    problem TEXT NOT NULL,
    error TEXT NOT NULL
);
CREATE INDEX adapter_sha256 ON adapter (sha256);
CREATE INDEX adapter_digest ON adapter (digest);
CREATE TABLE tag (
    tag TEXT NOT NULL,
    adapter INTEGER NOT NULL,
    PRIMARY KEY (tag, adapter)
) WITHOUT ROWID;
CREATE INDEX tag_adapter ON tag (adapter);
CREATE TABLE module (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE matrix (fingerprint TEXT PRIMARY KEY, dim INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE encoding (
    fingerprint TEXT NOT NULL,
    digest TEXT NOT NULL,
    row INTEGER,
    refusal TEXT NOT NULL,
    PRIMARY KEY (fingerprint, digest),
    UNIQUE (fingerprint, row)
) WITHOUT ROWID;
CREATE VIRTUAL TABLE words USING fts5 (
    title, triggers, tags, text, name, tokenize = 'porter unicode61 remove_diacritics 2'
);
"""
"""``modules`` and ``norms`` hold 32-bit ids and float64 numbers, in the order of the ids. Contents,
not files, have encodings; one without a row is a refusal."""

COLUMNS = (
    "location", "name", "size", "mtime_ns", "ctime_ns", "config", "reader", "sha256", "digest",
    "family", "dialect", "rank_min", "rank_mean", "rank_max", "norm", "modules", "norms", "title",
    "triggers", "tags", "license", "text", "flags", "searchable", "problem", "error",
)  # fmt: skip
"""Of an adapter, without its id."""

WORD_COLUMNS = ("title", "triggers", "tags", "text", "name")
WORD_WEIGHTS = (4.0, 4.0, 2.0, 1.0, 2.0)
"""Of the columns of ``words`` in BM25."""
