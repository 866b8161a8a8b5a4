"""Published folders with fused projections, and the golden vectors of their reference."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoConfig

from core_gates.attention.head_gate import fuse_q_proj
from core_gates.errors import GatesError
from language.gated.attach import attach_output_gate, output_gates
from language.gated.published import read_published, write_published

GOLDEN = Path(__file__).parents[2] / "golden" / "attention_sequence"
PREFIX = "model.layers.0.self_attn."


def golden(mode):
    with np.load(GOLDEN / f"gated_attn_{mode}.npz") as file:
        arrays = {k: torch.from_numpy(file[k]) for k in file.files if file[k].dtype.kind != "U"}
        return arrays, json.loads(str(file["meta"]))


def publish(folder, mode, *, biased=False, shards=1, dtype=torch.float32, **changes):
    """Write a folder as the reference does, its first layer the golden one."""
    arrays, meta = golden(mode)
    dim, hidden, vocabulary = meta["hidden_size"], 24, 32
    generator = torch.Generator().manual_seed(4)
    state = {k.replace("weight.", PREFIX, 1): v for k, v in arrays.items() if k[:7] == "weight."}
    if biased:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            rows = len(state[f"{PREFIX}{name}.weight"])
            state[f"{PREFIX}{name}.bias"] = torch.randn(rows, generator=generator)
    shapes = {f"mlp.{name}.weight": (hidden, dim) for name in ("gate_proj", "up_proj")}
    shapes |= {"mlp.down_proj.weight": (dim, hidden), "input_layernorm.weight": (dim,)}
    shapes |= {"post_attention_layernorm.weight": (dim,)}
    shapes = {f"model.layers.0.{name}": shape for name, shape in shapes.items()}
    shapes |= {"model.norm.weight": (dim,), "model.embed_tokens.weight": (vocabulary, dim)}
    state |= {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    state["lm_head.weight"] = torch.randn(vocabulary, dim, generator=generator)
    sizes = {"num_attention_heads": meta["num_heads"], "num_key_value_heads": meta["num_kv_heads"]}
    config = {
        **{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": dim},
        **{"head_dim": meta["head_dim"], "num_hidden_layers": 1, "vocab_size": vocabulary},
        **{"intermediate_size": hidden, "rope_theta": meta["rope_theta"], "rms_norm_eps": 1e-6},
        **{"torch_dtype": str(dtype).removeprefix("torch."), "tie_word_embeddings": False},
        **{"max_position_embeddings": 64, "attention_bias": not biased, "qkv_bias": biased},
        **{f"{kind}_attn_output_gate": kind == mode for kind in ("headwise", "elementwise")},
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | sizes | changes))
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    names = sorted(state)
    files = {f"part-{i}.safetensors": names[i::shards] for i in range(shards)}
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return state
    for file, part in files.items():
        save_file({name: state[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return state


@pytest.mark.parametrize("mode", ["elementwise", "headwise"])
def test_a_stock_layer_computes_the_golden_vectors(mode, tmp_path):
    publish(tmp_path / "model", mode)
    model = read_published(tmp_path / "model")
    arrays, meta = golden(mode)
    layer, length = model.model.layers[0].self_attn, arrays["x"].shape[1]
    blocked = torch.full((length, length), float("-inf")).triu(1)
    for implementation, mask in (("sdpa", None), ("eager", blocked[None, None])):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        x = arrays["x"].clone().requires_grad_()
        rotary = (arrays["cos"], arrays["sin"])
        out, _ = layer(hidden_states=x, position_embeddings=rotary, attention_mask=mask)
        assert_close(out, arrays["out"], rtol=1e-5, atol=1e-5)
        out.backward(arrays["grad_out"])
        assert_close(x.grad, arrays["grad_x"], rtol=1e-4, atol=1e-5)
        parts = layer.q_proj.weight.grad, layer.output_gate.weight.grad
        fused = fuse_q_proj(*parts, meta["num_kv_heads"])
        assert_close(fused, arrays["grad.q_proj.weight"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("mode", ["elementwise", "headwise"])
def test_folders_are_written_back_exactly(mode, biased, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    state = publish(source, mode, biased=biased, shards=2, dtype=torch.bfloat16)
    model = read_published(source)
    gate = output_gates(model)["layers.0.self_attn"]
    assert (gate.bias is not None) == biased == model.config.attention_bias
    assert model.dtype == gate.weight.dtype == torch.bfloat16
    assert write_published(model, target) == target
    found = load_file(target / "model.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (source, target)
    )
    same = before.keys() - {"attention_bias", "torch_dtype"}
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    assert after["dtype"] == before["torch_dtype"]
    again = read_published(target, dtype=torch.float32)
    assert torch.equal(again.lm_head.weight, state["lm_head.weight"].float())
    assert AutoConfig.from_pretrained(target).rope_parameters == model.config.rope_parameters


def test_tied_embeddings_and_trained_gates_are_written(tiny, tokens, tmp_path):
    model = tiny("Qwen3", tie_word_embeddings=True)
    attach_output_gate(model, granularity="headwise", bias_init=None)
    write_published(model, tmp_path / "model")
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    with torch.no_grad():
        found = read_published(tmp_path / "model")(tokens).logits
        assert torch.equal(found, model(tokens).logits)


def test_other_folders_and_gates_are_refused(tiny, tmp_path, refuses):
    folders = {name: tmp_path / name for name in ("plain", "kind", "heads", "gone", "cut", "thin")}
    publish(folders["plain"], "headwise", headwise_attn_output_gate=False)
    publish(folders["kind"], "elementwise", headwise_attn_output_gate=True)
    publish(folders["heads"], "headwise", num_attention_heads=6)
    publish(folders["gone"], "headwise", shards=2)
    (folders["gone"] / "part-1.safetensors").unlink()
    publish(folders["cut"], "headwise")
    (folders["cut"] / "config.json").write_text("{")
    state = publish(folders["thin"], "headwise")
    del state["model.norm.weight"]
    save_file(state, folders["thin"] / "model.safetensors")
    llama, opened, qwen = tiny("Llama"), tiny("Qwen3"), tiny("Qwen3")
    attach_output_gate(llama)
    attach_output_gate(opened, activation="silu")
    attach_output_gate(qwen, bias_init=None)
    new = tmp_path / "new"
    refuses(
        GatesError,
        ("'qwen3' without a flag of gates", lambda: read_published(folders["plain"])),
        (r"rows of gates, expected 4 \(headwise\)", lambda: read_published(folders["kind"])),
        ("are not a fused projection of 6 heads", lambda: read_published(folders["heads"])),
        ("part-1.safetensors does not exist", lambda: read_published(folders["gone"])),
        ("config.json cannot be read as JSON", lambda: read_published(folders["cut"])),
        (r"does not fit its config.json: Missing.*norm", lambda: read_published(folders["thin"])),
        ("LlamaForCausalLM with gates of", lambda: write_published(llama, new)),
        ("of activation='silu', bias_init=3.0 has no", lambda: write_published(opened, new)),
        ("plain exists: choose another", lambda: write_published(qwen, folders["plain"])),
    )
    assert not new.exists()
