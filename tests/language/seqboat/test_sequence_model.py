"""A SeqBoat on its own: padding, batches, hard inputs, streaming, rules in place of its gates."""

import contextlib

import pytest
import torch
from torch import nn

from core_gates.errors import GatesError
from language.generation import generate
from language.seqboat.activation import RuleActivation
from language.seqboat.front_ends import FilterBank, FrameProjection, SymbolEmbedding
from language.seqboat.sequence_model import LayerCache, SeqBoat, recorded

SIZES = {"num_layers": 2, "key_dim": 4, "hidden_dim": 12, "num_states": 3, "window": 4}


def symbols(*lengths):
    x = torch.randint(1, 9, (len(lengths), max(lengths)))
    mask = torch.arange(max(lengths)) >= torch.tensor(lengths).unsqueeze(1)
    return x.masked_fill(mask, 0), mask


def small(outputs=5, vocab=9, **options):
    torch.manual_seed(0)
    model = SeqBoat(SymbolEmbedding(8, vocab), outputs, **SIZES, **options)
    with torch.no_grad():  # gates that differ between tokens
        for layer in model.blocks:
            if hasattr(layer.configurator, "weight"):
                layer.configurator.weight.normal_(std=20)
    return model.eval()


@pytest.mark.parametrize("norm", ["layer", "scale"])
@pytest.mark.parametrize("prenorm", [True, False])
def test_batch_mates_their_order_and_padding_change_nothing(norm, prenorm):
    model = small(norm=norm, prenorm=prenorm, head_dim=6)
    x, mask = symbols(7, 1, 12, 3)
    together = model(x, padding_mask=mask)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model(x[order], padding_mask=mask[order]), together[order])
    for row, length in enumerate((7, 1, 12, 3)):
        torch.testing.assert_close(model(x[row : row + 1, :length])[0], together[row])
    longer = nn.functional.pad(x, (0, 9)), nn.functional.pad(mask, (0, 9), value=True)
    torch.testing.assert_close(model(longer[0], padding_mask=longer[1]), together)


@pytest.mark.parametrize("norm", ["layer", "scale", "batch", "sync_batch"])
@pytest.mark.parametrize("bias", [1e4, -1e4, None], ids=["all active", "none", "some"])
def test_every_parameter_learns_whatever_is_active(norm, bias):
    model = small(norm=norm).train()
    with torch.no_grad():
        for layer in model.blocks if bias is not None else ():
            layer.configurator.bias.copy_(torch.tensor([-bias, bias]))
    x, mask = symbols(6, 2, 0)
    with recorded(model) as passes:
        loss = model(x, padding_mask=mask).square().sum()
    loss.backward()
    density = passes[0].density
    assert bias is None or density.eq(float(bias > 0)).all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_a_sequence_of_padding_alone_or_of_one_token_is_finite():
    model = small()
    x, mask = symbols(4, 0)
    logits = model(x, padding_mask=mask)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[1], model.head(torch.zeros(8)))
    assert model(x[:1, :1]).isfinite().all()
    assert torch.equal(model(x[:1, :0])[0], model.head(torch.zeros(8)))
    assert torch.equal(model(x, padding_mask=mask, last=True), logits)  # of causal models alone


@pytest.mark.parametrize("position", ["simple", "local", "rotary"])
def test_symbols_one_by_one_give_what_the_whole_sequence_gives(position):
    model = small(9, causal=True, position=position).double()
    x, _ = symbols(23, 23)
    whole = model(x)
    for first in (1, 9):
        caches = model.caches()
        parts = [model(x[:, :first], caches=caches), model(x[:, first:], caches=caches)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)
    torch.testing.assert_close(model(x, last=True), whole[:, -1:])
    changed = model(torch.cat([x[:, :15], x[:, 15:].flip(1)], 1))
    torch.testing.assert_close(changed[:, :15], whole[:, :15])  # no symbol sees a later one


def continued(model, prompts, **options):
    texts = [""] * len(prompts)
    chunks = generate(
        model, prompts, decode=lambda tokens: bytes(65 + t for t in tokens), end=None, **options
    )
    for chunk in chunks:
        texts[chunk.prompt] += chunk.text
    return texts


def test_ragged_prompts_are_continued_as_single_ones():
    model = small(9, causal=True).double()
    prompts = [[1, 2, 3, 4, 5, 6, 7], [3], [8, 1, 4]]
    together = continued(model, prompts, max_tokens=12, temperature=0.7, seed=3)
    alone = [continued(model, [p], max_tokens=12, temperature=0.7, seed=3)[0] for p in prompts]
    assert together == alone
    assert all(len(text) == 12 for text in alone)


def test_the_state_takes_equally_many_bytes_after_any_number_of_symbols():
    model, sizes = small(9, causal=True), []
    for length in (100, 10_000):
        caches = model.caches()
        for some in torch.randint(9, (1, length)).split([length - 3, 3], 1):
            model(some, caches=caches)
        assert all(isinstance(cache, LayerCache) for cache in caches)
        tensors = [t for cache in caches for t in cache.state if isinstance(t, torch.Tensor)]
        sizes.append(sum(t.numel() * t.element_size() for t in tensors))
    assert sizes[0] == sizes[1] > 0


def test_a_pass_that_breaks_leaves_no_record_behind():
    model = small()
    x, _ = symbols(9)
    model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0 if breaks else None)
    with recorded(model) as passes:
        for breaks in (True, False):  # noqa: B007
            with contextlib.suppress(ZeroDivisionError):
                model(x)
    assert [one.active.shape for one in passes] == [(2, 1, 9)]
    with recorded(model) as whole:
        model(x)
    assert torch.equal(passes[0].active, whole[0].active)
    assert not model._forward_pre_hooks
    assert not any(layer.configurator._forward_hooks for layer in model.blocks)


def test_symbols_out_of_range_and_missing_caches_are_named(refuses):
    model = small(9, causal=True)
    refuses(
        GatesError,
        ("symbols from 3 to 9, expected 0 to 8: raise", lambda: model(torch.tensor([[3, 9]]))),
        ("symbols from -1 to 0, expected 0 to 8", lambda: model(torch.tensor([[-1, 0]]))),
        (
            "1 caches for 2 layers: give those of model.caches",
            lambda: model(torch.tensor([[3]]), caches=model.caches()[:1]),
        ),
    )


def test_rules_stand_in_for_the_gate():
    x, mask = symbols(400, 250)
    for density in (0, 1, 0.3):
        model = small(densities=[density] * 2)
        for training in (False, True):
            with recorded(model.train(training)) as passes:
                model(x, padding_mask=mask)
            assert not passes[0].active[:, mask].any()
            assert passes[0].density.sub(density).abs().max() <= (0.06 if 0 < density < 1 else 0)
    rule, x = RuleActivation(0.5), torch.zeros(3, 50, 2)
    first, confidence = rule.eval()(x)
    assert torch.equal(confidence, first.float())
    drawn = [first, rule(x).mask, RuleActivation(0.5, layer=1).eval()(x).mask, rule.train()(x).mask]
    assert len({tuple(row) for mask in drawn for row in mask.tolist()}) == 12  # all different
    assert torch.equal(rule.eval()(x).mask, first)


def test_frames_cover_every_sample_and_no_more():
    front = FrameProjection(3, samples=6, hop=4)
    x = torch.randn(1, 60)
    for length, frames in ((0, 0), (1, 1), (6, 1), (7, 2), (10, 2), (11, 3), (60, 15)):
        tokens, mask = front(x, torch.arange(60).unsqueeze(0) >= length)
        assert (~mask).sum() == frames
        if length:
            alone = front(x[:, :length], None)[0]
            torch.testing.assert_close(tokens[:, :frames], alone)


def test_the_first_filter_bank_is_a_power_spectrogram():
    front = FilterBank(7, filters=16, samples=32, hop=16)
    tone = torch.sin(2 * torch.pi * (5.5 / 32) * torch.arange(64)).unsqueeze(0)
    frames = tone.unfold(1, 32, 16) * torch.hann_window(32)
    phase = torch.exp(
        -2j * torch.pi * ((torch.arange(16) + 0.5) / 32).unsqueeze(1) * torch.arange(32)
    )
    power = (frames.to(phase.dtype) @ phase.mT).abs().square() / 32
    assert (power.argmax(-1) == 5).all()
    front.projection = nn.Identity()
    logs = front(tone, None)[0]
    torch.testing.assert_close(logs, ((power + 1e-6).log() + 7) / 4, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_built_or_read_is_refused(refuses):
    front = SymbolEmbedding(8, 9)
    mask = torch.tensor([[False, True, False]])
    refuses(
        ValueError,
        ("window must be at least 1", lambda: SeqBoat(front, 2, window=0)),
        ("key_dim must be even, got 5", lambda: SeqBoat(front, 2, key_dim=5, position="rotary")),
        ("densities has 1 numbers for 4 layers", lambda: SeqBoat(front, 2, densities=[1])),
        ("density must be at most 1", lambda: RuleActivation(1.5)),
        ("needs whole sequences", lambda: RuleActivation(0.5)(torch.zeros(3, 8))),
        ("norm", lambda: SeqBoat(front, 2, norm="rms")),
        ("front must be a SymbolEmbedding", lambda: SeqBoat(FilterBank(8), 2, causal=True)),
        ("hop is 3: at most 2", lambda: FrameProjection(8, 2, 3)),
        ("padding must follow the samples", lambda: FilterBank(8)(torch.zeros(1, 3), mask)),
        ("x must be .batch, samples.", lambda: FilterBank(8)(torch.zeros(1, 3, 2), None)),
    )
