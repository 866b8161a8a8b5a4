import gzip
import hashlib
import http.server
import io
import json
import tarfile
import threading
import zipfile

import numpy as np
import pytest

from core_gates.errors import GatesError
from harness.files.digest import (
    RemoteFile,
    figshare_manifest,
    parse_manifest,
    read_manifest,
    total_bytes,
)
from harness.files.download import download, download_and_unpack, partial_path, unpack

CONTENT = np.random.default_rng(0).integers(0, 256, 3_000_000, np.uint8).tobytes()


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files`` and misbehaves as told; every request is recorded."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"/a.bin": CONTENT}
        self.requests = []
        self.ranges = True
        self.wrong_range = False
        self.length = True
        self.break_after = []  # bytes after which the connection is cut, by request
        self.status = []  # instead of an answer, by request
        self.corrupt = []  # position of a byte to flip, by request; None for a correct answer
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        pass  # a client that was killed


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        start = self.headers.get("Range")
        server.requests.append((self.path, start))
        if server.status and (status := server.status.pop(0)):
            self.send_error(status)
            return
        content = server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        if server.corrupt and (position := server.corrupt.pop(0)) is not None:
            content = content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
        first = int(start.removeprefix("bytes=").rstrip("-")) if start and server.ranges else 0
        if first >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if first else 200)
        if first:
            told = first + 1 if server.wrong_range else first
            end = f"{told}-{len(content) - 1}/{len(content)}"
            self.send_header("Content-Range", f"bytes {end}")
        body = content[first:]
        if server.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = server.break_after.pop(0) if server.break_after else None
        self.wfile.write(body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.connection.close()

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def remote(server, algorithm="md5", **changes):
    digest = hashlib.new(algorithm, CONTENT).hexdigest()
    file = RemoteFile("a.bin", f"{server.url}/a.bin", len(CONTENT), algorithm, digest)
    return file._replace(**changes)


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_a_whole_file_arrives_verified(server, tmp_path, algorithm):
    steps = []
    path = download(
        remote(server, algorithm), tmp_path / "new", progress=lambda *told: steps.append(told)
    )
    assert (path.read_bytes(), [p.name for p in path.parent.iterdir()]) == (CONTENT, ["a.bin"])
    assert steps[-1] == ("a.bin", len(CONTENT), len(CONTENT))
    assert [there for _, there, _ in steps] == sorted({there for _, there, _ in steps})
    download(remote(server, algorithm), tmp_path / "new")
    assert len(server.requests) == 1  # an existing file is not fetched again


class KilledError(Exception):
    pass


def kill_at(least):
    def progress(name, there, size):
        if there >= least:
            raise KilledError

    return progress


def test_a_killed_download_goes_on_where_it_stopped(server, tmp_path):
    with pytest.raises(KilledError):
        download(remote(server), tmp_path, progress=kill_at(1_000_000))
    partial = partial_path(tmp_path, remote(server))
    have = partial.stat().st_size
    assert 1_000_000 <= have < len(CONTENT)
    assert not (tmp_path / "a.bin").exists()
    assert download(remote(server), tmp_path).read_bytes() == CONTENT
    assert server.requests == [("/a.bin", None), ("/a.bin", f"bytes={have}-")]
    assert not partial.exists()


def test_a_broken_connection_is_resumed_at_once(server, tmp_path):
    server.break_after = [900_000, 700_000]
    assert download(remote(server), tmp_path, pause=0).read_bytes() == CONTENT
    starts = [int(start[6:-1]) for _, start in server.requests[1:]]
    assert starts == [900_000, 1_600_000]


def test_a_server_without_ranges_sends_the_file_anew(server, tmp_path):
    server.ranges = False
    server.break_after = [900_000]
    assert download(remote(server), tmp_path, pause=0).read_bytes() == CONTENT
    assert server.requests[1] == ("/a.bin", "bytes=900000-")


def test_a_server_that_answers_another_range_is_not_believed(server, tmp_path):
    server.wrong_range = True
    server.break_after = [900_000]
    assert download(remote(server), tmp_path, pause=0).read_bytes() == CONTENT
    assert [start for _, start in server.requests] == [None, "bytes=900000-", None]


def test_a_corrupted_byte_is_found_and_the_file_fetched_anew(server, tmp_path):
    server.corrupt = [2_000_000]
    assert download(remote(server), tmp_path, pause=0).read_bytes() == CONTENT
    assert server.requests == [("/a.bin", None), ("/a.bin", None)]


def test_a_corrupted_byte_before_a_kill_is_found_after_it(server, tmp_path):
    server.corrupt = [10]
    with pytest.raises(KilledError):
        download(remote(server), tmp_path, progress=kill_at(1_000_000))
    assert download(remote(server), tmp_path, pause=0).read_bytes() == CONTENT
    assert [start is None for _, start in server.requests] == [True, False, True]


def test_a_wrong_checksum_twice_is_an_error_and_leaves_nothing(server, tmp_path):
    with pytest.raises(GatesError, match=r"expected 0{32}, twice; its source or the manifest"):
        download(remote(server, digest="0" * 32), tmp_path, pause=0)
    assert list(tmp_path.iterdir()) == []


def test_a_busy_server_is_asked_again_but_not_for_ever(server, tmp_path):
    server.status = [503, 503, 429]
    assert download(remote(server), tmp_path, pause=0).read_bytes() == CONTENT
    (tmp_path / "a.bin").unlink()
    server.status = [503] * 9
    with pytest.raises(GatesError, match=r"stopped at 0 of 3000000 bytes \(the server answers 503"):
        download(remote(server), tmp_path, pause=0, retries=2)
    assert len(server.requests) == 4 + 3


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_refusal_is_not_repeated(server, tmp_path, status):
    server.status = [status] * 9
    with pytest.raises(GatesError, match=f"answers {status} .*check the manifest and access"):
        download(remote(server), tmp_path, pause=0)
    assert len(server.requests) == 1


def test_no_server_is_one_line(tmp_path):
    file = RemoteFile("a.bin", "http://127.0.0.1:9/a.bin", 5, "md5", "0" * 32)
    with pytest.raises(GatesError, match="run the same command later to continue") as caught:
        download(file, tmp_path, pause=0, retries=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [True, False])
def test_an_unknown_size_is_no_obstacle(server, tmp_path, length):
    server.length = length
    assert download(remote(server, size=-1), tmp_path, pause=0).read_bytes() == CONTENT
    (tmp_path / "a.bin").rename(partial_path(tmp_path, remote(server)))  # killed before the rename
    assert download(remote(server, size=-1), tmp_path, pause=0).read_bytes() == CONTENT


def test_a_file_that_is_longer_than_announced_is_refused(server, tmp_path):
    with pytest.raises(GatesError, match="sends more than 1000 bytes"):
        download(remote(server, size=1000), tmp_path, pause=0)


def test_a_stale_partial_that_is_too_long_is_dropped(server, tmp_path):
    partial_path(tmp_path, remote(server)).write_bytes(CONTENT + b"more")
    assert download(remote(server), tmp_path, pause=0).read_bytes() == CONTENT


def test_a_foreign_file_in_the_place_is_not_overwritten(server, tmp_path):
    (tmp_path / "a.bin").write_bytes(b"mine")
    with pytest.raises(GatesError, match=r"a\.bin has 4 bytes, expected 3000000; remove it"):
        download(remote(server), tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == b"mine"


def test_several_files_need_room(server, tmp_path, monkeypatch):
    server.files["/b.bin"] = CONTENT
    files = [remote(server), remote(server, name="b.bin", url=f"{server.url}/b.bin")]
    assert total_bytes(files) == 2 * len(CONTENT)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("U", (), {"free": 5_999_999})())
        with pytest.raises(GatesError, match="choose another folder or fewer files"):
            download_and_unpack(files, tmp_path)
        download(files[0], tmp_path)
        download_and_unpack(files, tmp_path)  # one is there already
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "b.bin"]


def test_figshare_lists_in_pages(refuses, server):
    entries = [
        {
            "id": k,
            "name": f"{k:03d}.tar.gz",
            "size": 10,
            "computed_md5": f"{k:032x}",
            "download_url": f"https://ndownloader.figshare.com/files/{k}",
        }
        for k in range(130)
    ]
    for page, part in ((1, entries[:100]), (2, entries[100:])):
        path = f"/articles/22202866/files?page={page}&page_size=100"
        server.files[path] = json.dumps(part).encode()
    files = figshare_manifest(22202866, api=server.url)
    assert [file.name for file in files] == [entry["name"] for entry in entries]
    assert files[7] == RemoteFile("007.tar.gz", entries[7]["download_url"], 10, "md5", f"{7:032x}")
    refuses(GatesError, ("cannot be read", lambda: figshare_manifest(5, api=server.url)))


GOOD = {"name": "a.tar.gz", "url": "https://x/a", "size": 3, "sha256": "AB" * 32}


def test_our_own_manifest(tmp_path):
    (tmp_path / "m.json").write_text(json.dumps([GOOD]))
    expected = RemoteFile("a.tar.gz", "https://x/a", 3, "sha256", "ab" * 32)
    assert read_manifest(tmp_path / "m.json") == [expected]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "../a"}, "'../a' is not a plain file name"),
        ({"name": "/etc/passwd"}, "is not a plain file name"),
        ({"name": ".hidden"}, "is not a plain file name"),
        ({"name": ""}, "is not a plain file name"),
        ({"url": "file:///etc/passwd"}, "is not an http or https address"),
        ({"url": ""}, "is not an http or https address"),
        ({"sha256": ""}, "has no md5 or sha256"),
        ({"sha256": "abc"}, "has no md5 or sha256"),
    ],
)
def test_unsafe_entries_are_refused(refuses, changes, words):
    refuses(GatesError, (words, lambda: parse_manifest([GOOD | changes], "m.json")))


def test_what_is_no_manifest_is_refused(tmp_path, refuses):
    (tmp_path / "m.json").write_text("{")
    refuses(
        GatesError,
        (r"m\.json cannot be read as JSON", lambda: read_manifest(tmp_path / "m.json")),
        ("holds no list of files", lambda: parse_manifest({"files": []}, "m.json")),
        (r"lists a\.tar\.gz twice", lambda: parse_manifest([GOOD, GOOD], "m.json")),
    )


def packed(files, kind):
    """An archive with these files, as bytes."""
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            for name, content in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def served(server, files):
    """Serve files and return the entries of a manifest."""
    server.files = {f"/{name}": content for name, content in files.items()}
    return [
        RemoteFile(name, f"{server.url}/{name}", len(content), "md5",
                   hashlib.md5(content, usedforsecurity=False).hexdigest())
        for name, content in files.items()
    ]  # fmt: skip


def test_archives_are_unpacked_and_removed_and_a_stopped_download_goes_on(server, tmp_path):
    files = served(server, {
        "v_frames.tar.gz": packed({"v_frames/v_1.jpg": CONTENT}, "tar"),
        "info.csv": b"a,b",
        "w_frames.zip": packed({"w_frames/w_1.jpg": b"w"}, "zip"),
    })  # fmt: skip
    told = []
    server.status = [0, 0, 404]
    with pytest.raises(GatesError, match="answers 404"):
        download_and_unpack(files, tmp_path / "colon", notify=told.append)
    assert download_and_unpack(files, tmp_path / "colon", notify=told.append) == tmp_path / "colon"
    assert (tmp_path / "colon/v_frames/v_1.jpg").read_bytes() == CONTENT
    assert (tmp_path / "colon/w_frames/w_1.jpg").read_bytes() == b"w"
    shown = sorted(p.name for p in (tmp_path / "colon").iterdir() if p.name[0] != ".")
    assert shown == ["info.csv", "v_frames", "w_frames"]
    asked = [path for path, _ in server.requests]
    assert asked == ["/v_frames.tar.gz", "/info.csv", "/w_frames.zip", "/w_frames.zip"]
    assert [line.partition(",")[0] for line in told] == [
        "1 of 3: v_frames.tar.gz", "2 of 3: info.csv", "3 of 3: w_frames.zip",
        "3 of 3: w_frames.zip",
    ]  # fmt: skip
    download_and_unpack(files, tmp_path / "colon")
    assert len(server.requests) == 4


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_never_leaves_its_folder(kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(packed({"../evil.txt": b"x"}, kind))
    with pytest.raises(GatesError, match=r"cannot be unpacked: .*evil\.txt.*outside"):
        unpack(path, tmp_path / "folder")
    assert not (tmp_path / "evil.txt").exists()
    path.write_bytes(b"no archive")
    with pytest.raises(GatesError, match=r"cannot be unpacked: .*remove it"):
        unpack(path, tmp_path / "folder")


def linked(name, target, kind=tarfile.SYMTYPE):
    """An entry that is a link, or another special file."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


@pytest.mark.parametrize(
    "entries",
    [
        [linked("out", "..")],
        [linked("out", "/etc/passwd")],
        [linked("out", "../secret.txt", tarfile.LNKTYPE)],
        [linked("a", "."), linked("a/b", ".."), tarfile.TarInfo("a/b/evil.txt")],
        [linked("device", "", tarfile.CHRTYPE)],
        [tarfile.TarInfo("/../evil.txt")],
    ],
    ids=["link", "absolute link", "hard link", "links in links", "device", "absolute"],
)
def test_a_link_or_a_device_never_leads_out_of_the_folder(entries, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for entry in entries:
            archive.addfile(entry)
    with pytest.raises(GatesError, match=r"a\.tar cannot be unpacked: .*; remove it"):
        unpack(path, tmp_path / "folder")
    assert sorted(one.name for one in tmp_path.iterdir() if one.is_file()) == [
        "a.tar", "secret.txt",
    ]  # fmt: skip
    assert not (tmp_path / "folder/out").exists()


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.tar"])
@pytest.mark.parametrize("kept", [0, 0.3, 0.999])
def test_a_truncated_archive_is_refused(name, kept, tmp_path):
    whole = packed({"one.bin": CONTENT}, "zip" if name == "a.zip" else "tar")
    if name == "a.tar":
        whole = gzip.decompress(whole)[: len(CONTENT) + 512]
    (tmp_path / name).write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(GatesError, match=r"cannot be unpacked: .*; remove it"):
        unpack(tmp_path / name, tmp_path / "folder")
