"""What gated adapters cost in a transformer of FLUX.1, and what libraries of adapters cost."""

import importlib
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.comparison import Call, Comparison, Load, Peaks, Work
from benchmarks.core.ops import ABSENT, is_installed
from diffusion.lora_file import Factors, LoraBundle


@torch.no_grad()
def with_peft(model: nn.Module, adapters: Mapping[str, LoraBundle]) -> nn.Module:
    """Return the model with all adapters active in its layers, which are changed in place.

    Args:
        model: Frozen; its linear layers are wrapped.
        adapters: Name -> adapter, of one rank and of the same layers.
    """
    peft: Any = importlib.import_module("peft")
    for name, bundle in adapters.items():
        rank = next(iter(bundle.ranks().values()))
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(bundle.modules))
        model = peft.inject_adapter_in_model(config, model, adapter_name=name)
        for layer, factors in bundle.modules.items():
            wrapped: Any = model.get_submodule(layer)
            wrapped.lora_A[name].weight.copy_(factors.down)
            wrapped.lora_B[name].weight.copy_(factors.scale * factors.up)
    for module in model.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.set_adapter(list(adapters))
    return model.eval().requires_grad_(False)


TOKENS, TEXTS, WIDTH, HEADS, RANK = 512, 128, 3072, 24, 16
BARS = {3: 1.10, 8: 1.20}
MOST_MEMORY = 0.1
"""Extra peak memory over one tensor of all outputs of all adapters, K · N · D."""


def comparisons() -> Iterator[Comparison]:
    """A block, then a small network, with three and eight adapters, a search, a second scan.

    All on one CPU thread.
    """
    yield from map(block, (3, 8))
    yield from map(tiny_flux, (3, 8))
    yield search()
    yield rescan()


def block(num_adapters: int) -> Comparison:
    """Compare the block with K gated adapters with the plain one, and with PEFT.

    The row ``grouped`` is the same with published gates, which see the queries, keys, values and
    the first layer of the feed-forward network fused.
    """

    def build(load: Load) -> Mapping[str, Call]:
        return _variants(load, num_adapters)

    weights = 4.0 * 23 * WIDTH**2
    return Comparison(
        name=f"FLUX.1 single block, {TOKENS} tokens, rank {RANK}, K={num_adapters}",
        op="gated_block",
        build=build,
        baseline="plain",
        bars={"cpp": BARS[num_adapters]},
        absent={} if is_installed() else {"peft": ABSENT},
        memory=4 * weights,
        peaks=Peaks(
            {"cpp": MOST_MEMORY if num_adapters == 8 else None},
            4.0 * num_adapters * TOKENS * WIDTH,
            "K·N·D",
        ),
    )


def _variants(load: Load, num_adapters: int) -> Mapping[str, Call]:
    torch.manual_seed(0)
    plain, given = _block(), _inputs()
    adapters = _adapters(plain, num_adapters)
    fusion = load("diffusion.fusion").GatedFusion
    kernels = load("core_gates.ops").kernels
    apart, grouped = deepcopy(plain), FluxTransformer2DModel(deepcopy(plain))
    apart_fusion = fusion(apart, adapters)
    prefix = "single_transformer_blocks.0."
    within = {
        name: LoraBundle("flux", {prefix + layer: f for layer, f in bundle.modules.items()})
        for name, bundle in adapters.items()
    }
    grouped_fusion = fusion(grouped, within)
    for scheme in (apart_fusion, grouped_fusion):
        _draw(scheme)
        scheme.attach()

    def variant(module: nn.Module, mode: str) -> Call:
        def call() -> object:
            with kernels(mode), torch.no_grad():
                return module(**given)

        call.holds = (apart_fusion, grouped_fusion)  # type: ignore[attr-defined]
        return call

    calls = {
        "plain": variant(plain, "reference"),
        "cpp": variant(apart, "cpp"),
        "grouped": variant(grouped.single_transformer_blocks[0], "cpp"),
    }
    if is_installed():
        calls["peft"] = variant(with_peft(deepcopy(plain), adapters), "reference")
    return calls


class FluxTransformer2DModel(nn.Module):
    """One block at the place where the family of its model is known.

    Args:
        block: A single-stream block.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.single_transformer_blocks = nn.ModuleList([block])


def _block() -> nn.Module:
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

    block: nn.Module = FluxSingleTransformerBlock(WIDTH, HEADS, WIDTH // HEADS)
    return block.eval().requires_grad_(False)


def _inputs() -> dict[str, Any]:
    angles = torch.rand(TOKENS, WIDTH // HEADS)
    return {
        "hidden_states": torch.randn(1, TOKENS - TEXTS, WIDTH),
        "encoder_hidden_states": torch.randn(1, TEXTS, WIDTH),
        "temb": torch.randn(1, WIDTH),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _adapters(module: nn.Module, number: int) -> dict[str, LoraBundle]:
    linears = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    return {
        f"a{k}": LoraBundle(
            "flux",
            {
                name: Factors(
                    torch.randn(RANK, layer.in_features) / layer.in_features**0.5,
                    torch.randn(layer.out_features, RANK) / RANK**0.5,
                    0.1,
                )
                for name, layer in linears.items()
            },
        )
        for k in range(number)
    }


@torch.no_grad()
def _draw(fusion: nn.Module) -> None:
    """Draw the parameters of gates, which are then no plain sum."""
    for parameter in fusion.parameters():
        parameter.add_(0.5 * torch.randn_like(parameter))


BATCH, TINY_TEXTS, TINY_RANK, SHAPE = 32, 12, 4, "tiny"
TINY_BARS = {3: 1.10, 8: 1.00}


def tiny_flux(num_adapters: int) -> Comparison:
    """Compare a forward pass with K gated adapters with PEFT, and with none."""

    def build(load: Load) -> Mapping[str, Call]:
        return _tiny_flux_variants(load, num_adapters)

    return Comparison(
        name=f"tiny FLUX, batch {BATCH}, rank {TINY_RANK}, K={num_adapters}",
        op="gated_flux",
        build=build,
        baseline="peft",
        bars={"cpp": TINY_BARS[num_adapters]},
        also={"cpp": "none"},
        absent={} if is_installed() else {"peft": ABSENT},
    )


def _tiny_flux_variants(load: Load, num_adapters: int) -> Mapping[str, Call]:
    torch.manual_seed(0)
    plain = (
        load("diffusion.models.embedded_base").transformer_of(SHAPE).eval().requires_grad_(False)
    )
    text = load("diffusion.models.text_encoders").TextStates(
        torch.randn(BATCH, TINY_TEXTS, plain.config.joint_attention_dim),
        torch.randn(BATCH, plain.config.pooled_projection_dim),
    )
    given = torch.randn(BATCH, 12, 8, 8), torch.rand(BATCH), text
    adapters = _tiny_flux_adapters(plain, num_adapters)
    kernels = load("core_gates.ops").kernels
    velocity = load("diffusion.models.flow_matching").velocity
    gated = deepcopy(plain)
    fusion = load("diffusion.fusion").GatedFusion(gated, adapters)
    _draw(fusion)
    fusion.attach()

    def variant(model: nn.Module, mode: str) -> Call:
        def call() -> object:
            with kernels(mode), torch.no_grad():
                return velocity(model, *given)

        call.holds = fusion  # type: ignore[attr-defined]
        return call

    calls = {"none": variant(plain, "reference"), "cpp": variant(gated, "cpp")}
    if is_installed():
        calls["peft"] = variant(with_peft(deepcopy(plain), adapters), "reference")
    return calls


def _tiny_flux_adapters(model: Any, number: int) -> dict[str, LoraBundle]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "blocks" in n}
    return {
        f"a{k}": LoraBundle(
            "flux",
            {
                name: Factors(
                    0.1 * torch.randn(TINY_RANK, layer.in_features),
                    0.1 * torch.randn(layer.out_features, TINY_RANK),
                )
                for name, layer in layers.items()
            },
        )
        for k in range(number)
    }


FILES, FIRST = 10_000, 500
"""Files of the second scan and of the first, whose times are given per file."""

SCAN_BAR = 0.1


def rescan() -> Comparison:
    """Compare what a file costs that is unchanged with what a new one costs."""
    return Comparison(
        name=f"scan of {FILES} files",
        op="library_scan",
        build=_library_variants,
        baseline="first scan",
        bars={"unchanged": SCAN_BAR},
        units={"first scan": FIRST, "unchanged": FILES},
        unit="file",
    )


def write_adapter(path: Path, seed: int = 0, layers: int = 3) -> None:
    """Write a random file with the names of kohya, of layers of width 16."""
    draw, tensors = torch.Generator().manual_seed(seed), {}
    for number in range(layers):
        name = f"lora_unet_double_blocks_{number}_img_attn_proj"
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, 16, generator=draw)
        tensors[f"{name}.lora_up.weight"] = torch.randn(16, 2, generator=draw)
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)


def _library_variants(load: Load) -> Mapping[str, Call]:
    folder = tempfile.TemporaryDirectory()
    root, few = Path(folder.name) / "many", Path(folder.name) / "few"
    for place, number in ((root, FILES), (few, FIRST)):
        place.mkdir()
        for seed in range(number):
            write_adapter(place / f"{seed}.safetensors", seed)
    kind = load("diffusion.library").LoraLibrary
    library = kind(root)
    library.scan()

    def first() -> object:
        index = Path(folder.name) / "index"
        with kind(few, index=index) as new:
            gates = new.scan()
        shutil.rmtree(index)
        return gates

    def again() -> object:
        return library.scan()

    def end() -> None:
        library.close()
        folder.cleanup()

    weakref.finalize(again, end)
    return {"first scan": first, "unchanged": again}


ADAPTERS, DIM, K = 100_000, 768, 10
BAR = 1.5


class Encoder:
    """Stands for an encoder of adapters, and for one of prompts."""

    family, fingerprint = "flux", "random"

    def __init__(self, query: Tensor) -> None:
        self.query, self.dim = query, len(query)

    def refusal(self, bundle: object) -> str | None:
        """Return that any adapter fits."""
        del bundle
        return None

    def encode(self, bundle: object) -> Tensor:
        """Return the query."""
        del bundle
        return self.query

    def embed(self, texts: list[str]) -> Tensor:
        """Return the query for each text."""
        return self.query.expand(len(texts), -1)


def search() -> Comparison:
    """Compare a search by a prompt, names and scores included, with what it cannot spare."""
    return Comparison(
        name=f"search in {ADAPTERS} x {DIM}, k={K}",
        op="library_search",
        build=_search_variants,
        baseline="matmul and top-k",
        bars={"search": BAR},
        work=Work(bytes=4.0 * ADAPTERS * DIM, flops=2.0 * ADAPTERS * DIM),
        memory=8.0 * ADAPTERS * DIM,
    )


def _search_variants(load: Load) -> Mapping[str, Call]:
    folder = tempfile.TemporaryDirectory()
    root = Path(folder.name)
    vectors = np.random.default_rng(0).normal(size=(ADAPTERS, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    query = torch.from_numpy(vectors[0] + 0.05 * vectors[1])
    encoder = Encoder(query / query.norm())
    library = load("diffusion.library").LoraLibrary(root, encoder, encoder, least=-1)
    write_adapter(root / "a1.safetensors", layers=1)
    library.scan()
    _fill(load, library, vectors)
    view = load("diffusion.library.database").Matrix(library.index, encoder.fingerprint, DIM).view()
    wanted = encoder.query.numpy()

    def bare() -> object:
        scores = view @ wanted
        near = np.argpartition(scores, -K)[-K:]
        return near[np.argsort(-scores[near])]

    def whole() -> object:
        return library.search("a prompt", K, "weights")

    def end() -> None:
        library.close()
        folder.cleanup()

    weakref.finalize(whole, end)
    return {"matmul and top-k": bare, "search": whole}


def _fill(load: Load, library: Any, vectors: np.ndarray[Any, Any]) -> None:
    """Copy the one row of the index, each copy with its own path, name and content."""
    catalog = load("diffusion.library.database").Catalog(library.index, create=True)
    expressions = {
        "location": "CAST('a' || i || '.safetensors' AS BLOB)",
        "name": "'a' || i",
        "sha256": "'s' || i",
        "digest": "'d' || i",
    }
    first = dict(catalog.database.one("SELECT * FROM adapter"))
    names = [name for name in first if name != "id"]
    columns = ", ".join(names)
    values = ", ".join(expressions.get(column, column) for column in names)
    numbers = (
        f"WITH RECURSIVE n (i) AS (SELECT 2 UNION ALL SELECT i + 1 FROM n WHERE i < {ADAPTERS})"
    )
    with catalog.database.writing():
        catalog.database.run(
            f"{numbers} INSERT INTO adapter ({columns}) "
            f"SELECT {values} FROM adapter, n WHERE id = 1"
        )
        catalog.database.run(
            f"{numbers} INSERT INTO encoding (fingerprint, digest, row, refusal) "
            "SELECT fingerprint, 'd' || i, i - 1, '' FROM encoding, n WHERE row = 0"
        )
    matrix = load("diffusion.library.database").Matrix(library.index, Encoder.fingerprint, DIM)
    matrix.write(dict(enumerate(vectors)))
    catalog.database.close()
