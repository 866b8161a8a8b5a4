"""SoRA on models of transformers: which layers, files, and a plain LoRA that stock PEFT opens."""

import copy
import json
import math
import warnings
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2Config,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from core_gates.adapters import detach_adapters, rank_gates
from core_gates.errors import GatesError
from language.hf.gate_file import write_known
from language.hf.lora import (
    CONFIG,
    attach_sora,
    base_digest,
    export_lora,
    heads_of,
    load_sora,
    save_sora,
    sora_layers,
)

SIZES = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "initializer_range": 0.3, "max_position_embeddings": 64},
    **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0},
}
BUILT = {
    "BERT": (AutoModelForSequenceClassification, BertConfig, {"num_labels": 3}),
    "Llama": (AutoModelForCausalLM, LlamaConfig, {"num_key_value_heads": 2}),
    "GPT-2": (AutoModelForCausalLM, GPT2Config, {"attn_pdrop": 0.0}),
}
PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
DEAD = 3  # place of the layer whose gates are all zero


def tiny(name, seed=0, **settings):
    kind, config, own = BUILT[name]
    torch.manual_seed(seed)
    return kind.from_config(config(**(SIZES | own | settings))).eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def trained(model, rank=4):
    """Adapters with random factors, half of the gates zero and one layer dead."""
    torch.manual_seed(1)
    layers = attach_sora(model, rank=rank)
    with torch.no_grad():
        for place, layer in enumerate(layers.values()):
            layer.adapter.lora_B.normal_(std=0.3)
            layer.adapter.lora_gate.weight[: rank if place == DEAD else rank // 2] = 0
        for head in heads_of(model):
            for weight in model.get_submodule(head).parameters():
                weight.normal_(std=0.3)
    return model


LAYERS = {
    "BERT": ["attention.self.query", "attention.self.key", "attention.self.value",
             "attention.output.dense", "intermediate.dense", "output.dense"],
    "Llama": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
              "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    "GPT-2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
}  # fmt: skip
ROOTS = {"BERT": "bert.encoder.layer", "Llama": "model.layers", "GPT-2": "transformer.h"}


@pytest.mark.parametrize("name", BUILT)
def test_all_layers_of_the_blocks_are_adapted_and_the_rest_is_frozen(name, tokens):
    model = tiny(name)
    before = logits(model, tokens)
    names = [f"{ROOTS[name]}.{block}.{layer}" for block in (0, 1) for layer in LAYERS[name]]
    assert list(attach_sora(model, rank=3)) == names
    assert {type(layer.base) for layer in sora_layers(model).values()} == {
        Conv1D if name == "GPT-2" else nn.Linear
    }
    assert torch.equal(logits(model, tokens), before)
    heads = ("classifier.", "bert.pooler.") if name == "BERT" else ()
    learn = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learn == {
        n for n, _ in model.named_parameters() if ".adapter." in n or n.startswith(heads)
    }
    assert len(rank_gates(model)) == len(names)
    model(tokens).logits.square().sum().backward()
    assert all(model.get_parameter(n).grad is not None for n in learn)


@PEFT
@pytest.mark.parametrize("name", BUILT)
def test_stock_peft_computes_the_same(name, tokens, tmp_path):
    model = trained(tiny(name))
    ours = logits(model, tokens)
    folder = export_lora(model, tmp_path / "lora")
    config = json.loads((folder / "adapter_config.json").read_text())
    live = [n for place, n in enumerate(sora_layers(model)) if place != DEAD]
    assert config["target_modules"] == live
    assert config["rank_pattern"] == config["alpha_pattern"] == dict.fromkeys(live, 2)
    opened = PeftModel.from_pretrained(tiny(name, seed=0), folder).eval()
    assert_close(logits(opened, tokens), ours, rtol=0, atol=1e-5)
    merged = opened.merge_and_unload()
    assert_close(logits(merged, tokens), ours, rtol=0, atol=1e-5)
    assert type(merged) is type(tiny(name))
    for layer in sora_layers(model).values():
        layer.merge()
    assert_close(logits(detach_adapters(model), tokens), ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BUILT)
def test_a_file_restores_adapters_gates_and_heads(name, tokens, tmp_path):
    model = trained(tiny(name))
    path = save_sora(model, tmp_path / "sora.safetensors")
    assert not any(".base." in key for key in load_file(path))
    other = tiny(name)
    layers = load_sora(other, path)
    assert torch.equal(logits(other, tokens), logits(model, tokens))
    assert list(layers) == list(sora_layers(model))
    learn = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, other)]
    assert learn[0] == learn[1]
    for layer in sora_layers(model).values():
        layer.adapter.prune_()
    again = save_sora(model, tmp_path / "pruned.safetensors")
    load_sora(other, again)
    assert_close(logits(other, tokens), logits(model, tokens), rtol=0, atol=1e-5)
    assert layers[list(layers)[DEAD]].adapter.lora_A.shape[0] == 0


def test_a_compiled_model_is_written_as_what_it_is(tokens, tmp_path):
    model = trained(tiny("BERT"))
    compiled = torch.compile(model, backend="eager")
    load_sora(other := tiny("BERT"), save_sora(compiled, tmp_path / "sora.safetensors"))
    assert torch.equal(logits(other, tokens), logits(model, tokens))
    assert "_orig_mod" not in (export_lora(compiled, tmp_path / "lora") / CONFIG).read_text()


def test_the_digest_is_that_of_the_base(tokens):
    base = base_digest(tiny("BERT"))
    assert base_digest(trained(tiny("BERT"))) == base
    assert base_digest(tiny("BERT", num_labels=5)) == base
    assert base_digest(tiny("BERT").to(torch.bfloat16)) == base
    changed = tiny("BERT")
    changed.bert.encoder.layer[1].output.LayerNorm.weight.data.mul_(1.1)
    others = {base_digest(m) for m in (changed, tiny("BERT", seed=1), tiny("Llama"))}
    assert len(others - {base}) == 3


@pytest.mark.fault("46 neighbors")
@pytest.mark.parametrize("name", ["BERT", "Llama"])
def test_adapters_of_another_token_embedding_are_refused(name, tokens, tmp_path):
    model = trained(tiny(name))
    with torch.no_grad():
        model.get_input_embeddings().weight[tokens[0, 0]] += 1  # one token
    path = save_sora(model, tmp_path / "sora.safetensors")
    base = tiny(name)
    assert base_digest(model) == base_digest(base)
    with pytest.raises(GatesError, match="base model with another embedding: give the base"):
        load_sora(base, path)
    assert not sora_layers(base)
    with pytest.warns(UserWarning, match="has changed since its adapters were attached"):
        export_lora(model, tmp_path / "lora")
    with torch.no_grad():
        base.get_input_embeddings().weight[tokens[0, 0]] += 1
    load_sora(base, path)
    assert torch.equal(logits(base, tokens), logits(model, tokens))
    export_lora(base, tmp_path / "lora")


@pytest.mark.fault("46 neighbors")
def test_a_base_with_further_tokens_is_that_of_its_adapters(tokens, tmp_path):
    path = save_sora(model := trained(tiny("Llama")), tmp_path / "sora.safetensors")
    larger = tiny("Llama")
    larger.resize_token_embeddings(80)
    load_sora(larger, path)
    assert_close(logits(larger, tokens)[..., :64], logits(model, tokens), rtol=0, atol=1e-5)
    path = save_sora(larger, tmp_path / "larger.safetensors")
    with pytest.raises(GatesError, match=r"another embedding and head: .* after it was resized"):
        load_sora(tiny("Llama"), path)


@PEFT
def test_what_does_not_fit_is_refused(tmp_path, refuses, tokens):
    model = trained(tiny("BERT"))
    path = save_sora(model, tmp_path / "sora.safetensors")
    content = path.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    (tmp_path / "flip.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    save_file(load_file(path), tmp_path / "plain.safetensors")
    some = tiny("BERT")
    assert len(attach_sora(some, where="*.query")) == 2
    odd_gate = trained(tiny("GPT-2"))
    rank_gates(odd_gate)[0].data[0] = torch.nan
    dead = tiny("GPT-2")
    for layer in attach_sora(dead).values():
        nn.init.zeros_(layer.adapter.lora_gate.weight)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    bare = tiny("BERT")
    tensors, name = load_file(path), "bert.encoder.layer.0.attention.self.query"
    odd = {
        "layers": [["none"], {}],
        "lora_B": [list(sora_layers(model)), {f"{name}.adapter.lora_B": torch.zeros(32, 3)}],
        "lora_A": [list(sora_layers(model)), {f"{name}.adapter.lora_A": torch.zeros(4, 31)}],
    }
    for what, (layers, changed) in odd.items():
        facts = {"kind": "sora", "base": base_digest(bare)}
        write_known(tmp_path / what, facts, {"layers": layers}, tensors | changed)
    refuses(
        GatesError,
        ("holds adapters of the base model", lambda: load_sora(tiny("BERT", seed=1), path)),
        ("classifier.weight of shape", lambda: load_sora(tiny("BERT", num_labels=2), path)),
        ("12 layers, the model has others on 2", lambda: load_sora(some, path)),
        ("cut.safetensors is damaged", lambda: load_sora(bare, tmp_path / "cut.safetensors")),
        ("flip.safetensors is damaged", lambda: load_sora(bare, tmp_path / "flip.safetensors")),
        ("plain.*is not a file of gates", lambda: load_sora(bare, tmp_path / "plain.safetensors")),
        ("holds adapters of none, no such layer", lambda: load_sora(bare, tmp_path / "layers")),
        (r"query.adapter.lora_B of shape \(32, 3\), the model needs \(32, 4\)",
         lambda: load_sora(bare, tmp_path / "lora_B")),
        (r"lora_A of shape \(4, 31\), the model needs \(4, 32\)",
         lambda: load_sora(bare, tmp_path / "lora_A")),
        ("matches .'none'.*bert.encoder.layer.0", lambda: attach_sora(bare, where=["none"])),
        ("has a SoRA already", lambda: attach_sora(model)),
        ("lm_head shares its weight", lambda: attach_sora(tiny("GPT-2"), where=["*"])),
        ("not a model of transformers", lambda: attach_sora(nn.Linear(2, 2))),
        ("has no SoRA", lambda: export_lora(bare, tmp_path / "lora")),
        ("mine holds 'notes.txt'", lambda: export_lora(model, tmp_path / "mine")),
        ("has no SoRA", lambda: save_sora(tiny("Llama"), tmp_path / "new.safetensors")),
        ("h.0.attn.c_attn is not finite", lambda: export_lora(odd_gate, tmp_path / "lora")),
        ("all gates of 8 layers are zero", lambda: export_lora(dead, tmp_path / "lora")),
        (
            "has adapters of PEFT",
            lambda: attach_sora(get_peft_model(tiny("Llama"), LoraConfig(r=2))),
        ),
    )  # fmt: skip
    refuses(
        ValueError,
        ("rank must be at least 1, got 0", lambda: attach_sora(bare, rank=0)),
        *((f"rank must be a whole number, got {odd!r}", partial(attach_sora, bare, rank=odd))
          for odd in (2.5, True, "8")),
        *((f"alpha must be a finite number, got {odd!r}", partial(attach_sora, bare, alpha=odd))
          for odd in (math.nan, math.inf, "8")),
        ("alpha must be positive, got 0.0", lambda: attach_sora(bare, alpha=0.0)),
    )  # fmt: skip
    assert not (tmp_path / "lora").exists()
    assert (tmp_path / "mine" / "notes.txt").read_text() == "kept"
    assert torch.equal(logits(bare, tokens), logits(tiny("BERT"), tokens))


def test_a_body_alone_and_an_untied_head():
    torch.manual_seed(0)
    body = BertModel(BertConfig(**SIZES))
    assert (heads_of(body), len(attach_sora(body, where=["*"]))) == ([], 13)
    untied = tiny("Llama", tie_word_embeddings=False)
    assert "lm_head" in attach_sora(untied, where=["*"])


def test_a_model_that_asks_its_layers_for_their_type():
    sizes = {"vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model, tokens = T5ForConditionalGeneration(T5Config(**sizes)).eval(), torch.arange(4)[None]
    before = model(input_ids=tokens, decoder_input_ids=tokens).logits
    layers = attach_sora(model, rank=2)
    after = model(input_ids=tokens, decoder_input_ids=tokens).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    for layer in layers.values():
        torch.nn.init.ones_(layer.adapter.lora_B)
    assert not torch.allclose(model(input_ids=tokens, decoder_input_ids=tokens).logits, before)


@pytest.mark.fault("46 A2")
def test_what_save_pretrained_writes_can_be_read_back(tokens, tmp_path):
    model = trained(tiny("BERT"))
    other = copy.deepcopy(model)  # keeps its own adapters
    with torch.no_grad():
        sora_layers(other)[next(iter(sora_layers(other)))].adapter.lora_B.add_(1)
    for name, saved in {"one": model, "other": other}.items():
        with pytest.warns(UserWarning, match=r"from_pretrained cannot open .*load_sora"):
            saved.save_pretrained(tmp_path / name)
        base = tiny("BERT")
        load_sora(base, tmp_path / name / "sora.safetensors")
        assert torch.equal(logits(base, tokens), logits(saved, tokens))
    assert not torch.equal(logits(other, tokens), logits(model, tokens))
    detach_adapters(model)
    with warnings.catch_warnings(action="error"):
        model.save_pretrained(tmp_path / "plain")
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
    assert torch.equal(logits(opened, tokens), logits(model, tokens))
    assert not (tmp_path / "plain" / "sora.safetensors").exists()
