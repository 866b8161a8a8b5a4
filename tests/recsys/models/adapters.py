"""Weights of other libraries, stacked as ours are.

Every parameter and buffer of ours is made of several of theirs: stacked, or one after the other.
"""

import torch
from torch.testing import assert_close

NORM = ("weight", "bias", "running_mean", "running_var")


class Map:
    """Fills a module of ours from theirs, and compares gradients and statistics with theirs."""

    def __init__(self):
        self.parts = {}

    def experts(self, ours, theirs, layers):
        """Experts; ``layers`` holds the names of linear map and normalization of each layer."""
        for j, (linear, norm) in enumerate(layers):
            for kind, name in (("weights", "weight"), ("biases", "bias")):
                self.parts[f"{ours}.{kind}.{j}"] = [f"{e}.{linear}.{name}" for e in theirs]
            if norm is not None:
                self.joined(f"{ours}.norms.{j}", [f"{e}.{norm}" for e in theirs], NORM)
        return self

    def joined(self, ours, theirs, names=("weight", "bias")):
        """A module whose rows are those of several of theirs."""
        for name in names:
            self.parts[f"{ours}.{name}"] = [f"{t}.{name}" for t in theirs]
        return self

    def wanted(self, arrays, ours, like, prefix):
        """What theirs make of a tensor of ours; None if they have none."""
        found = [arrays.get(prefix + name) for name in self.parts[ours]]
        return None if found[0] is None else torch.cat([f.flatten() for f in found]).view_as(like)

    def fill(self, net, arrays):
        state = net.state_dict()
        counted = {name for name in state if name.endswith("num_batches_tracked")}
        assert self.parts.keys() == state.keys() - counted
        for name in self.parts:
            value = self.wanted(arrays, name, state[name], "param/")
            if value is None:
                assert "bias" in name, f"theirs have no {name}"
                value = torch.zeros_like(state[name])
            state[name] = value
        net.load_state_dict(state)
        return net

    def check(self, net, arrays, mode):
        """Compare all gradients and, in training mode, running statistics."""
        gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        compared = self._compare(gradients, arrays, f"{mode}/grad/", 1e-8)
        assert {name for name in compared if "weight" in name} == {
            name for name, _ in net.named_parameters() if "weight" in name
        }
        if mode == "train":
            buffers = {n: b for n, b in net.named_buffers() if n in self.parts}
            assert len(self._compare(buffers, arrays, "after_train/", 1e-10)) == len(buffers)

    def _compare(self, found, arrays, prefix, tolerance):
        compared = []
        for name, tensor in found.items():
            wanted = self.wanted(arrays, name, tensor, prefix)
            if wanted is not None:
                assert_close(tensor, wanted, rtol=0, atol=tolerance, msg=lambda m, n=name: n + m)
                compared.append(name)
        return compared
