"""A MoE language model trains alike eagerly and compiled: losses, loads, biases, monitor."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from core_gates import (
    GateMonitor,
    MoELayer,
    SigmoidGate,
    StackedExperts,
    balance_loss,
    collect_routing,
    update_gates,
)

VOCABULARY, DIM, EXPERTS, BATCH, LENGTH = 19, 8, 4, 3, 7

AUTOGRAD = pytest.mark.costly("AOTAutograd traces forward and backward")
GRAPHS = pytest.mark.costly("Dynamo traces several graphs")
DAILY = [pytest.mark.slow, AUTOGRAD]
BACKENDS = ["eager", pytest.param("aot_eager", marks=DAILY)]
# Dynamo asks every input of a graph for its gradient, also one that has none.
IGNORE_GRAD = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(DIM), nn.Linear(DIM, DIM)
        gate = SigmoidGate(DIM, EXPERTS, k=2, balance_rate=0.01)
        self.moe = MoELayer(gate, StackedExperts(EXPERTS, DIM, 6))

    def forward(self, x):
        x = x + self.mixer(x).cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        y, routing = self.moe(self.norm(x))
        return x + y, balance_loss(routing)


class LanguageModel(nn.Module):
    """Returns its loss: next token and, weighted, balance of the experts."""

    def __init__(self, layers=1, use_reentrant=None):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(DIM, VOCABULARY)
        self.use_reentrant = use_reentrant

    def forward(self, tokens):
        x, auxiliary = self.embedding(tokens[:, :-1]), 0.0
        for block in self.blocks:
            if self.use_reentrant is None:
                x, loss = block(x)
            else:
                x, loss = checkpoint(block, x, use_reentrant=self.use_reentrant)
            auxiliary = auxiliary + loss
        logits = self.head(x)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + 0.01 * auxiliary


class Counting:
    """A backend of ``torch.compile`` that counts its graphs."""

    def __init__(self, name):
        self.backend, self.graphs = torch._dynamo.lookup_backend(name), 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return self.backend(graph, inputs)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def build(dtype=torch.float64, **options):
    torch.manual_seed(0)
    return LanguageModel(**options).to(dtype)


def batches(steps, micro_batches=2):
    """Tokens of steps and micro-batches, of a skewed distribution, so that loads differ."""
    generator = torch.Generator().manual_seed(1)
    shape = (steps * micro_batches * BATCH, LENGTH)
    skewed = torch.rand(shape, generator=generator).square() * VOCABULARY
    return skewed.long().view(steps, micro_batches, BATCH, LENGTH)


def gates(model):
    return [block.moe.gate for block in model.blocks]


def train(model, call, steps):
    """Return losses, loads of every step and gate, and the biases at the end."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses, loads = [], []
    for step in batches(steps):
        for tokens in step:
            loss = call(tokens)
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        loads.append(torch.stack([gate.counted[1:] for gate in gates(model)]))
        update_gates(model)
    biases = torch.stack([gate.balance_bias for gate in gates(model)])
    return torch.tensor(losses, dtype=torch.float64), torch.stack(loads), biases


def called_before(model, call):
    """Call the model in training mode once and forget what the gates have counted."""
    call(batches(1)[0, 0])
    for gate in gates(model):
        gate.counted.zero_()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # Inductor's
@pytest.mark.fault("core A1")
@pytest.mark.parametrize(
    ("backend", "dtype", "layers", "steps", "tolerance", "warm"),
    [
        pytest.param("eager", torch.float64, 1, 50, 1e-10, False, id="eager"),
        pytest.param("aot_eager", torch.float64, 2, 20, 1e-10, True, id="aot_eager", marks=DAILY),
        *(
            pytest.param(*row, marks=DAILY)
            for row in [
                ("aot_eager", torch.float64, 4, 50, 1e-10, False),
                ("aot_eager", torch.float64, 4, 50, 1e-10, True),
                ("inductor", torch.float32, 4, 10, 1e-4, True),
            ]
        ),
    ],
)
def test_compiled_trains_like_eager_in_one_compilation(
    backend, dtype, layers, steps, tolerance, warm, request
):
    if backend == "inductor":
        request.getfixturevalue("inductor")
    eager, model = build(dtype, layers=layers), build(dtype, layers=layers)
    losses, loads, biases = train(eager, eager, steps)
    counting = Counting(backend)
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    if warm:
        called_before(model, compiled)
    its_losses, its_loads, its_biases = train(model, compiled, steps)
    assert counting.graphs == 1
    assert_close(its_losses, losses, rtol=0, atol=tolerance)
    assert_close((its_loads, its_biases), (loads, biases), rtol=0, atol=0)
    assert loads[:, :, :-1].sum(-1).eq(2 * 2 * BATCH * (LENGTH - 1)).all()
    assert biases.abs().max() > 0.01
    assert losses[-1] < losses[0]


@pytest.mark.fault("core A1")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=AUTOGRAD)])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.ends("a compilation a case")
def test_checkpointed_tokens_count_once(use_reentrant, compiled):
    plain, model = build(), build(use_reentrant=use_reentrant)
    call = torch.compile(model, backend="aot_eager", fullgraph=not use_reentrant)
    losses, loads, biases = train(plain, plain, 3)
    found = train(model, call if compiled else model, 3)
    assert_close(found[0], losses, rtol=0, atol=1e-10)
    assert_close((found[1], found[2]), (loads, biases), rtol=0, atol=0)


@IGNORE_GRAD
@pytest.mark.fault("core A1")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("use_reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_checkpoints_around_compiled_blocks_count_once(use_reentrant, backend):
    plain, model = build(), build(use_reentrant=use_reentrant)
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    losses, loads, _ = train(plain, plain, 2)
    found = train(model, model, 2)
    assert_close(found[0], losses, rtol=0, atol=1e-10)
    assert torch.equal(found[1], loads)


@pytest.mark.fault("core A1")
@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_counts_nothing(backend):
    model = build(layers=2).eval()
    torch.compile(model, backend=backend, fullgraph=True)(batches(1)[0, 0])
    assert not any(gate.counted.any() for gate in gates(model))
    with pytest.raises(ValueError, match=r"gate 'blocks\.0\.moe\.gate' learns .* \(nor did 1 more"):
        update_gates(model)


@pytest.mark.fault("core A1")
@GRAPHS
@pytest.mark.parametrize("backend", BACKENDS)
def test_routings_of_a_compiled_model_are_gathered(backend):
    model, tokens = build(layers=2), batches(3)[:, 0]
    counting = Counting(backend)
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    compiled(tokens[0])
    for batch in tokens:
        with collect_routing(model) as routings:
            loss = compiled(batch)
            (loss + sum(r.logits.square().mean() for (r,) in routings.values())).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        with collect_routing(model) as expected:
            (model(batch) + sum(r.logits.square().mean() for (r,) in expected.values())).backward()
        assert list(routings) == [f"blocks.{n}.moe.gate" for n in range(2)]
        for name, (routing,) in routings.items():
            assert_close(routing.weights, expected[name][0].weights)
            assert torch.equal(routing.indices, expected[name][0].indices)
        assert_close(gradients, {name: p.grad for name, p in model.named_parameters()})
        model.zero_grad()
    assert counting.graphs == 2
    with collect_routing(model) as routings:
        for batch in tokens:
            compiled(batch)
    assert ({len(found) for found in routings.values()}, counting.graphs) == ({3}, 2)


@IGNORE_GRAD
@pytest.mark.fault("core A1")
@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputed_routings_of_compiled_blocks_are_not_gathered_again(backend):
    model = build(use_reentrant=True)
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    with collect_routing(model) as routings:
        model(batches(1)[0, 0]).backward()
    assert {len(found) for found in routings.values()} == {1}


@pytest.mark.slow
@pytest.mark.fault("core A1")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_monitor_measures_a_model_that_was_compiled_before(backend):
    model, tokens = build(), batches(4)[:, 0]
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    compiled(tokens[0])
    figures = []
    for call in (compiled, model):
        with GateMonitor(model, every=2) as monitor:
            for step, batch in enumerate(tokens):
                monitor.begin_step(step)
                call(batch).backward()
            for batch in tokens[:2]:
                with monitor.probing():
                    call(batch)
            figures.append(monitor.compute())
        call(tokens[0])
        assert monitor.compute() == figures[-1]  # a closed monitor measures nothing
    assert_close(*figures)
    assert {gate["tokens"] for gate in figures[0].values()} == {2 * BATCH * (LENGTH - 1)}
    assert all(0 < gate["churn"] <= 1 for gate in figures[0].values())


class Gated(nn.Module):
    """A module that multiplies by a gate and shows it to the monitor."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def gate_values(self, x):
        return self.linear(x).sigmoid()

    def forward(self, x):
        return x * self.gate_values(x)


@pytest.mark.fault("core A1")
@GRAPHS
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_monitor_measures_value_gates_and_experts_of_a_compiled_model(backend):
    torch.manual_seed(0)
    gate = SigmoidGate(DIM, EXPERTS, k=2)
    moe = MoELayer(gate, StackedExperts(EXPERTS, DIM, 6), return_routing=False)
    model, x = nn.Sequential(Gated(), moe), torch.randn(5, DIM)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    compiled(x)
    figures = []
    for call in (compiled, model, compiled):
        with GateMonitor(model, experts={"1.experts": EXPERTS}) as monitor:
            call(x)
            figures.append(monitor.compute())
            assert_close(copy.deepcopy(model)(x), call(x))
        call(x)
        assert monitor.compute()["0"]["values"] == 3 * x.numel()  # of the copy, too
    first = GateMonitor(model)
    compiled(x)
    second = GateMonitor(model)
    compiled(x)
    first.close()
    compiled(x)
    assert first.compute()["0"]["values"] == second.compute()["0"]["values"] == 2 * x.numel()
    second.close()
    assert "forward" not in vars(model[0])
    assert_close((figures[0], figures[2]), (figures[1], figures[1]))
    assert figures[0]["0"]["values"] == x.numel()
    assert figures[0]["1.experts"]["activations"] == 2 * x.numel()
