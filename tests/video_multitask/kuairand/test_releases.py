"""Downloads from a local server: checked, resumed after a kill, unpacked once."""

import hashlib
import http.server
import io
import subprocess
import sys
import tarfile
import threading
import time

import pytest

from core_gates.errors import GatesError
from video_multitask.kuairand import releases
from video_multitask.kuairand.folder import KuaiRand
from video_multitask.kuairand.releases import download_release


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        start = self.headers.get("Range")
        self.server.requests.append(start)
        first = int(start.removeprefix("bytes=").rstrip("-")) if start else 0
        body = self.server.content[first:]
        self.send_response(206 if first else 200)
        if first:
            total = len(self.server.content)
            self.send_header("Content-Range", f"bytes {first}-{total - 1}/{total}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.stall_at or None])
        self.wfile.flush()
        if self.server.stall_at:
            self.server.stalled.set()
            self.server.released.wait(30)

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass  # a client that was killed


@pytest.fixture
def archive(release):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for path in sorted((release / "data").iterdir()):
            name = path.name.replace("simulated", "pure")
            tar.add(path, f"KuaiRand-Pure/data/{name}")
    return made.getvalue()


@pytest.fixture
def server(archive):
    with Server(("127.0.0.1", 0), Handler) as server:
        server.content, server.requests, server.stall_at = archive, [], 0
        server.stalled, server.released = threading.Event(), threading.Event()
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def published(monkeypatch, archive):
    """Publish the archive of the server under the name of KuaiRand-Pure."""
    md5 = hashlib.md5(archive, usedforsecurity=False).hexdigest()
    pure = releases.RELEASES["pure"]._replace(md5=md5)
    monkeypatch.setattr(releases, "RELEASES", releases.RELEASES | {"pure": pure})
    return md5


SCRIPT = """
import sys
from video_multitask.kuairand import releases
pure = releases.RELEASES["pure"]._replace(md5=sys.argv[3])
releases.RELEASES = releases.RELEASES | {"pure": pure}
releases.download_release("pure", sys.argv[1], url=sys.argv[2])
"""


def assert_same_files(data, release):
    """The unpacked files are those that were packed, to the last byte."""
    packed = sorted((release / "data").iterdir())
    assert len(packed) == len(list(data.iterdir())) > 3
    for path in packed:
        found = data / path.name.replace("simulated", "pure")
        assert found.read_bytes() == path.read_bytes(), path.name


def test_a_killed_download_continues_where_it_stopped(server, published, release, tmp_path):
    server.stall_at = len(server.content) // 2
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path), server.url, published])
    partial = tmp_path / ".KuaiRand-Pure.tar.gz.partial"
    assert server.stalled.wait(30)
    while not partial.exists() or partial.stat().st_size < server.stall_at:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    server.stall_at = 0
    server.released.set()
    assert not (tmp_path / "KuaiRand-Pure").exists()
    told = []
    data = download_release("pure", tmp_path, url=server.url, notify=told.append, pause=0)
    assert server.requests == [None, f"bytes={len(server.content) // 2}-"]
    assert (told, KuaiRand(tmp_path).release) == (["KuaiRand-Pure.tar.gz, 194 MB unpacked"], "pure")
    assert data == tmp_path / "KuaiRand-Pure" / "data"
    assert_same_files(data, release)
    assert download_release("pure", tmp_path, url=server.url, notify=told.append) == data
    assert (len(server.requests), len(told)) == (2, 1)


@pytest.mark.usefixtures("published")
def test_what_was_killed_while_it_unpacked_unpacks_everything(
    server, release, tmp_path, monkeypatch
):
    def killed(archive, folder, **options):
        member = archive.getmembers()[2]
        archive.extract(member, folder, **options)
        cut = tmp_path / member.name
        cut.write_bytes(cut.read_bytes()[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractall", killed)
        with pytest.raises(KeyboardInterrupt):
            download_release("pure", tmp_path, url=server.url)
    data = tmp_path / "KuaiRand-Pure" / "data"
    assert [path.stat().st_size for path in data.iterdir()] == [100]
    assert download_release("pure", tmp_path, url=server.url) == data
    assert_same_files(data, release)
    assert server.requests == [None]  # nothing is downloaded again
    assert not list(tmp_path.glob("*.tar.gz"))


def test_a_wrong_checksum_is_refused(server, tmp_path):
    with pytest.raises(GatesError, match="expected 0820331067a3784d9691136f772b35a7, twice"):
        download_release("pure", tmp_path, url=server.url, pause=0)
    assert not (tmp_path / "KuaiRand-Pure").exists()


def test_small_disks_and_unknown_releases_are_refused(tmp_path, monkeypatch):
    with pytest.raises(GatesError, match="release is '2k'; choose one of pure, 1k, 27k"):
        download_release("2k", tmp_path)
    free = type("Usage", (), {"free": 10**9})
    monkeypatch.setattr(releases.shutil, "disk_usage", lambda _: free)
    with pytest.raises(GatesError, match=r"has 1.0 GB free and KuaiRand-27k needs 46.0 GB"):
        download_release("27k", tmp_path)


def test_checksums_are_the_published_ones():
    assert {name: r.md5 for name, r in releases.RELEASES.items()} == {
        "pure": "0820331067a3784d9691136f772b35a7",
        "1k": "6b0b9c8222d67fcd4c676218edca3f1f",
        "27k": "3e3c799a24e2d23a4d2c757fbf9adf59",
    }
    remote = releases.RELEASES["1k"].remote()
    assert remote.url == "https://zenodo.org/records/10439422/files/KuaiRand-1K.tar.gz"
