"""One rank of ``launch.run_on_ranks``: python worker.py FILE FUNCTION FOLDER."""

import importlib.util
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist

os.environ.setdefault("TRITON_INTERPRET", "1")


def main(source: str, name: str, folder: Path) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # A file needs no free port, for which parallel test processes would race.
    dist.init_process_group(
        "gloo",
        init_method=(folder / "rendezvous").as_uri(),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    spec = importlib.util.spec_from_file_location("test_on_rank", source)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    args = torch.load(folder / "args.pt", weights_only=True)
    result = getattr(module, name)(*args)
    torch.save(result, folder / f"result{rank}.pt")
    if dist.is_initialized():
        dist.barrier()  # no rank leaves while another still reads from it
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
