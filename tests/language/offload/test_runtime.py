"""Offloaded models against the same models in memory, bit for bit, through faults and cancels."""

import copy
import functools
import gc
import json
import shutil
import threading

import pytest
import torch
import transformers
from torch.testing import assert_close

from core_gates import GatesError
from language import attach_offload, load_offloaded
from language.offload.allocation import ALLOCATIONS
from language.offload.caches import POLICIES
from language.offload.expert_store import ExpertStore
from language.offload.guesses import Profile, last_tokens

E, K, LAYERS = 6, 2, 3
MODELS = ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "DeepseekV2", "DeepseekV3", "GptOss")
PROFILE = Profile(
    torch.tensor([[0, 1], [0, 2]]).expand(LAYERS, -1, -1), last_tokens(torch.arange(2))
)
IDS = torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(1))


def logits_of(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def tokens_of(model):
    return model.generate(IDS, max_new_tokens=5, do_sample=False)


@pytest.fixture
def load(checkpoint, offloaded):
    """``load(**options)``: the tiny Qwen3-MoE with k slots a layer, closed after the test."""
    return lambda folder=None, **options: offloaded(
        folder or checkpoint(), **({"budget": K / E} | options)
    )


@pytest.fixture(scope="module")
def expected(checkpoint, resident):
    return logits_of(resident(checkpoint()))


def check_pool(offload):
    """Each slot has one owner, each cache knows its slots, each slab holds its expert."""
    owned = [slot for layer in offload.layers for slot in layer.slots] + offload.guesses.free
    owned += [transfer.slot for transfer in offload.guesses.staged.values()]
    assert sorted(owned) == list(range(len(offload.pool.slabs)))
    taken = [transfer.slot for layer in offload.layers for transfer in layer.loads.values()]
    assert len(taken) == len(set(taken))
    for layer in offload.layers:
        assert layer.cache.resident == layer.loads.keys()
        for expert, transfer in layer.loads.items():
            assert transfer.slot in layer.slots
            assert (transfer.layer, transfer.expert) == (layer.index, expert)
            assert transfer.exception(timeout=5) is None
            read = memoryview(bytearray(offload.store.slab_bytes))
            offload.store.read_into(layer.index, expert, read)
            for tensor in offload.store.tensors[layer.index].values():
                slab = tensor.of(offload.pool.slabs[transfer.slot])
                assert slab.data_ptr() % 64 == 0
                assert torch.equal(slab, tensor.of(torch.frombuffer(read, dtype=torch.uint8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_models_equal_those_in_memory(name, dtype, checkpoint, resident, load):
    folder = checkpoint(name, dtype, fused=(dtype == torch.bfloat16) != (name == "Mixtral"))
    whole, model = resident(folder), load(folder)
    assert (model.dtype, model.training) == (dtype, False)
    assert torch.equal(logits_of(model), logits_of(whole))
    assert torch.equal(tokens_of(model), tokens_of(whole))
    check_pool(model.offload)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"belady"}))
def test_no_policy_changes_what_is_computed(policy, allocation, load, expected):
    profile = PROFILE if policy == "static" else None
    model = load(budget=0.5, policy=policy, allocation=allocation, profile=profile)
    assert_close((logits_of(model), logits_of(model)), (expected, expected), rtol=0, atol=0)
    check_pool(model.offload)


def test_all_experts_are_read_once_where_there_is_room(load, expected, checkpoint):
    model = load(checkpoint(fused=True), budget=1.0)
    for _ in range(3):
        assert torch.equal(logits_of(model), expected)
    counts, store = model.offload.counts, model.offload.store
    assert counts.loads <= LAYERS * E
    whole = (counts.loads * store.slab_bytes, 2 * counts.loads, 0)
    assert (counts.bytes, counts.hits, counts.late) == whole
    assert store.nbytes == LAYERS * E * 3 * 32 * 24 * 4


def test_a_model_in_memory_gives_up_its_experts(checkpoint, resident, expected):
    model = resident(checkpoint())
    before = sum(one.numel() for one in model.parameters())
    offload = attach_offload(model, checkpoint(fused=True), budget=K * LAYERS * 9216)
    assert before - sum(one.numel() for one in model.parameters()) == offload.store.nbytes // 4
    assert len(offload.pool.slabs) == K * LAYERS
    assert torch.equal(logits_of(model), expected)
    offload.close()


def test_a_failing_store_is_one_error_and_the_next_call_is_right(
    refuses, load, expected, monkeypatch
):
    model = load()
    store, thread = model.offload.store, model.offload.transfers.thread
    read = store.read_into

    def fail(layer, expert, slab):
        if (layer, expert) == (1, 3):
            raise OSError("no such device")
        read(layer, expert, slab)

    monkeypatch.setattr(store, "read_into", fail)
    line = r"^expert 3 of model\.layers\.1\.mlp\.experts cannot be read: no such device$"
    for _ in range(2):
        refuses(GatesError, (line, lambda: logits_of(model)))
    monkeypatch.setattr(store, "read_into", read)
    assert torch.equal(logits_of(model), expected)
    check_pool(model.offload)
    assert thread.is_alive()


def test_a_stalled_store_is_one_error_and_the_next_call_is_right(
    refuses, load, expected, monkeypatch
):
    model = load(patience=0.05)
    store, stall = model.offload.store, threading.Event()
    read = store.read_into

    def wait(layer, expert, slab):
        if (layer, expert) == (1, 3):
            stall.wait()
        read(layer, expert, slab)

    monkeypatch.setattr(store, "read_into", wait)
    line = r"^expert 3 of model\.layers\.1\.mlp\.experts has not arrived in 0\.05 seconds"
    for _ in range(2):
        refuses(GatesError, (line, lambda: logits_of(model)))
    stall.set()
    model.offload.transfers.patience = 5
    assert torch.equal(logits_of(model), expected)
    check_pool(model.offload)


def test_the_thread_ends_with_the_model(checkpoint):
    model = load_offloaded(checkpoint(), budget=1.0)
    thread = model.offload.transfers.thread
    del model
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


@pytest.fixture
def damaged(checkpoint, tmp_path):
    """``damaged(change)``: a copy of a checkpoint after ``change(folder)``."""

    def make(change, **options):
        folder = tmp_path / change.__name__
        shutil.copytree(checkpoint(**options), folder)
        change(folder)
        return folder

    return make


def shard_with(folder, part):
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return folder / next(shard for key, shard in names.items() if part in key)


def cut(folder):
    path = shard_with(folder, "experts.5.down_proj")
    path.write_bytes(path.read_bytes()[:-8])


def empty(folder):
    shard_with(folder, "experts.5.down_proj").write_bytes(b"")


def without_shard(folder):
    shard_with(folder, "experts.5.down_proj").unlink()


def without_expert(folder):
    rename(folder, b"layers.1.mlp.experts.4.up_proj", b"layers.1.mlp.experts.9.up_proj")


def without_norm(folder):
    rename(folder, b"model.norm.weight", b"model.mmrn.weight")


def rename(folder, old, new):
    for path in folder.glob("*.safetensors"):
        path.write_bytes(path.read_bytes().replace(old, new))


def without_bias(folder):
    rename(folder, b"e_score_correction_bias", b"e_score_correction_bios")


def other_dtype(folder):
    set_config(folder, dtype="float16")


def wider(folder):
    set_config(folder, vocab_size=65)


def fewer(folder):
    set_config(folder, num_hidden_layers=LAYERS - 1)


def quantized(folder):
    set_config(folder, quantization_config={"quant_method": "fp8"})


def bare(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()


def other_json(folder):
    (folder / "model.safetensors.index.json").write_text("[]")


def odd_header(folder):
    shard_with(folder, "experts.5.down_proj").write_bytes(
        (8).to_bytes(8, "little") + b'{"a": 1}' * 2
    )


def moved(folder):
    """An expert begins where another one is: stock safetensors refuses it, too."""
    shard = shard_with(folder, "experts.5.down_proj")
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    one = next(v for k, v in header.items() if "experts.5.down_proj" in k)
    one["data_offsets"] = [place - 64 for place in one["data_offsets"]]
    changed = json.dumps(header).encode()
    shard.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + length :])


def odd_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')


def odd_generation(folder):
    (folder / "generation_config.json").write_text("{")


def set_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_bad_folders_are_one_line(damaged, refuses, load):
    expert = r"lacks model\.layers\.1\.mlp\.experts\.4\.up_proj\.weight: copy"
    lines = {
        cut: r"\.safetensors is missing, truncated or no safetensors file \(.*\): copy it again",
        empty: "is missing, truncated or no safetensors file",
        without_shard: r"-00001-of-00005\.safetensors is missing, truncated or no safetensors file",
        without_expert: expert,
        without_norm: r"lacks model\.norm\.weight",
        other_dtype: "as torch.float32 .*the model needs torch.float16",
        fewer: r"has model\.layers\.2\.mlp\.experts\.\d\..*_proj\.weight, which its config.json",
        wider: r"\(64, 32\), but its config\.json needs \(65, 32\)",
        quantized: "is quantized: give the checkpoint in bfloat16 or float32",
        other_json: "index.json names no shards: copy it again",
        odd_header: "is missing, truncated or no safetensors file",
        odd_index: "index.json names no shards: copy it again",
        moved: r"invalid offset for tensor `model\.layers\.\d\.mlp\.experts\.5\.down_proj",
        odd_generation: "holds no model that continues text",
        bare: r"has no \*\.safetensors",
    }
    for change, line in lines.items():
        refuses(GatesError, (line, functools.partial(load, damaged(change))))
    folder = damaged(without_bias, name="DeepseekV3")
    lacks = r"lacks model\.layers\.1\.mlp\.gate\.e_score_correction_bias"
    refuses(GatesError, (lacks, functools.partial(load, folder)))


def test_bad_inputs_are_one_line(checkpoint, load, refuses, tmp_path):
    folder = checkpoint()
    dense = transformers.LlamaConfig(
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24},
        **{"num_hidden_layers": 1, "num_attention_heads": 4},
    )
    switch = transformers.SwitchTransformersConfig(
        **{"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_heads": 2},
        **{"num_layers": 2, "num_decoder_layers": 2, "num_experts": 2},
    )
    plain = transformers.LlamaForCausalLM(dense)
    sparse = transformers.SwitchTransformersForConditionalGeneration(switch)
    plain.save_pretrained(tmp_path / "llama")
    sparse.save_pretrained(tmp_path / "switch")
    model, closed, eager = load(), load_offloaded(folder, budget=1.0), load()
    closed.offload.close()
    eager(IDS)
    eager.set_experts_implementation("eager")
    grouped, batched = load(), load(budget=1.0, predictor="cross-layer")
    grouped.set_experts_implementation("grouped_mm")
    batched.set_experts_implementation("batched_mm")
    embedded = model.get_input_embeddings()(IDS).requires_grad_()
    changed = transformers.AutoModelForCausalLM.from_pretrained(folder)
    changed.model.layers[1].mlp.experts.down_proj.data = (
        changed.model.layers[1].mlp.experts.down_proj + 1e-3
    )
    short, wide = (PROFILE._replace(routed=one) for one in (PROFILE.routed[:1], PROFILE.routed * 3))
    none = "has no experts that transformers runs by name"
    refuses(
        GatesError,
        (r"holds 5 experts of 9,216 bytes.* at least 55,296 bytes$", lambda: load(budget=55_295)),
        (r"at least 55,296 bytes$", lambda: load(budget=0.0)),
        ("the budget is 1.5, expected bytes, or a fraction", lambda: load(budget=1.5)),
        ("the budget is -1, expected bytes, or a fraction", lambda: load(budget=-1)),
        ("the budget is nan", lambda: load(budget=float("nan"))),
        ("the budget is '0.25', expected bytes, or a", lambda: load(budget="0.25")),
        ("the budget is None, expected bytes, or a", lambda: load(budget=None)),
        ("the budget is True, expected bytes, or a", lambda: load(budget=True)),
        ("there are no tokens to compute", lambda: model.generate(IDS[:, :0], max_new_tokens=2)),
        ("only the function 'offloaded' reads experts that stay in a", lambda: eager(IDS)),
        ("in a folder, not 'grouped_mm': call model.set_experts_", lambda: logits_of(grouped)),
        ("in a folder, not 'batched_mm': call model.set_experts_", lambda: logits_of(batched)),
        (f"^LlamaForCausalLM {none}", lambda: attach_offload(plain, folder, budget=1.0)),
        (none, lambda: attach_offload(sparse, folder, budget=1.0)),
        (none, lambda: load(tmp_path / "llama")),
        ("holds no model that continues text", lambda: load(tmp_path / "switch")),
        ("nothing holds no config.json: give the folder", lambda: load(tmp_path / "nothing")),
        (
            "has other weights than the model for expert 0 of model.layers.1.mlp.experts: save the",
            lambda: attach_offload(changed, folder, budget=1.0),
        ),
        ("are offloaded already", lambda: attach_offload(model, folder, budget=1.0)),
        ("profile has 1 layers and expert 2, the model 3 of 6", lambda: load(profile=short)),
        ("profile has 3 layers and expert 6, the model 3 of 6", lambda: load(profile=wide)),
        ("policy 'static' needs a trace", lambda: load(policy="static")),
        ("is in a closed store: load the model again", lambda: logits_of(closed)),
        ("have no gradients", lambda: model(inputs_embeds=embedded)),
        ("cannot be copied", lambda: copy.deepcopy(model)),
        ("cannot be copied", lambda: torch.save(batched, tmp_path / "model.pt")),
        ("device is 'foo', expected 'cpu' or 'cuda'", lambda: load(device="foo")),
        ("device is 'mps', expected", lambda: load(device="mps")),
        ("tokens are torch.float16, experts torch.float32", lambda: logits_of(load().half())),
        ("copy this folder instead", lambda: model.state_dict()),
    )


def test_what_is_not_there_is_one_line(load, refuses, monkeypatch, absent):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refuses(GatesError, ("PyTorch finds no GPU here", lambda: load(device="cuda")))
    absent("accelerate")
    refuses(GatesError, (r"needs accelerate: pip install 'gatesuite\[pretrained\]'$", load))


@pytest.mark.fault("46 O2")
def test_a_model_of_which_one_expert_was_fine_tuned_is_refused(checkpoint, refuses, monkeypatch):
    for name, parameter in (("Qwen3Moe", "gate_up_proj"), ("GptOss", "down_proj_bias")):
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype="auto")
        experts = model.model.layers[-1].mlp.experts
        getattr(experts, parameter).data[-1].flatten()[-1] += 1e-3
        attach = functools.partial(attach_offload, model, checkpoint(name), budget=1.0)
        line = f"for expert {E - 1} of model.layers.{LAYERS - 1}.mlp.experts: save the model"
        refuses(GatesError, (f"has other weights than the model {line}", attach))
        getattr(experts, parameter).data[-1].flatten()[-1] -= 1e-3
    monkeypatch.setattr(ExpertStore, "read_into", None)
    load_offloaded(checkpoint(), budget=1.0).offload.close()  # on the meta device: not compared


@pytest.mark.fault("46 shard")
def test_a_shard_that_is_rewritten_while_it_is_open_is_named(checkpoint, load, refuses, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint(), folder)
    model, span = load(folder), None
    logits_of(model)
    for layer in model.offload.store._spans:
        for expert in layer:
            for _, span in expert:
                span.path.write_bytes(span.path.read_bytes())  # as long as it was
    line = r"^expert \d of .*\.safetensors was changed while it was open: load the model again$"
    refuses(GatesError, (line, lambda: logits_of(model)), (line, lambda: logits_of(model)))
    assert torch.equal(logits_of(load(folder)), logits_of(load(checkpoint())))


@pytest.mark.slow
@pytest.mark.fault("46 O4")
@pytest.mark.filterwarnings("ignore:.*script_method.* is deprecated:DeprecationWarning")  # inductor
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_model_computes_what_it_computed(backend, load, expected):
    model, seen = load(budget=0.7, predictor="ngram", profile=PROFILE), []
    model.offload.observers.append(lambda _, one: seen.append(one.tokens))
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        found = compiled(IDS).logits
        if backend == "eager":
            assert torch.equal(found, expected)
        assert_close(found, expected)  # inductor rounds attention and norms otherwise
        assert torch.equal(seen[-1], last_tokens(IDS).flatten(0, 1))
        compiled(IDS, attention_mask=mask)
    assert model.offload.guesses.padding.tolist() == (mask.flatten() == 0).tolist()
    assert model.offload.counts.guessed > 0
