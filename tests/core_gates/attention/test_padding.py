"""Padding is one contract: what it holds reaches neither results nor gradients."""

import inspect

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import core_gates.attention
from core_gates.attention import (
    AttnGate,
    DecodeAttnGate,
    GatedAttention,
    MultiHeadEMA,
    ScaleNorm,
    SeqBoatLayer,
    SparseModularActivation,
    TokenBatchNorm,
)

D, T = 8, 11
CONTENTS = [torch.nan, torch.inf, -torch.inf, 1e30]
# Padding before and after the tokens, in whole blocks and in parts of them.
MASK = torch.zeros(4, T, dtype=torch.bool)
MASK[0, :3] = MASK[1, 6:] = True
MASK[2, :4] = MASK[2, 9:] = True


def seqboat(**options):
    options = {"num_states": 3, "window": 3, "max_positions": 9} | options
    return SeqBoatLayer(D, 4, 6, **options)


SEQUENCES = {
    **{f"GatedAttention {p}": (lambda p=p: GatedAttention(D, 4, 2, position=p, qk_norm=True))
       for p in ("none", "G1", "G2", "G3", "G4", "G5")},
    "GatedAttention bias": lambda: GatedAttention(D, 2, qkv_bias=True, rope_theta=None),
    "GatedAttention all": lambda: GatedAttention(D, 2, causal=False),
    "SeqBoatLayer": seqboat,
    "SeqBoatLayer all": lambda: seqboat(causal=False, position="simple", weighting="relu2"),
    "SeqBoatLayer local": lambda: seqboat(position="local", static_shapes=True),
    "SeqBoatLayer postnorm": lambda: seqboat(prenorm=False, norm=ScaleNorm()),
    "SeqBoatLayer batch": lambda: seqboat(norm=TokenBatchNorm(nn.BatchNorm1d(D))),
    "SeqBoatLayer batch after": lambda: seqboat(
        prenorm=False, norm=TokenBatchNorm(nn.BatchNorm1d(D))
    ),
    "MultiHeadEMA": lambda: MultiHeadEMA(D, 3),
    "MultiHeadEMA all": lambda: MultiHeadEMA(D, 3, bidirectional=True, truncation=4),
    "SparseModularActivation": lambda: SparseModularActivation(D),
    "TokenBatchNorm": lambda: TokenBatchNorm(nn.BatchNorm1d(D)),
}  # fmt: skip
PAIRS = {
    "AttnGate": lambda: AttnGate(4, 2, D, block_size=4, gate_dim=6),
    "AttnGate single": lambda: AttnGate(
        4, 2, D, block_size=4, gate_dim=D, pooling="Qmax_Kminavg"
    ),
    "DecodeAttnGate": lambda: DecodeAttnGate(4, 2, D, block_size=4, gate_dim=6),
    "DecodeAttnGate mean": lambda: DecodeAttnGate(
        4, 2, D, block_size=4, gate_dim=D, reduction="Qorig", qk_norm=False
    ),
}  # fmt: skip


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lively(make):
    torch.manual_seed(0)
    module = make().double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(draw(*parameter.shape, seed=1) / 2)
    return module


def inputs(name, batch=4, length=T):
    if name in SEQUENCES:
        return (draw(batch, length, D),)
    return draw(batch, length, 4, D), draw(batch, length, 2, D, seed=1)


def padded(tensors, mask, content):
    return [t.masked_fill(mask.view(*mask.shape, *[1] * (t.ndim - 2)), content) for t in tensors]


def run(module, tensors, mask):
    """Return the results of tokens, those of padding, and all gradients."""
    module.zero_grad()
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = module(*leaves, padding_mask=mask)
    out = out.confidence if isinstance(out, tuple) else out
    if len(leaves) == 1:
        real, rest = out[~mask], out[mask]
    else:  # (B, H, rows, blocks)
        shown = out > torch.finfo(out.dtype).min
        real, rest = out[shown], shown
    (real * draw(*real.shape, seed=3)).sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters()}
    return real, rest, grads | {str(i): t.grad for i, t in enumerate(leaves)}


@pytest.mark.fault("core A13")
@pytest.mark.fault("core A14")
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", [*SEQUENCES, *PAIRS])
def test_what_padding_holds_reaches_nothing(name, content):
    module = lively((SEQUENCES | PAIRS)[name])
    tensors = inputs(name)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    real, rest, grads = run(module, padded(tensors, MASK, 0.5), MASK)
    clean = {k: v.clone() for k, v in module.state_dict().items()}
    module.load_state_dict(state)
    found, found_rest, found_grads = run(module, padded(tensors, MASK, content), MASK)
    assert torch.equal(found, real)
    assert found.isfinite().all()
    if not name.startswith("MultiHeadEMA"):  # its residual keeps the values at padding
        assert torch.equal(found_rest, rest)
    for key, grad in grads.items():
        assert grad is not None, key
        assert grad.isfinite().all(), key
        assert torch.equal(found_grads[key], grad), key
    for index in range(len(tensors)):
        assert not found_grads[str(index)][MASK].any()
    assert_close(module.state_dict(), clean, rtol=0, atol=0)  # running statistics too
    if name in SEQUENCES and not name.startswith("MultiHeadEMA"):
        assert not found_rest.any()


@pytest.mark.fault("core A14")
@pytest.mark.parametrize("name", [n for n in SEQUENCES if "atch" not in n])
def test_a_padded_sequence_equals_the_sequence_alone(name):
    """Positions and windows are relative: padding in front shifts nothing."""
    module = lively(SEQUENCES[name])
    (x,) = padded(inputs(name), MASK, torch.nan)
    together = module(x, padding_mask=MASK)
    together = together.confidence if isinstance(together, tuple) else together
    for row, mask in enumerate(MASK):
        alone = module(x[row : row + 1, ~mask])
        alone = alone.confidence if isinstance(alone, tuple) else alone
        assert_close(together[row : row + 1, ~mask], alone)


@pytest.mark.fault("core A14")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["TokenBatchNorm", "SeqBoatLayer batch"])
def test_batch_norms_count_tokens_alone(name, training):
    module = lively(SEQUENCES[name]).train(training)
    (x,) = inputs(name, batch=1)
    mask = MASK[:1]
    other = lively(SEQUENCES[name]).train(training)
    assert_close(module(x, padding_mask=mask)[~mask], other(x[:, ~mask[0]])[0])
    assert_close(module.state_dict(), other.state_dict())


@pytest.mark.fault("core A14")
@pytest.mark.parametrize(("batch", "length"), [(2, T), (0, T), (2, 0), (0, 0)])
@pytest.mark.parametrize("name", [*SEQUENCES, *PAIRS])
def test_nothing_but_padding_and_nothing_at_all(name, batch, length):
    module = lively((SEQUENCES | PAIRS)[name])
    mask = torch.ones(batch, length, dtype=torch.bool)
    leaves = padded(inputs(name, batch, length), mask, torch.nan)
    leaves = [t.requires_grad_() for t in leaves]
    out = module(*leaves, padding_mask=mask)
    out = out.confidence if isinstance(out, tuple) else out
    assert out.isfinite().all()
    out.sum().backward()
    for parameter in module.parameters():  # every rank of a distributed training has a gradient
        assert parameter.grad is not None
        assert not parameter.grad.any()
    assert all(buffer.isfinite().all() for buffer in module.buffers())


def test_every_module_that_takes_a_mask_keeps_the_contract():
    taking = set()
    for name in core_gates.attention.__all__:
        offered = getattr(core_gates.attention, name)
        if inspect.isclass(offered) and issubclass(offered, nn.Module):
            parameter = inspect.signature(offered.forward).parameters.get("padding_mask")
            if parameter is not None:
                taking.add(name)
                assert parameter.kind is parameter.KEYWORD_ONLY
    assert taking == {name.split()[0] for name in (*SEQUENCES, *PAIRS)}


@pytest.mark.parametrize("name", [*SEQUENCES, *PAIRS])
def test_masks_of_another_kind_are_refused(name, refuses):
    module, tensors = lively((SEQUENCES | PAIRS)[name]), inputs(name)
    refuses(
        ValueError,
        (
            "padding_mask must be bool with True = ignore",
            lambda: module(*tensors, padding_mask=MASK.long()),
        ),
        (
            r"padding_mask \(4, 10\) must have the shape",
            lambda: module(*tensors, padding_mask=MASK[:, 1:]),
        ),
    )
