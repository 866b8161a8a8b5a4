"""Scans in processes that are killed at the n-th step of writing, and two at once.

``python killing.py ROOT SCRATCH``: the libraries are imported once, each scan is a fork. All scans
continue an index whose matrix has free rows, of files that are gone. It prints JSON: an index that
was made as a whole, those that were killed and then finished by another process, how many were
killed, and one that two processes made at once.
"""

import json
import os
import random
import runpy
import shutil
import signal
import sys
from pathlib import Path

import diffusion.library.index as scanning
from diffusion.library import LoraLibrary
from diffusion.library.database import Database

ENCODERS = runpy.run_path(str(Path(__file__).with_name("encoders.py")))
scanning._BATCH = 3
KILLS = 14


def scan(root, index):
    with LoraLibrary(root, ENCODERS["Probes"](), index=index) as library:
        library.scan()


def prepare(root, index):
    """Make an index of one file, with free rows before its own."""
    old = sorted(root.glob("old*.safetensors"))
    with LoraLibrary(root, ENCODERS["Probes"](), index=index) as library:
        for path in (*old, root / "0/0.safetensors"):
            library.add(path)
        for path in old:
            library.remove(path.stem)
            path.unlink()
        library._catalog().drop_unused("flux", library.encoder.fingerprint)


def continued(base, index):
    shutil.copytree(base, index)
    return index


def stepwise(limit, note=None):
    """Number the steps that change something on the disk, and kill this process at one of them."""
    steps = 0

    def step(of_matrix=False):
        nonlocal steps
        steps += 1
        if note is not None:
            note(steps, of_matrix)
        if steps == limit:
            os.kill(os.getpid(), signal.SIGKILL)

    write, run, many = os.pwrite, Database.run, Database.run_many

    def partial_write(descriptor, raw, place):
        step(True)
        write(descriptor, raw[: len(raw) // 2], place)
        step(True)
        return write(descriptor, raw, place)

    def stepping(function):
        def call(*args):
            step()
            return function(*args)

        return call

    os.pwrite, Database.run, Database.run_many = partial_write, stepping(run), stepping(many)


def start(work):
    """Run a function in another process."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def fork(work):
    """Run a function in another process; return its status."""
    return os.waitpid(start(work), 0)[1]


def main():
    root, scratch = Path(sys.argv[1]), Path(sys.argv[2])
    rng = random.Random(5)
    counted, base = scratch / "steps", scratch / "base"
    assert fork(lambda: prepare(root, base)) == 0
    whole, both, other = (continued(base, scratch / n) for n in ("whole", "both", "counted"))

    def count():
        noted = []
        stepwise(-1, lambda number, of_matrix: noted.append((number, of_matrix)))
        scan(root, other)
        counted.write_text(json.dumps(noted))

    assert fork(lambda: scan(root, whole)) == 0
    assert fork(count) == 0
    steps = json.loads(counted.read_text())
    limits = (steps, [pair for pair in steps if pair[1]])
    finished, killed = [], 0
    while killed < KILLS:
        number = len(finished)
        index = continued(base, scratch / f"killed {number}")
        limit, _ = rng.choice(limits[number % 2])
        status = fork(lambda index=index, n=limit: (stepwise(n), scan(root, index)))
        killed += status == signal.SIGKILL
        assert fork(lambda index=index: scan(root, index)) == 0
        finished.append(str(index))
    children = [start(lambda: scan(root, both)) for _ in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    result = {"whole": str(whole), "killed": killed, "finished": finished, "both": str(both)}
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main()
