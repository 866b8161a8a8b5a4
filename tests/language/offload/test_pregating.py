"""Pre-gated models: golden vectors, caches, checkpointing, copies, files, experts on disk."""

import copy
import json
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from core_gates import GatesError, StackedExperts, TopKGate, collect_routing
from language import load_offloaded, open_model
from language.decoder import Decoder
from language.hf.classifier import open_classifier
from language.hf.model_folder import read_model, write_model
from language.hf.pregating import level_of, pregate, save_pregated
from language.offload.setup import Setup

GOLDEN = Path(__file__).parents[2] / "golden" / "moe_inference_sora"
MODELS = ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "DeepseekV2", "DeepseekV3", "GptOss")
IDS = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
EXACT = {"rtol": 0, "atol": 1e-9}
AHEAD = Setup(predictor="cross-layer")
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture
def opened(checkpoint, resident):
    """``opened(name)``: one of the tiny models, conventional, in aligned memory."""
    return lambda name="Qwen3Moe": resident(checkpoint(name))


def logits_of(model, ids=IDS, **options):
    with torch.no_grad():
        found = model(ids, **options)
    return getattr(found, "logits", found)


def gradients(model):
    model.train().zero_grad()
    found = model(IDS, labels=IDS, use_cache=False)
    found.loss.backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def tiny_decoder(experts=StackedExperts, gate=TopKGate, **options):
    torch.manual_seed(0)
    sizes = {"num_layers": 4, "num_heads": 4, "hidden_dim": 8, "context": 16} | options
    gate, experts = partial(gate, num_experts=6, k=2), partial(experts, hidden_dim=8)
    model = Decoder(64, 32, qk_norm=True, gate=gate, experts=experts, **sizes).eval()
    for name, one in model.named_parameters():
        if one.ndim > 1 and "embed" not in name:
            torch.nn.init.normal_(one, std=0.2)
    return model


def golden_decoder(golden):
    """The golden stack: attention adds nothing, and token t is row t of the first input."""
    layers, count, hidden, dim = golden["w_in"].shape
    k, renormalize = golden["top_k"].item(), bool(golden["norm_topk_prob"])
    model = Decoder(
        len(golden["x0"]), dim, layers, 1, head_dim=2, hidden_dim=hidden, context=99,
        gate=partial(TopKGate, num_experts=count, k=k, renormalize=renormalize),
        experts=partial(StackedExperts, hidden_dim=hidden, gated=False,
                        activation=str(golden["activation"])),
        dtype=torch.float64,
    )  # fmt: skip
    model.model["embed_tokens"].weight.data = torch.from_numpy(golden["x0"])
    for number, block in enumerate(model.blocks):
        block.self_attn.o_proj.weight.data.zero_()
        block.post_attention_layernorm.weight.data = torch.from_numpy(golden["norm_weight"][number])
        block.mlp.gate.weight.data = torch.from_numpy(golden["router_weight"][number])
        block.mlp.experts.up_proj.data = torch.from_numpy(golden["w_in"][number])
        block.mlp.experts.down_proj.data = torch.from_numpy(golden["w_out"][number])
    return model


@pytest.mark.parametrize("name", ["pregated_top1", "pregated_top2"])
def test_golden_stacks(name):
    golden = np.load(GOLDEN / f"{name}.npz")
    model = golden_decoder(golden)
    for mode in ("conventional", "pregated"):
        if mode == "pregated":
            pregate(model, golden["level"].item())
        hidden = []
        hooks = [
            block.register_forward_hook(lambda _, __, out, into=hidden: into.append(out[0]))
            for block in model.blocks
        ]
        with collect_routing(model) as routings, torch.no_grad():
            model(torch.arange(len(golden["x0"]))[None])
        for hook in hooks:
            hook.remove()
        found = [one for ran in routings.values() for one in ran]
        for number, (state, routing) in enumerate(zip(hidden, found, strict=True)):
            k = routing.indices.shape[-1]
            chosen = torch.from_numpy(golden[f"{mode}_topk_index"][number])
            weights = torch.from_numpy(golden[f"{mode}_topk_weight"][number])
            assert torch.equal(routing.indices.reshape(-1, k), chosen)
            assert_close(routing.weights.reshape(-1, k), weights, **EXACT)
            assert_close(state, torch.from_numpy(golden[f"{mode}_hidden"][number]), **EXACT)


@pytest.mark.parametrize("name", MODELS)
def test_tokens_one_by_one_equal_all_at_once_and_copies_equal_models(name, opened):
    model = opened(name)
    names, conventional = list(model.state_dict()), logits_of(model)
    pregate(model)
    whole = logits_of(model)
    assert list(model.state_dict()) == names
    assert (whole - conventional).abs().max() > 0.1
    cache, found = None, []
    for ids in IDS.split([5, 1, 1, 1, 1], 1):
        with torch.no_grad():
            out = model(ids, cache=cache, use_cache=True)
        cache = out.cache
        found.append(out.logits)
    assert_close(torch.cat(found, 1), whole, **CLOSE)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits_of(again), whole)


@pytest.mark.parametrize("level", [1, 2])
def test_our_decoder_is_pre_gated_as_the_model_of_transformers_that_it_is_written_as(
    level, tmp_path
):
    ours = tiny_decoder(moe_every=1)
    names = list(ours.state_dict())
    pregate(ours, level)
    write_model(tmp_path / "model", ours, None)
    again, _ = read_model(tmp_path / "model")
    assert list(again.state_dict()) == names
    assert level_of(again) == level_of(ours) == level
    assert torch.equal(logits_of(again), logits_of(ours))
    assert_close(logits_of(open_model(tmp_path / "model")), logits_of(ours), **CLOSE)


def test_dense_layers_between_pass_on_what_gates_read():
    model = tiny_decoder(moe_every=2)
    pregate(model)
    first, second = (model.blocks[number].mlp for number in (1, 3))
    read = []
    for mixture in (first, second):
        mixture.register_forward_pre_hook(lambda _, args: read.append(args[0]))
        mixture.gate.register_forward_hook(lambda _, args, __: read.append(args[0]))
    logits_of(model)
    assert_close((read[1], read[3]), (read[0], read[0]), rtol=0, atol=0)
    assert not torch.equal(read[3], read[2])


@pytest.mark.parametrize("name", ["Qwen3Moe", "DeepseekV3"])
def test_checkpointing_changes_no_gradient_or_is_refused(name, opened, refuses):
    model = opened(name)
    pregate(model)
    plain = {n: g.clone() for n, g in gradients(model).items()}
    model.activation_checkpointing_enable({"use_reentrant": False})
    found = gradients(model)
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    for every in (1, 3):  # the last: the first block alone
        model.activation_checkpointing_enable({"use_reentrant": True}, every)
        with pytest.raises(GatesError, match=r"are wrong with re-entrant .*use_reentrant=False$"):
            gradients(model)
    model.activation_checkpointing_disable()
    again = gradients(copy.deepcopy(model))
    assert all(torch.equal(again[name], plain[name]) for name in plain)


def test_our_decoder_checkpoints_its_activations():
    found = []
    for checkpointing in (False, True):
        model = tiny_decoder(checkpointing=checkpointing)
        pregate(model, 2)
        model(IDS).logsumexp(-1).sum().backward()
        found.append([one.grad for one in model.parameters()])
    assert all(map(torch.equal, *found))

    def again(block, x, *others):
        return checkpoint(block.again, x, *others, use_reentrant=True)

    for block in model.blocks:
        block.again, block.forward = block.forward, partial(again, block)
    with pytest.raises(GatesError, match="read is lost: checkpoint activations with"):
        model(IDS).logsumexp(-1).sum().backward()


def test_nothing_stays_after_an_error(opened):
    model = opened()
    pregate(model)
    expected = logits_of(model)

    def interrupt(*_):
        raise KeyboardInterrupt

    for place in ("mlp.gate", "mlp.experts", "self_attn"):
        hook = model.model.layers[1].get_submodule(place).register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(IDS)
        hook.remove()
        assert all(block.earlier_inputs.inputs is None for block in model.model.layers)
        assert torch.equal(logits_of(copy.deepcopy(model)), expected)
    assert torch.equal(logits_of(model), expected)


def test_a_folder_says_what_it_is(opened, tmp_path, refuses):
    model = opened()
    refuses(GatesError, ("is not pre-gated: call pregate", lambda: save_pregated(model, tmp_path)))
    conventional = logits_of(model)
    pregate(model, 2)
    model.config.pad_token_id = 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    line = "mine holds 'config.json', which is no older output"
    refuses(GatesError, (line, lambda: save_pregated(model, tmp_path / "mine")))
    assert (tmp_path / "mine" / "config.json").read_text() == "{}"
    for _ in range(2):  # an older output is replaced
        save_pregated(model, folder := tmp_path / "pregated")
    assert json.loads((folder / "config.json").read_text())["pregate_level"] == 2
    assert "as a conventional model" in (folder / "README.md").read_text()
    stock = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    assert_close(logits_of(stock), conventional, **CLOSE)
    assert_close(logits_of(open_model(folder)), logits_of(model), **CLOSE)
    classifier = open_classifier(folder, 2)
    assert [block.earlier_inputs.level for block in classifier.model.layers] == [2, 2, 2]
    for mark, line in ((7, "level is 7, but"), ("one", "level is 'one', but .* give 1 to 2$")):
        config = json.loads((folder / "config.json").read_text()) | {"pregate_level": mark}
        (folder / "config.json").write_text(json.dumps(config))
        refuses(GatesError, (line, lambda: open_model(folder)))


def test_bad_inputs_are_one_line(opened, refuses):
    model = opened()
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1}
    dense = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
    refuses(
        GatesError,
        ("level is 3, but Qwen3MoeForCausalLM has 3 layers of experts", lambda: pregate(model, 3)),
        ("level is 0, .* give 1 to 2$", lambda: pregate(model, 0)),
        ("level is 1.0, .* give 1 to 2$", lambda: pregate(model, 1.0)),
        ("LlamaForCausalLM has no layers whose gate", lambda: pregate(dense)),
        ("Linear has no layers whose gate", lambda: pregate(torch.nn.Linear(2, 2))),
    )
    pregate(model)
    refuses(
        GatesError,
        ("is pre-gated already", lambda: pregate(model)),
        (
            "what gates of earlier layers have read is lost",
            lambda: model.model.layers[1](torch.zeros(1, 2, 32), position_embeddings=None),
        ),
    )


@pytest.mark.parametrize("level", [1, 2])
def test_pre_gated_models_run_with_experts_on_disk(level, opened, tmp_path):
    model = opened()
    pregate(model, level)
    save_pregated(model, tmp_path / "model")
    offloaded = load_offloaded(tmp_path / "model", budget=0.5)
    assert torch.equal(logits_of(offloaded), logits_of(model))
    offloaded.offload.close()


@pytest.mark.parametrize(("name", "level"), [("Qwen3Moe", 1), ("DeepseekV3", 1), ("Mixtral", 2)])
def test_no_expert_is_fetched_that_is_not_used(name, level, opened, tmp_path, monkeypatch):
    model = opened(name)
    pregate(model, level)
    save_pregated(model, tmp_path / "model")
    loaded = load_offloaded(tmp_path / "model", budget=0.5, setup=AHEAD)
    offload, cache, demanded = loaded.offload, None, []
    request = offload.transfers.request

    def note(transfer):
        demanded.extend([] if transfer.guessed else [transfer.layer])
        request(transfer)

    monkeypatch.setattr(offload.transfers, "request", note)
    for ids in IDS[:1].split(1, 1):
        with torch.no_grad():
            cache = loaded(ids, cache=cache, use_cache=True).cache
        assert level > 1 or offload.counts.guesses == offload.counts.guessed
    offload.close()
    assert set(demanded) == set(range(level))  # layers that are not routed early
    assert offload.counts.guessed > 9
