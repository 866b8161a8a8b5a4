"""``gates endoscopy prepare --download``: from archives on a server to a frame table."""

import hashlib
import http.server
import json
import runpy
import shutil
import threading
from functools import partial
from pathlib import Path

import pandas as pd
import pytest

MAKE = Path(__file__).parents[1] / "data" / "real_colon" / "make.py"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def manifest(tmp_path):
    """A server of fake REAL-Colon, a folder an archive, and the list of its files."""
    root = runpy.run_path(str(MAKE))["official"](tmp_path / "colon")
    files = tmp_path / "served"
    files.mkdir()
    for path in root.iterdir():
        if path.is_dir():
            shutil.make_archive(str(files / path.name), "gztar", root, path.name)
        else:
            shutil.copy(path, files)
    handler = partial(Quiet, directory=str(files))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        entries = [
            {
                "name": path.name,
                "download_url": f"http://127.0.0.1:{server.server_address[1]}/{path.name}",
                "size": path.stat().st_size,
                "computed_md5": hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest(),
            }
            for path in sorted(files.iterdir())
        ]
        (tmp_path / "manifest.json").write_text(json.dumps(entries))
        yield tmp_path / "manifest.json"
        server.shutdown()


def test_prepare_downloads_unpacks_and_reads_real_colon(manifest, gates_in, tmp_path):
    run = gates_in(tmp_path)
    folds = {"001-001_1": 2, "001-001_2": 2, "001-002_1": 1, "002-001_1": 0}
    table = pd.DataFrame({"unique_id": list(folds), "kfold_id": list(folds.values())})
    table.to_csv(tmp_path / "folds.csv", index=False)
    words = ["--download", "new", "--manifest", manifest.name, "--data.cache_folder", "null"]
    words += ["--data.split", "file", "--data.split_file", "folds.csv"]
    words += ["--trainer.precision", "32-true"]
    out = run.endoscopy("prepare", *words, config="real_colon").out
    assert out.splitlines()[0].startswith("8 files of 0.00 GB into new")
    assert "44 frames of 4 objects" in out
    assert not list((tmp_path / "new").glob("*.tar.gz"))
    assert " of 8: " not in run.endoscopy("prepare", *words, config="real_colon").out
    assert "--download brings REAL-Colon, and the data are synthetic" in run.refuse(
        "endoscopy", "prepare", "--config", "unit", "--download", "new"
    )
