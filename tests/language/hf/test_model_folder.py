"""Folders of models, exchanged with transformers in both directions."""

import json
import runpy
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from core_gates import GatesError, SigmoidGate, StackedExperts, TopKGate
from language.decoder import Decoder
from language.hf.model_folder import read_model, write_model
from language.tokenizer import ByteTokenizer

MADE = runpy.run_path(str(Path(__file__).parents[2] / "fixtures" / "published_decoders.py"))
ours, theirs, tokens, relative_gap = (
    MADE[name] for name in ("ours", "theirs", "tokens", "relative_gap")
)
CASES = [
    ("Llama", {}, {}),
    ("Llama", {"tie_word_embeddings": True}, {"tie_embeddings": True}),
    ("Qwen3", {}, {}),
    ("Mixtral", {}, {}),
    ("Qwen3Moe", {}, {}),
    ("Qwen3Moe", {"decoder_sparse_step": 2}, {"moe_every": 2}),
    (
        "Qwen3Moe",
        {"norm_topk_prob": False},
        {"gate": partial(TopKGate, num_experts=4, k=2, renormalize=False)},
    ),
]


def logits(model):
    with torch.inference_mode():
        found = model(tokens())
    return found if isinstance(found, torch.Tensor) else found.logits


def filled(family, **settings):
    """Return a decoder with large weights."""
    torch.manual_seed(3)
    model = ours(family, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2).add_(parameter.ndim == 1)
    return model


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folders of a dense model and of one with experts, not to be changed."""
    folders = {}
    for family in ("Llama", "Mixtral", "Qwen3Moe"):
        folders[family] = tmp_path_factory.mktemp("models") / family
        write_model(folders[family], filled(family), ByteTokenizer())
    return folders


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize(("family", "settings", "own"), CASES)
def test_folders_of_transformers_are_read(family, settings, own, shard, tmp_path):
    published = theirs(family, **settings)
    published.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len([*tmp_path.glob("*.safetensors")]) > 2) == (shard == "20KB")
    model, tokenizer = read_model(tmp_path)
    assert tokenizer is None
    assert not model.training
    assert model.context == MADE["CONTEXT"]
    assert all(p.requires_grad for p in model.parameters())
    assert model.tie_embeddings == (model.lm_head.weight is model.model["embed_tokens"].weight)
    assert model.tie_embeddings == settings.get("tie_word_embeddings", False)
    expected = logits(published)
    assert expected.std() > 0.5
    assert relative_gap(logits(model), expected) < 5e-7
    if family != "Mixtral":  # which has other names of its experts
        model.load_state_dict(published.state_dict())


@pytest.mark.parametrize(("family", "settings", "own"), CASES)
def test_transformers_opens_what_is_written(family, settings, own, tmp_path):
    model = filled(family, **own)
    write_model(tmp_path / "new", model, ByteTokenizer())
    published, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "new", output_loading_info=True
    )
    assert type(published).__name__ == f"{family}ForCausalLM"
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert published.config.eos_token_id == ByteTokenizer().end
    text = "for ß in ('€', 'a'):\n\tpass  # 1"
    theirs_of_text = AutoTokenizer.from_pretrained(tmp_path / "new")(text).input_ids
    assert theirs_of_text == ByteTokenizer().encode(text).tolist()
    assert relative_gap(logits(published.eval()), logits(model)) < 1e-5
    again, tokenizer = read_model(tmp_path / "new")
    assert tokenizer.digest == ByteTokenizer().digest
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    tied = settings.get("tie_word_embeddings", False)
    assert tied == ("lm_head.weight" not in load_file(tmp_path / "new" / "model.safetensors"))
    assert tied == (published.lm_head.weight is published.model.embed_tokens.weight)


def test_weights_may_be_written_in_bfloat16(tmp_path):
    model = filled("Qwen3Moe", moe_every=2)
    write_model(tmp_path / "new", model, None, dtype=torch.bfloat16)
    assert not (tmp_path / "new" / "tokenizer.json").exists()
    again, _ = read_model(tmp_path / "new")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.bfloat16())
    published = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert published.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("family", "change", "shown"),
    [
        ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling="),
        ("Llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters="),
        ("Llama", {"rope_scaling": {"type": "yarn"}}, "rope_scaling="),
        ("Llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_p"),
        ("Llama", {"rope_scaling": "linear"}, "rope_scaling='linear'"),
        ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("Mixtral", {"sliding_window": 16}, "sliding_window=16"),
        ("Qwen3Moe", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("Llama", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        ("Llama", {"rope_parameters": 3}, "rope_parameters=3"),
        ("Llama", {"layer_types": 3}, "layer_types=3"),
        ("Llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings='false'"),
        ("Qwen3Moe", {"norm_topk_prob": "false"}, "norm_topk_prob='false'"),
        ("Llama", {"attention_bias": True}, "attention_bias=True"),
        ("Llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("Llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("Qwen3Moe", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
        ("Llama", {"quantization_config": {"bits": 4}}, "quantization_config="),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused_by_name(
    family, change, shown, written, tmp_path
):
    folder = changed(written[family], tmp_path, **change)
    with pytest.raises(GatesError, match=f"config.json has {shown}") as caught:
        read_model(folder)
    assert "\n" not in str(caught.value)


def changed(source, place, **settings):
    """Return a copy of a folder with other settings; None leaves one out."""
    folder = shutil.copytree(source, place / "changed")
    config = json.loads((folder / "config.json").read_text()) | settings
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


@pytest.mark.parametrize(
    ("family", "change", "shown"),
    [
        (
            "Llama",
            {"model_type": "gpt2"},
            "is that of a model of type 'gpt2', expected llama, qwen3",
        ),
        ("Llama", {"model_type": None}, "of type None"),
        ("Llama", {"model_type": ["llama"]}, r"of type \['llama'\]"),
        ("Llama", {"hidden_size": None}, "config.json lacks hidden_size"),
        ("Qwen3Moe", {"num_experts": None}, "config.json lacks num_local_experts"),
        ("Qwen3Moe", {"num_experts_per_tok": 5}, "k must lie between 1 and num_experts=4, got 5"),
        ("Llama", {"num_attention_heads": "4"}, "config.json: "),
        ("Llama", {"num_key_value_heads": 3}, "num_key_value_heads|num_kv_heads=3 must divide"),
        ("Llama", {"intermediate_size": 40}, "size mismatch for model.layers.0.mlp.gate_proj"),
        ("Llama", {"num_hidden_layers": 2}, "holds the unknown model.layers.2.* and 8 more"),
        ("Llama", {"num_hidden_layers": 4}, "lacks model.layers.3.* and 8 more: its weights are"),
        ("Llama", {"model_type": "qwen3"}, r"lacks model.layers.0.self_attn.q_norm.weight and 5"),
        ("Llama", {"vocab_size": 261}, "size mismatch for model.embed_tokens.weight"),
        ("Llama", {"hidden_size": 2**62}, "config.json: "),
        ("Llama", {"hidden_size": 2**70}, "config.json: "),
    ],
)
def test_settings_that_are_not_those_of_the_weights(family, change, shown, written, tmp_path):
    folder = changed(written[family], tmp_path, **change)
    with pytest.raises(GatesError, match=shown) as caught:
        read_model(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_settings_may_be_absent_or_of_old_versions(written, tmp_path):
    expected = logits(read_model(written["Llama"])[0])
    old = {"rope_parameters": None, "head_dim": None, "dtype": None, "rope_scaling": None}
    folder = changed(written["Llama"], tmp_path, **old)
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(state, folder / "model.safetensors")
    assert torch.equal(logits(read_model(folder)[0]), expected)
    empty = {"rope_parameters": {"rope_theta": None}}
    folder = changed(written["Llama"], tmp_path / "empty", **empty)
    assert torch.equal(logits(read_model(folder)[0]), expected)
    other = {"rope_theta": 1.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5e3}}
    folder = changed(written["Llama"], tmp_path / "other", **other)
    assert torch.equal(logits(read_model(folder)[0]), expected)


def test_damaged_and_absent_files_are_refused(written, tmp_path, refuses):
    def broken(name, change):
        def call():
            folder = shutil.copytree(written["Llama"], tmp_path / "broken", dirs_exist_ok=True)
            change(folder / name)
            try:
                read_model(folder)
            finally:
                shutil.rmtree(folder)

        return call

    def shards(*names):
        def change(path):
            path.with_name("model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {str(n): name for n, name in enumerate(names)}})
            )

        return change

    def integers(path):
        state = load_file(path)
        save_file(state | {"model.norm.weight": state["model.norm.weight"].long()}, path)

    content = (written["Llama"] / "model.safetensors").read_bytes()
    refuses(
        GatesError,
        (r"model\.safetensors is damaged: .*get it again$",
         broken("model.safetensors", lambda p: p.write_bytes(content[: len(content) // 2]))),
        (r"is damaged: ", broken("model.safetensors", lambda p: p.write_bytes(content[:20]))),
        (r"is damaged: ", broken("model.safetensors", lambda p: p.write_bytes(b""))),
        (r"is damaged: ", broken("model.safetensors", lambda p: p.write_bytes(b"\xff" * 99))),
        (r"model\.norm\.weight in torch\.int64", broken("model.safetensors", integers)),
        (r"model\.safetensors does not exist", broken("model.safetensors", Path.unlink)),
        (r"config\.json does not exist: name the folder of a model$",
         broken("config.json", Path.unlink)),
        (r"config\.json cannot be read: ", broken("config.json", lambda p: p.write_text("{"))),
        (r"config\.json holds no JSON object", broken("config.json", lambda p: p.write_text("[]"))),
        (r"lacks 2 of 3 shards, the first is a\.safetensors: get them again$",
         broken("x", shards("a.safetensors", "model.safetensors", "b.safetensors"))),
        (r"lacks 1 of 1 shards", broken("x", shards("../Llama/model.safetensors"))),
        (r"lacks 3 of 3 shards, the first is \?:", broken("x", shards("\ud800", "b\0", "a" * 999))),
        (r"config\.json cannot be read: ",
         broken("config.json", lambda p: p.write_text('{"a": ' * 100_000))),
        (r"has no weight_map", broken("x", shards())),
    )  # fmt: skip


def test_weights_of_several_dtypes_or_of_eight_bits_are_refused(written, tmp_path):
    folder = shutil.copytree(written["Llama"], tmp_path / "mixed")
    state = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for kind, change in (
        ("bfloat16", {name: state[name].bfloat16()}),
        ("float8_e4m3fn", {name: state[name].to(torch.float8_e4m3fn)}),
        ("float8_e4m3fn", {n: value.to(torch.float8_e4m3fn) for n, value in state.items()}),
    ):
        save_file(state | change, folder / "model.safetensors")
        with pytest.raises(GatesError, match=rf"mixed has .* in torch\.{kind}: expected all"):
            read_model(folder)
    save_file({n: value.half() for n, value in state.items()}, folder / "model.safetensors")
    assert read_model(folder)[0].lm_head.weight.dtype == torch.float16


def test_weights_beyond_a_dtype_are_not_written_in_it(tmp_path, refuses):
    model = filled("Llama")
    with torch.no_grad():
        model.model["norm"].weight[3] = 70_000
    write = partial(write_model, tmp_path / "new", model, None)
    line = "^model.norm.weight is not finite in torch.float16, nor are 0 more: choose bfloat16"
    refuses(GatesError, (line, lambda: write(dtype=torch.float16)))
    assert not [*tmp_path.iterdir()]
    write(dtype=torch.bfloat16)
    assert read_model(tmp_path / "new")[0].model["norm"].weight[3] == 70_144


class OwnGate(TopKGate):
    """A gate without a bias, of a class that only inherits from TopKGate."""


def test_what_no_family_has_is_not_written(tmp_path, refuses):
    def call(family, **settings):
        return lambda: write_model(tmp_path / "new", ours(family, **settings), ByteTokenizer())

    biased = partial(TopKGate, num_experts=4, k=2, bias=True)
    plain = partial(TopKGate, num_experts=4, k=2, renormalize=False)
    wide = Decoder(270, 30, 1, 4, head_dim=8, hidden_dim=8, context=8)
    small = Decoder(200, 32, 1, 4, hidden_dim=8, context=8)
    refuses(
        GatesError,
        ("^no family of transformers has gates at G2 of attention",
         call("Llama", attention_gate="G2")),
        ("^SigmoidGate is a gate that no family of transformers has: ", call(
            "Qwen3", gate=partial(SigmoidGate, num_experts=4),
            experts=partial(StackedExperts, hidden_dim=8))),
        ("^the TopKGate has a bias, which a Mixtral or Qwen3-MoE lacks: ",
         call("Qwen3Moe", gate=biased)),
        ("^OwnGate is a gate that no family of transformers has: ", call(
            "Qwen3Moe", gate=partial(OwnGate, num_experts=4, k=2))),
        ("these StackedExperts here", call("Qwen3Moe", experts=partial(
            StackedExperts, hidden_dim=8, activation="relu"))),
        ("these StackedExperts here", call("Qwen3Moe", experts=partial(
            StackedExperts, hidden_dim=8, bias=True))),
        ("a Mixtral has experts in every block.*moe_every=2", call("Mixtral", moe_every=2)),
        ("weights that sum to 1.*renormalize=False", call("Mixtral", gate=plain)),
        ("a Llama of 4 heads.*found dim=30",
         lambda: write_model(tmp_path / "new", wide, ByteTokenizer())),
        ("the tokenizer has 257 tokens, but the model 200",
         lambda: write_model(tmp_path / "new", small, ByteTokenizer())),
    )  # fmt: skip
    assert not [*tmp_path.iterdir()]


def test_a_failure_leaves_the_old_folder(refuses, tmp_path):
    class Failing(ByteTokenizer):
        def save(self, folder):
            raise RuntimeError("no")

    write_model(tmp_path / "new", filled("Llama"), ByteTokenizer())
    before = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    refuses(RuntimeError, ("no", lambda: write_model(tmp_path / "new", filled("Qwen3"), Failing())))
    assert {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()} == before
    assert len([*tmp_path.iterdir()]) == 1
