"""The suites: what each compares, and the quick tests that must pass before it is timed."""

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from benchmarks.comparison import Comparison
from core_gates.errors import GatesError


@dataclass(frozen=True)
class Suite:
    """A suite: comparisons, and the quick tests that must pass before anything is timed.

    Attributes:
        name: What ``--suite`` or ``--op`` calls it.
        tests: Files for pytest.
        comparisons: Makes the comparisons.
        threads: Threads that a suite of CPU code uses; None for any device and number.
    """

    name: str
    tests: tuple[str, ...]
    comparisons: Callable[[], Iterable[Comparison]]
    threads: int | None = 1


def parts(*functions: str) -> Callable[[], Iterator[Comparison]]:
    """Return a function that imports each ``module:function`` and yields its comparisons."""

    def comparisons() -> Iterator[Comparison]:
        for part in functions:
            module, _, function = part.partition(":")
            yield from getattr(importlib.import_module(module), function)()

    return comparisons


ADAPTERS = Suite(
    "adapters",
    ("tests/core_gates/ops/test_gated_lora.py", "tests/core_gates/adapters/test_gated_lora.py"),
    parts("benchmarks.core.ops:gated_lora_comparisons"),
)
CORE_ATTENTION = Suite(
    "core_attention",
    (
        "tests/core_gates/ops/test_block_sparse_attention.py",
        "tests/core_gates/ops/test_block_max_attention.py",
        "tests/core_gates/attention/test_kv_cache.py",
    ),
    parts("benchmarks.core.ops:attention_comparisons", "benchmarks.core.ops:decoding_comparisons"),
)
CORE_MOE = Suite(
    "core_moe",
    (
        "tests/core_gates/moe/test_dispatch.py",
        "tests/core_gates/moe/test_experts.py",
        "tests/core_gates/ops/test_grouped_linear.py",
        "tests/core_gates/ops/test_grouped_mlp.py",
        "tests/core_gates/ops/test_router.py",
    ),
    parts("benchmarks.core.moe:comparisons"),
)
CORE = Suite(
    "core",
    (*CORE_MOE.tests, *ADAPTERS.tests, *CORE_ATTENTION.tests),
    parts(
        "benchmarks.core.moe:comparisons",
        "benchmarks.core.ops:gated_lora_comparisons",
        "benchmarks.core.ops:attention_comparisons",
        "benchmarks.core.ops:decoding_comparisons",
    ),
)
DIFFUSION = Suite(
    "diffusion",
    (
        "tests/diffusion/fusion/test_gated_fusion.py",
        "tests/diffusion/library/test_searcher.py",
        "tests/benchmarks/test_diffusion.py",
    ),
    parts("benchmarks.diffusion:comparisons"),
)
ENDOSCOPY = Suite(
    "endoscopy",
    (
        "tests/core_gates/training/test_gradient_routing.py",
        "tests/core_gates/training/test_gradient_routing_state.py",
        "tests/endoscopy/training/test_targets.py",
        "tests/endoscopy/data/test_frame_cache.py",
        "tests/core_gates/ops/test_gated_residual_norm.py",
        "tests/benchmarks/test_eager_renderer.py",
        "tests/endoscopy/renderer/test_march.py",
    ),
    parts("benchmarks.endoscopy:comparisons"),
)
LANGUAGE = Suite(
    "language",
    (
        "tests/language/test_decoder.py",
        "tests/language/test_generation.py",
        "tests/benchmarks/test_language.py",
        "tests/benchmarks/test_block_gates.py",
        "tests/benchmarks/test_seqboat.py",
        "tests/core_gates/attention/sma/test_layer.py",
    ),
    parts(
        "benchmarks.language:comparisons",
        "benchmarks.block_gates:comparisons",
        "benchmarks.seqboat:comparisons",
    ),
)
RECSYS = Suite(
    "recsys",
    (
        "tests/core_gates/moe/test_normed_experts.py",
        "tests/core_gates/features/test_low_rank.py",
        "tests/benchmarks/test_recsys.py",
        "tests/benchmarks/test_rechub.py",
        "tests/benchmarks/test_recsys_loader.py",
    ),
    parts(
        "benchmarks.recsys.rechub:comparisons",
        "benchmarks.recsys.loading:comparisons",
        "benchmarks.recsys.home:comparisons",
        "benchmarks.recsys.embeddings:comparisons",
        "benchmarks.recsys.serving:comparisons",
    ),
)
WEATHER = Suite(
    "weather",
    (
        "tests/weather/test_grid.py",
        "tests/weather/models/shallow_water/test_model.py",
        "tests/weather/models/held_suarez/test_model.py",
        "tests/weather/models/adas/test_network.py",
        "tests/weather/models/adas/test_analysis.py",
        "tests/weather/operations/test_regridding.py",
        "tests/weather/data/test_training_cache.py",
        "tests/weather/baselines/test_letkf.py",
        "tests/weather/baselines/test_optimal_interpolation.py",
        "tests/core_gates/conv/test_gated.py",
        "tests/core_gates/ops/test_elementwise.py",
        "tests/core_gates/attention/test_cross.py",
    ),
    parts(
        "benchmarks.weather.cycles:comparisons",
        "benchmarks.weather.stores:comparisons",
        "benchmarks.weather.convolutions:comparisons",
    ),
)
SUITES = {
    suite.name: suite
    for suite in (
        *(ADAPTERS, CORE, CORE_ATTENTION, CORE_MOE),
        *(DIFFUSION, ENDOSCOPY, LANGUAGE, RECSYS, WEATHER),
    )
}


def load_suite(name: str) -> Suite:
    """Return a suite.

    Raises:
        GatesError: There is no suite of that name.
    """
    if name not in SUITES:
        raise GatesError(f"unknown suite {name!r}: choose from {', '.join(SUITES)}")
    return SUITES[name]


def find_op(op: str) -> Suite:
    """Collect what compares an op, from all suites.

    Raises:
        GatesError: No suite compares that op.
    """
    comparisons_of_op: list[Comparison] = []
    tests: list[str] = []
    ops: set[str] = set()
    for suite in SUITES.values():
        comparisons = list(suite.comparisons())
        ops |= {comparison.op for comparison in comparisons}
        named = {comparison.name for comparison in comparisons_of_op}
        mine = [c for c in comparisons if c.op == op and c.name not in named]
        comparisons_of_op += mine
        tests += suite.tests if mine else ()
    if not comparisons_of_op:
        raise GatesError(f"no suite compares the op {op!r}: choose from {', '.join(sorted(ops))}")
    return Suite(op, tuple(dict.fromkeys(tests)), lambda: comparisons_of_op, threads=None)
