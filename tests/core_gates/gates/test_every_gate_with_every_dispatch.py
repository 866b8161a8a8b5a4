"""Routing gates of every kind take each other's place in a layer, whatever the dispatch, and learn.

The task is planted: tokens lie in two pairs of opposite clusters, and each cluster has its own
linear map. Experts are linear, so that no mixture that is the same everywhere fits.
"""

import pytest
import torch

import core_gates
from core_gates import (
    ActivationGate,
    BaseLayerGate,
    CometGate,
    CosineGate,
    DenseToSparseGate,
    DSelectKGate,
    ExpertChoiceGate,
    Gate,
    GShardGate,
    HardConcreteGate,
    HashGate,
    MlpGate,
    MoELayer,
    NoisyTopKGate,
    PermutedGate,
    ReMoEGate,
    SigmoidGate,
    SinkhornGate,
    SoftmaxGate,
    SoftMoEGate,
    StackedExperts,
    StagedSchedule,
    SwitchGate,
    TemperatureSchedule,
    ThresholdGate,
    TopKGate,
    TopPGate,
    update_gates,
)
from core_gates.moe.dispatch import DISPATCHES
from core_gates.routing import PermutationSearch

POSITIONS, DIM, EXPERTS = 64, 8, 5
CLUSTERS, STEPS = 4, 20
SHARE_LEFT = 0.37  # of the first loss, to be undercut by training; without routing, .46 is left
BLIND = "static dselect-k"  # a mixture that is the same at every token, by its definition

SEARCH = PermutationSearch(10, start=0.1, end=0.01, last_iterations=20)
GATES = {
    "softmax": lambda: SoftmaxGate(DIM, EXPERTS),
    "annealed softmax": lambda: SoftmaxGate(DIM, EXPERTS, tau=TemperatureSchedule(2.0, 0.3, STEPS)),
    "mlp": lambda: MlpGate(DIM, EXPERTS, hidden_dims=(8,)),
    "activation": lambda: ActivationGate(DIM, EXPERTS, learn_tau=True),
    "sigmoid": lambda: SigmoidGate(DIM, EXPERTS),
    "balanced sigmoid": lambda: SigmoidGate(DIM, EXPERTS, k=2, balance_rate=0.01),
    "top-k": lambda: TopKGate(DIM, EXPERTS, k=2),
    "noisy top-k": lambda: NoisyTopKGate(DIM, EXPERTS, k=2),
    "switch": lambda: SwitchGate(DIM, EXPERTS),
    "gshard": lambda: GShardGate(DIM, EXPERTS),
    "cosine": lambda: CosineGate(DIM, EXPERTS, projection_dim=4),
    "top-p": lambda: TopPGate(DIM, EXPERTS),
    "threshold": lambda: ThresholdGate(DIM, EXPERTS),
    "hash": lambda: HashGate(DIM, EXPERTS, num_ids=CLUSTERS),
    "expert choice": lambda: ExpertChoiceGate(DIM, EXPERTS),
    "base": lambda: BaseLayerGate(DIM, EXPERTS),
    "sinkhorn": lambda: SinkhornGate(DIM, EXPERTS),
    "soft moe": lambda: SoftMoEGate(DIM, EXPERTS, num_slots=POSITIONS // EXPERTS),
    "dselect-k": lambda: DSelectKGate(DIM, EXPERTS),
    "static dselect-k": lambda: DSelectKGate(DIM, EXPERTS, per_example=False),
    "comet": lambda: CometGate(DIM, EXPERTS),
    "hard concrete": lambda: HardConcreteGate(DIM, EXPERTS),
    "remoe": lambda: ReMoEGate(DIM, EXPERTS),
    "dense to sparse": lambda: DenseToSparseGate(
        DIM, EXPERTS, stages=StagedSchedule(4, 12, start=2.0, end=0.3)
    ),
    "permuted top-k": lambda: PermutedGate(TopKGate(DIM, EXPERTS), search=SEARCH),
    "permuted comet": lambda: PermutedGate(CometGate(DIM, EXPERTS), search=SEARCH),
}


def planted():
    """Return tokens (T, D), targets (T, D) and the cluster of every token (T,)."""
    generator = torch.Generator().manual_seed(0)
    cluster = torch.arange(POSITIONS) % CLUSTERS
    axes = 2 * torch.eye(DIM)[: CLUSTERS // 2]
    x = torch.cat([axes, -axes])[cluster] + 0.3 * torch.randn(POSITIONS, DIM, generator=generator)
    maps = torch.randn(CLUSTERS, DIM, DIM, generator=generator) / DIM**0.5
    return x, torch.einsum("td,tdf->tf", x, maps[cluster]), cluster


def build(gate, dispatch):
    torch.manual_seed(0)
    return MoELayer(GATES[gate](), linear_experts(), dispatch=dispatch)


def linear_experts():
    return StackedExperts(EXPERTS, DIM, DIM, activation="identity", gated=False)


def share_of_loss_left(layer):
    """Train the layer and return its loss in evaluation over that before."""
    x, targets, cluster = planted()

    def loss():
        return (layer(x, ids=cluster)[0] - targets).square().mean()

    layer.eval()
    before = loss().item()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    layer.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        found = loss()
        if found.requires_grad:
            found.backward()
        optimizer.step()
        update_gates(layer)
    layer.eval()
    return loss().item() / before


def test_every_routing_gate_of_the_core_is_here():
    exported = [getattr(core_gates, name) for name in core_gates.__all__]
    kinds = {kind for kind in exported if isinstance(kind, type) and issubclass(kind, Gate)}
    assert {type(make()) for make in GATES.values()} == kinds - {Gate}


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("gate", GATES)
def test_the_loss_falls_and_the_gate_takes_part(gate, dispatch):
    layer = build(gate, dispatch)
    before = [parameter.detach().clone() for parameter in layer.gate.parameters()]
    left = share_of_loss_left(layer)
    assert (SHARE_LEFT < left < 0.6) if gate == BLIND else left < SHARE_LEFT
    moved = [
        not torch.equal(old, new) for old, new in zip(before, layer.gate.parameters(), strict=True)
    ]
    assert any(moved) or gate == "hash"  # which has no parameters


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_what_cannot_be_routed_is_refused(dispatch, refuses):
    x, _, _ = planted()
    soft = MoELayer(
        PermutedGate(SoftMoEGate(DIM, EXPERTS), search=SEARCH),
        linear_experts(),
        dispatch=dispatch,
    )
    refuses(
        ValueError,
        ("gate that returns them cannot be permuted", lambda: soft(x)),
        (r"must be \(..., T, D\): slots mix tokens", lambda: build("soft moe", dispatch)(x[0])),
        ("pass ids, one integer per token", lambda: build("hash", dispatch)(x)),
        ("does not fit a routing of", lambda: build("top-k", dispatch)(x, gate_input=x[1:])),
    )
