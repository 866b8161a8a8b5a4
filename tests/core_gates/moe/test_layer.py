import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from core_gates import (
    GatesError,
    MoELayer,
    RoutingOutput,
    SigmoidGate,
    SoftmaxGate,
    SoftMoEGate,
    StackedExperts,
    SwitchGate,
    TopKGate,
    collect_routing,
)
from core_gates.moe import GatedMlp
from core_gates.moe.dispatch import DISPATCHES

EXPERTS, DIM, HIDDEN = 5, 8, 12


GATES = {
    "top-k": lambda: TopKGate(DIM, EXPERTS, k=2),
    "softmax": lambda: SoftmaxGate(DIM, EXPERTS),
    "switch": lambda: SwitchGate(DIM, EXPERTS),
    "sigmoid": lambda: SigmoidGate(DIM, EXPERTS, k=2, balance_rate=1e-3),
    "slots": lambda: SoftMoEGate(DIM, EXPERTS),
}


def build(gate="top-k", **options):
    torch.manual_seed(0)
    made = GATES[gate]()
    nn.init.normal_(made.weight)
    return MoELayer(made, StackedExperts(EXPERTS, DIM, HIDDEN), **options)


def positions(*shape):
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(1))


def gradients(model, y):
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad((y.float() * cotangent).sum(), [*model.parameters()])
    return dict(zip((name for name, _ in model.named_parameters()), found, strict=True))


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_with_every_dispatch(gate):
    x, reference = positions(3, 7), build(gate, dispatch="loop").eval()
    y, routing = reference(x)
    expected = gradients(reference, y)
    for dispatch in DISPATCHES:
        layer = build(gate, dispatch=dispatch).eval()
        found, its_routing = layer(x)
        assert_close(found, y, rtol=1e-5, atol=1e-5)
        assert torch.equal(its_routing.weights, routing.weights)
        assert_close(gradients(layer, found), expected, rtol=1e-5, atol=1e-5)


def test_a_given_routing_skips_the_gate():
    layer, x = build(), positions(9)
    other = TopKGate(DIM, EXPERTS, k=1)(x)
    with collect_routing(layer) as routings:
        y, routing = layer(x, routing=other)
    assert routings == {"gate": []}
    assert routing is other
    assert_close(y, torch.einsum("te,ted->td", other.to_dense().weights, layer.experts.dense(x)))


def test_the_gate_may_look_at_something_else():
    layer, x, seen = build(), positions(9), positions(9) + 1
    y, routing = layer(x, gate_input=seen)
    assert torch.equal(routing.weights, layer.gate(seen).weights)
    assert_close(y, layer(x, routing=layer.gate(seen))[0])


def test_ids_reach_the_gate():
    class ById(TopKGate):
        def forward(self, x, *, ids=None, padding_mask=None):
            return RoutingOutput(torch.ones(len(x), 1), ids.unsqueeze(-1))

    layer = MoELayer(ById(DIM, EXPERTS), StackedExperts(EXPERTS, DIM, HIDDEN))
    x, ids = positions(4), torch.tensor([3, 0, 0, 4])
    expected = torch.stack(
        [layer.experts.single(row, int(e)) for row, e in zip(x, ids, strict=True)]
    )
    assert_close(layer(x, ids=ids)[0], expected)


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("gate", GATES)
def test_padding_changes_nothing_else(gate, dispatch):
    layer = build(gate, dispatch=dispatch).eval()
    mask = torch.tensor([[False, False, True, False]])
    x = positions(1, 4)
    y, _ = layer(x.masked_fill(mask.unsqueeze(-1), 1e4), padding_mask=mask)
    assert not y[mask].any()
    if gate != "switch":  # its capacity depends on the number of tokens
        alone = layer(x[:, [0, 1, 3]])[0]
        assert_close(y[:, [0, 1, 3]], alone)


def test_padding_may_hold_anything():
    mask = torch.tensor([[False, False, True, False]])
    x = positions(1, 4).masked_fill(mask.unsqueeze(-1), torch.nan)
    for dispatch in DISPATCHES:
        shared = build(dispatch=dispatch, shared=GatedMlp(DIM, 3))
        assert shared(x, padding_mask=mask)[0].isfinite().all()
        layer = build(dispatch=dispatch)
        y, routing = layer(x, padding_mask=mask)
        assert not y[mask].any()
        assert all(g.isfinite().all() for g in gradients(layer, y).values())
        assert_close(layer(x, routing=routing)[0], y)  # a replay knows what was ignored
        _, other = layer(x, routing=layer.gate(positions(1, 4)), padding_mask=mask)
        assert_close(other.weights, routing.weights)


def test_what_the_gate_dropped_contributes_nothing():
    y, routing = build("switch")(positions(1).expand(20, -1))
    assert 0 < int(routing.kept.sum()) < 20
    assert torch.equal(y.any(-1), routing.kept.squeeze(-1))


def test_shared_experts_are_added():
    layer, x = build(shared=GatedMlp(DIM, 3)), positions(6)
    assert_close(layer(x)[0], build()(x)[0] + layer.shared(x))


def test_drop_in_for_an_mlp():
    layer, x = build(return_routing=False), positions(6)
    with collect_routing(layer) as routings:
        y = nn.Sequential(layer)(x)
    assert_close(y, build()(x)[0])
    assert len(routings["gate"]) == 1


@pytest.mark.parametrize("gate", ["top-k", "softmax", "switch"])
def test_a_step_of_generation_is_the_same(gate, weight_first):
    for gated, bias in ((True, False), (False, True)):
        made = GATES[gate]().eval()
        experts = StackedExperts(EXPERTS, DIM, HIDDEN, gated=gated, bias=bias)
        layer, x = MoELayer(made, experts), positions(1, 1)
        expected, _ = layer(x)
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                assert_close(layer(x)[0], expected)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert_close(layer(x)[0].float(), expected, rtol=3e-2, atol=3e-2)


@pytest.mark.fault("core A12")
@pytest.mark.parametrize("gate", ["top-k", "softmax", "switch"])
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_not_finite_routing_acts_alike_on_every_device(gate, dispatch, monkeypatch):
    """It shows in its own token, or is refused where counts reach the host on every device."""
    outcomes = []
    for is_cpu in (True, False):
        monkeypatch.setattr(torch.Tensor, "is_cpu", is_cpu)
        layer, x = build(gate, dispatch=dispatch), positions(6)
        x[0] = torch.nan
        try:
            y, _ = layer(x)
        except GatesError as error:
            outcomes.append(str(error))
        else:
            assert y[0].isnan().any()
            outcomes.append(y.isfinite().all(-1).tolist())
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dispatch": "fast"}, "dispatch is 'fast'; choose one of dense, loop, sorted"),
        ({"gate": TopKGate(DIM, 4)}, "the gate routes to 4 experts, but there are 5"),
    ],
)
def test_wrong_arguments(refuses, change, message):
    good = {"gate": TopKGate(DIM, 5), "experts": StackedExperts(5, DIM, HIDDEN)}
    refuses(ValueError, (message, lambda: MoELayer(**(good | change))))


@pytest.mark.fault("46 C1")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dispatch", [*DISPATCHES, "slots"])
def test_autocast_gives_the_dtypes_of_a_linear_layer(dispatch, gated, bias, weight_first):
    """Results are in the dtype of autocast, gradients in that of what they belong to."""
    ways = {"gate": "slots"} if dispatch == "slots" else {"dispatch": dispatch}
    layer, x = build(**ways), positions(20).requires_grad_()
    layer.experts = StackedExperts(EXPERTS, DIM, HIDDEN, gated=gated, bias=bias)
    exact, _ = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = layer(x)
        with torch.no_grad():
            found = {n: layer(x[:n])[0] for n in (20, 1)}  # one token is a step of generation
        found["narrow"], _ = layer(x.bfloat16())
    found["trained"] = y
    assert {n: z.dtype for n, z in found.items()} == dict.fromkeys(found, torch.bfloat16)
    assert_close(y.float(), exact, rtol=3e-2, atol=3e-2)
    y.sum().backward()
    assert {t.grad.dtype for t in (x, *layer.parameters())} == {torch.float32}


@pytest.mark.fault("46 C1")
@pytest.mark.parametrize("bias", [False, True])
def test_autocast_gives_the_dtype_of_a_linear_layer_in_a_compiled_step(bias):
    experts, x = StackedExperts(EXPERTS, DIM, HIDDEN, bias=bias), positions(2)
    chosen = torch.compile(experts.chosen, backend="eager", fullgraph=True)
    indices = torch.tensor([[0, 3], [4, 1]])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = chosen(x, indices), experts.chosen(x, indices)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert_close(found, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_bfloat16_layer(dispatch):
    layer, x = build(dispatch=dispatch).bfloat16(), positions(20).bfloat16()
    y, routing = layer(x)
    assert (y.dtype, routing.weights.dtype) == (torch.bfloat16, torch.float32)
    assert_close(y.float(), copy.deepcopy(layer).float()(x.float())[0], rtol=3e-2, atol=3e-2)
    assert {g.dtype for g in gradients(layer, y).values()} == {torch.bfloat16}


def test_activation_checkpointing_is_exact():
    layer, x = build(), positions(20)
    y = checkpoint(lambda x: layer(x)[0], x, use_reentrant=False)
    expected, _ = layer(x)
    assert_close(gradients(layer, y), gradients(layer, expected), rtol=0, atol=0)


@pytest.mark.parametrize("gate", ["top-k", "softmax", "switch"])
def test_compiles_into_one_graph(gate):
    layer, x = build(gate).eval(), positions(20)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y, expected = compiled(x)[0], layer(x)[0]
    assert_close((y, gradients(layer, y)), (expected, gradients(layer, expected)))
    with torch.no_grad():
        assert_close(compiled(x[:1])[0], layer(x[:1])[0])


def train(model, x, parameters):
    """Three steps; returns the parameters."""
    optimizer = torch.optim.SGD(parameters, 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x)[0].square().mean().backward()
        optimizer.step()


def single_process_result(x):
    layer = build()
    train(layer, x, layer.parameters())
    return {name: p.detach() for name, p in layer.named_parameters()}


def ddp_result(x):
    layer = nn.parallel.DistributedDataParallel(build())
    train(layer, x.chunk(2)[torch.distributed.get_rank()], layer.parameters())
    return {name: p.detach() for name, p in layer.module.named_parameters()}


def fsdp_result(x, which):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    layer = build()
    if which == "experts":
        fully_shard(layer.experts, mesh=mesh)
    fully_shard(layer, mesh=mesh)
    train(layer, x.chunk(2)[torch.distributed.get_rank()], layer.parameters())
    return {name: p.full_tensor().detach() for name, p in layer.named_parameters()}


def results_of_ranks(x):
    return {"ddp": ddp_result(x)} | {w: fsdp_result(x, w) for w in ("layer", "experts")}


def test_two_ranks_train_like_one(ranks):
    x = positions(12)
    x[:, 0] = 3  # some experts get nothing
    expected, start = single_process_result(x), dict(build().named_parameters())
    assert not any(torch.equal(start[name], p) for name, p in expected.items())
    for results in ranks(results_of_ranks, x, timeout=400):
        for name, result in results.items():
            assert_close(result, expected, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("grad", [False, True])
def test_memory_of_a_forward_pass(grad):
    tokens, dim, hidden, experts, k = 4096, 512, 1024, 16, 2
    layer = MoELayer(TopKGate(dim, experts, k=k), StackedExperts(experts, dim, hidden, gated=False))
    x, num_rows = torch.randn(tokens, dim), tokens * k
    with torch.set_grad_enabled(grad):
        peak = peak_memory(lambda: layer(x))
    assert peak <= 3 * 4 * (num_rows * dim + num_rows * hidden + tokens * dim)


def peak_memory(call):
    """Bytes allocated at once by the profiler's account."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    total = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
            total += event.nbytes()
            peak = max(peak, total)
    assert peak > 0
    return peak
