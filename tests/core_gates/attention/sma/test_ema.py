import pytest
import torch
from torch.testing import assert_close

from core_gates.attention.sma.ema import MultiHeadEMA

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def build(g, meta):
    ema = MultiHeadEMA(
        meta["embed_dim"],
        meta["ndim"],
        bidirectional=meta["bidirectional"],
        truncation=meta["truncation"],
    )
    with torch.no_grad():
        for name, parameter in ema.named_parameters():
            parameter.copy_(g[f"weight.{name}"].view_as(parameter))
    return ema


def randomized(*args, **options):
    torch.manual_seed(0)
    ema = MultiHeadEMA(*args, **options).double()
    with torch.no_grad():
        for parameter in ema.parameters():
            parameter.normal_()
    return ema


@pytest.mark.parametrize("prefix", ["uni.", "bi.", "bitrunc."])
def test_golden_values_and_gradients(prefix, vectors):
    g, meta = vectors("seqboat_ema", prefix)
    ema = build(g, meta)
    x = g["x"].transpose(0, 1).requires_grad_()
    out = ema(x, padding_mask=g["padding_mask"])
    assert_close(ema.kernel(g["kernel"].shape[1]), g["kernel"], **TOLERANCE)
    assert_close(out, g["out"].transpose(0, 1), **TOLERANCE)
    parameters = dict(ema.named_parameters())
    grads = torch.autograd.grad(out, [x, *parameters.values()], g["grad_out"].transpose(0, 1))
    assert_close(grads[0], g["grad_x"].transpose(0, 1), **TOLERANCE)
    for name, grad in zip(parameters, grads[1:], strict=True):
        assert_close(grad, g[f"grad.{name}"].view_as(grad), **TOLERANCE)


def test_golden_recurrence(vectors):
    g, meta = vectors("seqboat_ema", "uni.")
    ema = build(g, meta)
    x = g["x"]
    state = x.new_zeros(x.shape[1], meta["embed_dim"], meta["ndim"])
    outputs = []
    for token in x:
        y, state = ema.step(token, state)
        outputs.append(y - ema.omega * token)
    assert_close(torch.stack(outputs), g["recurrent_out_no_residual"], **TOLERANCE)
    assert_close(state, g["recurrent_final_state"], **TOLERANCE)
    assert_close(ema.state(x.transpose(0, 1)), g["recurrent_final_state"], **TOLERANCE)


def test_truncation_and_direction_by_a_double_loop():
    ema = randomized(2, 3, bidirectional=True, truncation=4)
    x = torch.randn(1, 9, 2, dtype=torch.float64)
    taps = ema.kernel(4)
    expected = ema.omega * x
    for t in range(9):
        for lag in range(4):
            if t - lag >= 0:
                expected[0, t] += taps[:2, lag] * x[0, t - lag]
            if t + lag < 9:
                expected[0, t] += taps[2:, lag] * x[0, t + lag]
    assert_close(ema(x), expected)


def test_continuing_from_a_state_equals_the_whole():
    ema = randomized(3, 2)
    x = torch.randn(2, 12, 3, dtype=torch.float64)
    whole = ema(x)
    for start in (0, 1, 8):
        state = ema.state(x[:, :start])
        for t in range(start, 12):
            y, state = ema.step(x[:, t], state)
            assert_close(y, whole[:, t])


def test_half_precision_is_computed_in_float32():
    ema = MultiHeadEMA(4, 3)
    x = torch.randn(2, 20, 4)
    half = ema(x.bfloat16())
    assert_close(half, ema(x.bfloat16().float()).bfloat16(), rtol=0, atol=0)


def test_saturated_decay_stays_finite():
    ema = MultiHeadEMA(1, 2)
    torch.nn.init.constant_(ema.delta, 100.0)
    torch.nn.init.constant_(ema.alpha, 100.0)
    y = ema(torch.ones(1, 5, 1))
    y.sum().backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in ema.parameters())


def test_errors(refuses):
    refuses(
        ValueError,
        ("truncation must be at least 1, got 0", lambda: MultiHeadEMA(3, 2, truncation=0)),
        (r"must be \(batch, tokens, 3\), got \(2, 3\)", lambda: MultiHeadEMA(3)(torch.zeros(2, 3))),
    )
    for options in ({"bidirectional": True}, {"truncation": 4}):
        with pytest.raises(ValueError, match="has no recurrent form"):
            MultiHeadEMA(3, **options).state(torch.zeros(1, 2, 3))
