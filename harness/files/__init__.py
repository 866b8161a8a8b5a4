"""Files: atomic writes, hashes, downloads; open to domain packages, too."""

from harness.files.atomic import (
    Partial,
    finite,
    refuse_strangers,
    remove,
    replacing,
    require_apart,
    require_free,
    resuming,
    write_bytes,
    write_json,
    write_text,
)
from harness.files.digest import Content, Data, content_digest, sha256, short_digest

__all__ = [
    "Content",
    "Data",
    "Partial",
    "content_digest",
    "finite",
    "refuse_strangers",
    "remove",
    "replacing",
    "require_apart",
    "require_free",
    "resuming",
    "sha256",
    "short_digest",
    "write_bytes",
    "write_json",
    "write_text",
]
