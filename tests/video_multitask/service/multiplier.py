"""A model that multiplies: its folder holds ``factor.json``."""

import json
import threading
import time

import numpy as np

from core_gates.errors import GatesError
from video_multitask.service.contract import RefusedError, columns_of, mapping_of

KINDS = {"x": "number", "name": "text", "ids": "integers"}


class Rows(list):
    """Values of x, in the order of the request."""


class Multiplier:
    """Return ``factor * x``; slow by ``pause`` a batch; fails on x = 13, and returns NaN for 14."""

    def __init__(self, factor, pause=0.0, interface=None):
        self.interface = interface or {}
        self.factor, self.pause, self.batches, self.warm = factor, pause, [], False
        self.threads = set()

    @classmethod
    def load(cls, folder):
        path = folder / "factor.json"
        if not path.is_file():
            raise GatesError(f"{path} is missing")
        content = json.loads(path.read_text())
        return cls(content["factor"], content.get("pause", 0.0), content.get("interface"))

    @property
    def version(self):
        return f"times {self.factor}"

    def warm_up(self):
        if not np.isfinite(self.factor):
            raise ValueError("the factor\nis not finite")
        self.warm = True

    def read(self, content, max_rows):
        rows = mapping_of(content, ("items",), "the request").get("items")
        if not isinstance(rows, list) or not rows:
            raise GatesError("items: expected a list of rows")
        if len(rows) > max_rows:
            raise RefusedError(f"items has {len(rows)} rows, at most {max_rows} are taken")
        return Rows(columns_of(rows, KINDS, where="items", needed=["x"])["x"])

    def score(self, requests):
        self.threads.add(threading.current_thread().name)
        time.sleep(self.pause)
        self.batches.append([len(request) for request in requests])
        values = np.concatenate([np.array(request, dtype=float) for request in requests])
        if 13 in values:
            raise RuntimeError("the model cannot stand 13")
        return {"y": np.where(values == 14, np.nan, values * self.factor)}

    def answer(self, request, found):
        return {"model": self.version, "y": found["y"].tolist()}


def write_model(folder, factor, pause=0.0):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "factor.json").write_text(json.dumps({"factor": factor, "pause": pause}))
    return folder


if __name__ == "__main__":
    import sys
    from functools import partial
    from pathlib import Path

    from video_multitask.service.contract import Limits
    from video_multitask.service.server import Service, bind, log_to_stderr, serve

    log_to_stderr()
    limits = Limits(**json.loads(sys.argv[2])) if len(sys.argv) > 2 else Limits()
    service = Service(Path(sys.argv[1]), Multiplier.load, limits, poll_s=0.1)
    serve(service, bind("127.0.0.1", 0), partial(print, flush=True))
