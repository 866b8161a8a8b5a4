"""A decoder that learns to read few blocks: what it reads, and what learns by which loss."""

import warnings
from functools import partial

import lightning as L
import pytest
import torch
from torch.nn import functional as F

from core_gates import GatesError, collect_routing
from core_gates.ops.block_sparse_attention import reference
from core_gates.routing.collect import update_gates
from language.decoder import Decoder
from language.hf.model_folder import write_model
from language.module import LanguageModule, losses_of_gates
from language.seer import sparse_decoder
from language.seer.sparse_decoder import READINGS, SparseDecoder

SIZES = {
    **{"vocab_size": 64, "dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2},
    **{"hidden_dim": 48, "context": 40, "qk_norm": True, "tie_embeddings": True},
}
BLOCKS = {"block_size": 4, "blocks": 3, "allow_leak": True}


def build(kind=SparseDecoder, **options):
    torch.manual_seed(0)
    model = kind(**SIZES, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" not in name and parameter.ndim > 1:
                parameter.mul_(8)
    return model


def tokens(length=40, rows=2):
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def masks(monkeypatch):
    """The blocks that are read, a map for each layer that is called, and what they lead to."""
    seen, attend = [], sparse_decoder.block_sparse_attention

    def watched(q, k, v, mask, size):
        out = attend(q, k, v, mask, size)
        expected, _ = reference.forward(q, k, v, mask, size, True, q.shape[-1] ** -0.5)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        seen.append(mask)
        return out

    monkeypatch.setattr(sparse_decoder, "block_sparse_attention", watched)
    return seen


def test_until_then_it_is_the_dense_decoder(masks):
    dense, sparse = build(Decoder), build(**BLOCKS, dense_steps=1)
    state = sparse.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in dense.state_dict().items())
    x = tokens()
    torch.testing.assert_close(sparse(x), dense(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sparse.eval()(x), dense(x), rtol=1e-5, atol=1e-5)
    assert not masks


def test_then_a_row_reads_so_many_blocks_and_no_more(masks):
    model = build(**BLOCKS, dense_steps=1)
    model(tokens())
    assert not masks
    update_gates(model)
    for training in (True, False):
        masks.clear()
        model.train(training)(tokens())
        assert len(masks) == 2
        for mask in masks:
            counts = mask.sum(-1)
            assert counts.tolist() == torch.arange(1, 11).clamp(max=3).expand_as(counts).tolist()
            assert mask[..., 0].all()
            assert mask.diagonal(dim1=-2, dim2=-1).all()
    middle = masks[0][:, :, 9, 1:9].int()
    assert (middle != middle[:1, :1]).any()  # heads and texts differ


def test_a_block_that_no_head_reads_is_not_read():
    model = build(**BLOCKS)
    model.blocks[1].self_attn.attend.reading = "sink-window"
    attention, x = model.blocks[1].self_attn.eval(), torch.randn(1, 40, 32)
    moved = x.clone()
    moved[:, 4:8] += 1  # the second block, which the rows of the last ones do not read
    difference = (attention(x) - attention(moved)).abs().amax(-1)[0]
    assert (difference[4:8] > 1e-3).all()
    assert difference[16:].max() == 0


def test_gates_learn_by_their_loss_alone_and_nothing_else_does():
    for dense_steps in (0, 1):
        model, x = build(**BLOCKS, dense_steps=dense_steps), tokens()
        with collect_routing(model) as routings:
            logits = model(x)
        assert len(routings) == 2
        loss = losses_of_gates(routings, {"blocks": 1.0})["blocks"]
        assert loss > 0
        named = dict(model.named_parameters())
        found = torch.autograd.grad(loss, [*named.values()], allow_unused=True, retain_graph=True)
        grads = dict(zip(named, found, strict=True))
        assert all(grad.abs().max() > 0 for n, grad in grads.items() if "attend" in n)
        assert {n for n, grad in grads.items() if grad is not None} == {
            n for n in named if "attend" in n
        }
        nats = F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        found = torch.autograd.grad(nats, [*named.values()], allow_unused=True)
        grads = dict(zip(named, found, strict=True))
        assert {n for n, grad in grads.items() if grad is None} == {
            n for n in named if "attend" in n
        }


def test_gradients_of_what_is_read_are_those_of_masked_attention(masks):
    model = build(**BLOCKS).double()
    attention, x = model.blocks[0].self_attn, torch.randn(1, 24, 32, dtype=torch.float64)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(attention(x).square().sum(), x)
    (mask,) = masks
    kept = mask.repeat_interleave(4, -1).repeat_interleave(4, -2) & torch.ones(24, 24).tril().bool()
    attention.attend, whole = None, attention._attend
    attention._attend = lambda q, k, v, _: whole(q, k, v, kept)
    (expected,) = torch.autograd.grad(attention(x).square().sum(), x)
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gates_come_closer_to_attention(precision):
    model = build(**BLOCKS, dense_steps=10)
    module = LanguageModule(model, 3e-3, warmup_steps=2, losses={"blocks": 1.0})
    rows = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            rows.append(float(trainer.callback_metrics["train/blocks"]))

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "callbacks": [Watch()]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders
        trainer = L.Trainer(max_steps=20, precision=precision, **quiet)
        trainer.fit(module, torch.utils.data.DataLoader([tokens(41)] * 20, batch_size=None))
    assert sum(rows[7:10]) < 0.97 * sum(rows[:3])
    assert int(model.blocks[1].self_attn.attend.routing.step) == 20
    assert torch.isfinite(torch.tensor(rows)).all()


def test_padding_and_what_follows_in_a_cache_read_everything(masks):
    dense, sparse = build(Decoder).eval(), build(**BLOCKS).eval()
    dense.load_state_dict({n: x for n, x in sparse.state_dict().items() if "attend" not in n})
    x, padding = tokens(), torch.zeros(2, 40, dtype=torch.bool)
    padding[1, 30:] = True
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    close(sparse(x, padding_mask=padding), dense(x, padding_mask=padding))
    assert not masks
    caches = sparse.caches()
    sparse(x[:, :20], caches=caches)
    assert len(masks) == 2  # the prompt is read by blocks
    sparse(x[:, 20:], caches=caches)
    sparse(x[:, :1], caches=caches)
    assert len(masks) == 2


def test_every_reading_but_that_of_all_reads_as_much(masks):
    model, x = build(**BLOCKS).eval(), tokens()
    outputs = {}
    for name in READINGS:
        for block in model.blocks:
            block.self_attn.attend.reading = name
        outputs[name] = model(x)
    assert len(masks) == 6
    assert {int(mask.sum()) for mask in masks} == {2 * 4 * (1 + 2 + 8 * 3)}
    window = masks[2][0, 0]
    assert window[9].nonzero().flatten().tolist() == [0, 8, 9]
    plain = build(Decoder).eval()
    torch.testing.assert_close(outputs["all"], plain(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        outputs["gate"][:, :12], outputs["all"][:, :12], rtol=1e-5, atol=1e-5
    )


def test_it_begins_with_the_weights_of_a_folder(tmp_path, refuses):
    torch.manual_seed(7)
    trained = Decoder(**SIZES)
    write_model(tmp_path / "model", trained, None)
    model = SparseDecoder(**SIZES, **BLOCKS, start=str(tmp_path / "model"))
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in trained.state_dict().items())
    line = "^no family of transformers has gates at blocks of attention: keep"
    refuses(GatesError, (line, lambda: write_model(tmp_path / "sparse", model, None)))


def test_what_does_not_fit_is_refused(refuses):
    def wrong(**options):
        return lambda: build(**{**BLOCKS, **options})

    refuses(
        ValueError,
        ("later tokens, as .*routing .*allow_leak=True$", wrong(allow_leak=False)),
        ("^sinks=1 and recent=1 are 1 more than the blocks of k=1", wrong(blocks=1)),
        ("^block_size must be", wrong(block_size=0)),
    )
