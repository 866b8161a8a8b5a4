from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parents[1] / "golden" / "endoscopy"


@pytest.fixture(scope="session")
def vectors():
    """``vectors(NAME)``: the arrays of a file of golden vectors; text stays text."""

    def load(name):
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            text = {k: v.tolist() for k, v in arrays.items() if v.dtype.kind == "U"}
            return text | {k: torch.from_numpy(arrays[k]) for k in arrays if k not in text}

    return load


@pytest.fixture(scope="session")
def own_name():
    """Renames the tensors of the published networks to ours."""

    def rename(name, stream="rgb"):
        for old, new in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            name = name.replace(f"fsag_rgb_{old}", f"{new}.gate.logits")
        for trunk in ("rgb", "mask", "depth"):
            for k in range(1, 5):
                name = name.replace(
                    f"fsag_{trunk}_layer{k}", f"branches.{trunk}.layer{k}.gate.logits"
                )
        name = name.replace("fsag_L1", "head.gate1.logits").replace("fsag_L2", "head.gate2.logits")
        for layer in ("fc2.", "fc3."):
            if name.startswith(layer):
                return f"head.{name}"
        if name.startswith(("branches.", "head.gate")):
            return name
        if name.startswith("head."):
            return name.replace("head.", "head.fc.")
        return f"branches.{stream}.{name}"

    return rename
