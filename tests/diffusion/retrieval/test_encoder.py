"""Encoders of adapters: tokens, masks, pooling, and golden vectors of published code."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from diffusion.evaluation.parity import encoder_errors, published_encoder, relative_error
from diffusion.lora_file import Factors, FluxShape, LoraFileError, load_lora, save_lora
from diffusion.lora_file.family import index_of
from diffusion.retrieval import EncoderConfig, LoraWeightEncoder, TrainedEncoder, collate

FORMS = {
    "default": {},
    "token normalization": {"normalization": "token"},
    "layer normalization": {"normalization": "layer"},
    "masked": {"missing": "mask"},
    "prompt token": {"pooling": "token", "probes": 3, "positions": False},
    "causal": {"attention_mask": "causal", "normalization": "none"},
}
seeds = st.integers(0, 2**31)
FEW = settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=FORMS)
def encoder(request, config):
    torch.manual_seed(0)
    encoder = LoraWeightEncoder(config(**FORMS[request.param]))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return TrainedEncoder(encoder)


def changed(bundle, change):
    layers = {name: change(factors) for name, factors in bundle.modules.items()}
    return dataclasses.replace(bundle, modules=layers)


def close(found, expected):
    assert relative_error(found, expected) <= 1e-5


@given(seed=seeds, rank=st.integers(1, 4))
@FEW
def test_gauge_and_rank_padding(encoder, adapter, seed, rank):
    bundle = adapter(seed, rank=rank)
    generator = torch.Generator().manual_seed(seed)
    turn = torch.randn(rank, rank, generator=generator) + 3 * torch.eye(rank)

    def gauge(f):
        return f._replace(down=turn @ f.down, up=f.up @ torch.linalg.inv(turn))

    def pad(f):
        return f._replace(down=F.pad(f.down, (0, 0, 0, 2)), up=F.pad(f.up, (0, 2)))

    vector = encoder.encode(bundle)
    close(encoder.encode(changed(bundle, gauge)), vector)
    close(encoder.encode(changed(bundle, pad)), vector)
    moved = changed(bundle, lambda f: f._replace(down=4 * f.down, scale=f.scale / 4))
    close(encoder.encode(moved), vector)
    assert vector.norm().item() == pytest.approx(1, abs=1e-6)


@given(seed=seeds)
@FEW
def test_a_batch_of_ranks_and_layers_equals_single_adapters_in_any_order(encoder, adapter, seed):
    bundles = [
        adapter(seed, rank=1),
        adapter(seed + 1, rank=5),
        adapter(seed + 2, types=("to_qkv_mlp", "ff_b.2")),
        adapter(seed + 3, rank=3, types=("proj_out",)),
    ]
    single = torch.stack([encoder.encode(bundle) for bundle in bundles])
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    batch = collate([bundles[i] for i in order], encoder.encoder.modules_read)
    close(F.normalize(encoder.encoder(batch), dim=1), single[order])
    close(F.normalize(encoder.encoder(batch.rows(order)), dim=1), single[order][order])


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_dialects_names_and_metadata_do_not_matter(encoder, rank, tmp_path, adapter):
    bundle = dataclasses.replace(adapter(3, rank=rank), metadata={"ss_output_name": "secret"})
    vector = encoder.encode(bundle)
    for number, format in enumerate(("diffusers", "kohya", "bfl", "comfyui", "peft")):
        path = tmp_path / ("folder" if format == "peft" else f"{number}.safetensors")
        close(encoder.encode(load_lora(save_lora(bundle, path, format))), vector)
    close(encoder.encode(dataclasses.replace(bundle, metadata={})), vector)


def test_what_is_missing_is_seen_or_left_out(adapter, config):
    torch.manual_seed(0)
    whole, part = adapter(0), adapter(0, types=("to_qkv_mlp", "ff_a.0"))
    for missing in ("token", "mask"):
        encoder = LoraWeightEncoder(config(missing=missing, normalization="token"))
        batch = collate([whole, part], encoder.modules_read)
        tokens, present = encoder.tokens(batch)
        assert present.sum(1).tolist() == [16, 3]
        absent = ~present[1]
        if missing == "token":
            kinds = [m.type.replace(".", "___") for m in encoder.modules_read]
            expected = torch.stack([encoder.absent[kind] for kind in kinds])
            torch.testing.assert_close(tokens[1][absent], expected[absent])
        before = encoder(batch)
        with torch.no_grad():
            for parameter in getattr(encoder, "absent", {}).values():
                parameter += 1.0
        after = encoder(batch)
        torch.testing.assert_close(before[0], after[0])
        assert torch.equal(before[1], after[1]) == (missing == "mask")


def test_masked_layers_equal_an_encoder_without_them(adapter, config):
    torch.manual_seed(0)
    types = ("to_qkv_mlp", "ff_a.0")
    large = LoraWeightEncoder(config(missing="mask"))
    small = LoraWeightEncoder(config(missing="mask", types=types))
    kept = [n for n, m in enumerate(large.modules_read) if m.type in types]
    weights = {k: v for k, v in large.state_dict().items() if k in small.state_dict()}
    weights["position_embeds"] = large.position_embeds[:, kept]
    small.load_state_dict(weights)
    bundle = adapter(4, types=types)
    found = small(collate([bundle], small.modules_read))
    torch.testing.assert_close(found, large(collate([bundle], large.modules_read)))
    whole = adapter(4)
    assert len(whole.modules) > len(bundle.modules)
    torch.testing.assert_close(found, small(collate([whole], small.modules_read)))


def test_gradients_reach_all_parameters(adapter, config):
    torch.manual_seed(0)
    for form in FORMS.values():
        encoder = LoraWeightEncoder(config(**form))
        bundles = [adapter(1, types=("ff_a.0",)), adapter(2, types=("proj_out",))]
        encoder(collate(bundles, encoder.modules_read)).square().sum().backward()
        assert [n for n, p in encoder.named_parameters() if p.grad is None] == []


def test_file_normalization_forgets_the_strength_and_none_does_not(adapter, config):
    torch.manual_seed(0)
    strong = changed(adapter(0), lambda f: f._replace(scale=10 * f.scale))
    for normalization, same in (("file", True), ("token", True), ("none", False)):
        encoder = TrainedEncoder(LoraWeightEncoder(config(normalization=normalization)))
        assert ((encoder.encode(adapter(0)) - encoder.encode(strong)).abs().max() < 1e-5) == same


def test_published_sizes():
    with torch.device("meta"):
        published = LoraWeightEncoder(EncoderConfig.published())
    assert round(sum(p.numel() for p in published.parameters()) / 1e6, 1) == 112.9
    projections = published.embedder.proj_dict.parameters()
    assert sum(p.numel() for p in projections) == pytest.approx(96.7e6, rel=1e-3)
    probes = published.embedder.model_dict.parameters()
    assert sum(p.numel() for p in probes) == pytest.approx(1.75e6, rel=1e-2)


def test_the_encoder_of_the_small_flux_fits_into_1300_kb():
    shape = FluxShape(2, 4, 6, 32, context_dim=384, pooled_dim=384, guidance=False)
    types = [kind for kind in dict.fromkeys(m.type for m in shape.fused()) if "norm" not in kind]
    with torch.device("meta"):
        whole = LoraWeightEncoder(EncoderConfig(shape))
        small = LoraWeightEncoder(EncoderConfig(shape, tuple(types)))
    sizes = [2 * sum(p.numel() for p in encoder.parameters()) for encoder in (small, whole)]
    assert sizes[0] < 0.95e6
    assert sizes[1] < 1.3e6


def test_refusals(adapter, config):
    trained = TrainedEncoder(LoraWeightEncoder(config(types=("ff_a.0",))))
    assert trained.refusal(adapter(0)) is None
    assert "sd3" in trained.refusal(adapter(0, family="sd3"))
    assert "no layer" in trained.refusal(adapter(0, types=("proj_out",)))
    assert "16 → 64" in trained.refusal(adapter(0, shape=FluxShape(1, 2, num_heads=3, head_dim=8)))
    strict = TrainedEncoder(LoraWeightEncoder(config(missing="refuse")))
    assert "lacks" in strict.refusal(adapter(0, types=("proj_out",)))
    assert strict.refusal(adapter(0)) is None


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda f: f._replace(down=f.down * torch.nan), "not finite"),
        (lambda f: f._replace(up=f.up * torch.inf), "not finite"),
        (lambda f: f._replace(up=0 * f.up), "zero"),
        (lambda f: f._replace(down=f.down * 1e25, up=f.up * 1e25), "too large"),
    ],
)
def test_values_that_no_vector_can_be_made_of(change, word, adapter, config, one_line):
    trained = TrainedEncoder(LoraWeightEncoder(config(normalization="none")))
    assert word in one_line(LoraFileError, trained.encode, changed(adapter(0), change))


def test_a_layer_without_change_counts_as_missing(adapter, config):
    torch.manual_seed(0)
    trained = TrainedEncoder(LoraWeightEncoder(config()))
    part = adapter(0, types=("ff_a.0",))
    zeros = {
        name: f if name in part.modules else Factors(f.down, 0 * f.up)
        for name, f in adapter(0).modules.items()
    }
    close(trained.encode(dataclasses.replace(part, modules=zeros)), trained.encode(part))


def test_the_published_form_counts_a_layer_without_change(adapter, config):
    torch.manual_seed(0)
    encoder = LoraWeightEncoder(config(missing="refuse", normalization="none", depth=0))
    name = "transformer_blocks.0.ff.net.2"
    layers = {n: f._replace(scale=0.0) if n == name else f for n, f in adapter(0).modules.items()}
    batch = collate([dataclasses.replace(adapter(0), modules=layers)], encoder.modules_read)
    tokens, present = encoder.tokens(batch)
    assert present.all()
    assert batch.present.sum() == 15
    number = [m.name for m in encoder.modules_read].index("blocks.0.ff_a.2")
    assert torch.equal(tokens[0, number], encoder.embedder.proj_dict["ff_a___2"].bias)
    mean = encoder.final_layer_norm(tokens).mean(1)
    torch.testing.assert_close(encoder(batch), encoder.final_linear(mean))


def test_a_dora_is_read_by_its_direction(adapter, config):
    torch.manual_seed(0)
    trained = TrainedEncoder(LoraWeightEncoder(config()))
    dora = changed(adapter(0), lambda f: f._replace(magnitude=torch.ones(f.out_features, 1)))
    close(trained.encode(dora), trained.encode(adapter(0)))


def test_options_are_checked(config, one_line):
    assert "choose one of" in one_line(ValueError, config, missing="never")
    assert "dim" in one_line(ValueError, config, dim=0)


VECTORS = Path(__file__).parents[2] / "golden/autolora"


@pytest.fixture(scope="module")
def published():
    return published_encoder(VECTORS)


def test_the_order_of_the_layers(published):
    (_, meta), encoder, _ = published
    modules = encoder.modules_read
    assert [module.name for module in modules] == meta["order"]
    assert [module.type for module in modules] == meta["types"]
    assert {index_of(module.parts[0]) for module in modules} == {0, 1}


def test_tokens_embeddings_loss_and_gradients(published):
    (_, meta), encoder, batch = published
    assert encoder.tokens(batch)[1].all()
    errors = dict(encoder_errors(VECTORS))
    assert sum(name.startswith("g.") for name in errors) == len(meta["order"]) + 3
    assert {"tokens0", "emb", "sim", "loss"} < errors.keys()
    assert {name: error for name, error in errors.items() if not error <= 1e-6} == {}
