"""Gradient routing on several ranks."""

import runpy
from pathlib import Path

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

NET = runpy.run_path(str(Path(__file__).with_name("routed_net.py")))
build, batch, loss_on, snapshot, changed, GATES, WEIGHTS = (
    NET[name] for name in ("build", "batch", "loss_on", "snapshot", "changed", "GATES", "WEIGHTS")
)


def shard(tensors, accumulate):
    """This rank's half of each micro-batch; everything without ranks."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    pairs = zip(*(t.chunk(accumulate) for t in tensors), strict=True)
    return [loss_on(*(t.chunk(size)[rank] for t in pair)) for pair in pairs]


def train_on_ranks(mode, accumulate, bare, clip, still=frozenset()):
    """Five steps of Adam in float64; parameters named in ``still`` are frozen."""
    options = {}
    if dist.is_initialized() and bare:
        options = {"group": dist.group.WORLD, "backward": lambda loss: loss.backward()}
    model, routing = build(mode, dtype=torch.float64, clip=clip, gate_clip=clip, **options)
    for name in still:
        model.get_parameter(name).requires_grad_(False)
    runner = model
    if dist.is_initialized() and bare:
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            p.register_post_accumulate_grad_hook(average)
    elif dist.is_initialized():
        runner = DistributedDataParallel(model)
    for t in range(5):
        routing.step(runner, shard(batch(t, 8, torch.float64), accumulate))
    return dict(model.state_dict())


def average(parameter):
    """Stands for the hooks of a strategy that leaves the model bare."""
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


RUNS = [
    ("dual", 1, False, 0.1),
    ("dual", 2, False, 0.1),
    ("dual", 1, True, 0.1),
    ("every_k", 1, False, 0.1),
    ("joint", 2, False, 0.1),
    ("reference", 2, False, 0.1),
    ("dual", 2, False, 0.1, WEIGHTS),
    ("dual", 2, True, 0.1, WEIGHTS),
    ("dual", 2, False, 0.1, GATES),
]


def everything_on_ranks():
    return {"trained": [train_on_ranks(*run) for run in RUNS], "averaged": average_unused()}


def average_unused():
    """A gate that one rank uses, and one that none uses."""
    from core_gates.training.gradient_routing import _average

    gates = [torch.zeros(2, 3), torch.zeros(4), torch.zeros(1)]
    rank = dist.get_rank()
    grads = [torch.full((2, 3), 2.0 * (rank + 1)), torch.ones(4) if rank else None, None]
    means = _average(grads, gates, dist.group.WORLD)
    return [torch.full((1,), torch.nan) if mean is None else mean for mean in means]


def test_two_ranks_equal_one_process(ranks):
    start = snapshot(build(dtype=torch.float64)[0])
    expected = [train_on_ranks(*run) for run in RUNS]
    for result in ranks(everything_on_ranks, timeout=300.0):
        for run, mine, one in zip(RUNS, result["trained"], expected, strict=True):
            assert changed(start, one) == (GATES | WEIGHTS) - set().union(*run[4:])
            assert_close(mine, one, rtol=0, atol=1e-10, msg=lambda m, run=run: f"{run}: {m}")
        full, single, none = result["averaged"]
        assert torch.equal(full, torch.full((2, 3), 3.0))
        assert torch.equal(single, torch.full((4,), 0.5))
        assert none.isnan()
