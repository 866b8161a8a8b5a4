"""Merges next to PEFT's: golden vectors, its functions, and closed forms."""

import time
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from core_gates.errors import GatesError
from diffusion.evaluation.parity import merge_errors, merged_adapters, read_vectors
from diffusion.lora_file import Factors, LoraBundle
from diffusion.rivals.merged import METHODS, merge, truncate

GOLDEN = Path(__file__).parents[2] / "golden" / "autolora"


@pytest.fixture(scope="module")
def golden():
    return read_vectors(GOLDEN, "peft_weighted_a.npz")


def test_golden():
    # PEFT rounds weights to float32 before it multiplies by them
    errors = dict(merge_errors(GOLDEN))
    assert len(errors) == 3 * 8
    assert {name: error for name, error in errors.items() if not error <= 1e-6} == {}


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("on_changes", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_dare_drops_what_peft_drops(golden, kind, on_changes):
    functions = pytest.importorskip("peft.utils.merge_utils")
    adapters, weights = merged_adapters(golden, "same")
    own = list(adapters.values())
    made = merge(adapters, weights, kind + "_svd" * on_changes, density=0.6, rank=16, seed=7)
    torch.manual_seed(7)
    for layer in ("l1", "l2"):
        each = [bundle.modules[layer] for bundle in own]
        given = torch.tensor(list(weights.values()), dtype=torch.float64)
        if on_changes:
            deltas = [f.delta_weight() for f in each]
            expected = getattr(functions, kind)(deltas, given, 0.6)
        else:
            scaled = given * torch.tensor([f.scale for f in each])
            roots = scaled.abs().sqrt()
            pairs = ([f.down for f in each], scaled.sign() * roots), ([f.up for f in each], roots)
            down, up = (getattr(functions, kind)(tensors, w, 0.6) for tensors, w in pairs)
            expected = up @ down
        assert_close(made.delta_weight(layer), expected)


def test_what_dare_drops_is_drawn_once(golden):
    adapters, weights = merged_adapters(golden, "same")
    state = torch.get_rng_state()
    one, two, other = (merge(adapters, weights, "dare_ties", seed=s) for s in (1, 1, 2))
    assert one.digest() == two.digest() != other.digest()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_stays_itself(golden, method):
    adapters, _ = merged_adapters(golden, "same")
    made = merge({"a0": adapters["a0"]}, {"a0": -0.4}, method)
    for layer in ("l1", "l2"):
        assert_close(made.delta_weight(layer), -0.4 * adapters["a0"].delta_weight(layer))


@pytest.mark.parametrize("method", METHODS)
def test_full_density_and_layers_of_one_adapter(golden, method):
    adapters, weights = merged_adapters(golden, "same")
    adapters["a2"] = adapters["a2"].select(["l2"])
    adapters["a1"] = adapters["a1"].select(["l2"])
    made = merge(adapters, weights, method, density=1.0, rank=9)
    expected = weights["a0"] * adapters["a0"].delta_weight("l1")
    assert_close(made.delta_weight("l1"), expected)
    if method in ("cat", "svd", "dare_linear_svd", "magnitude_prune_svd"):
        total = sum(w * adapters[n].delta_weight("l2") for n, w in weights.items())
        assert_close(made.delta_weight("l2"), total)


def test_ranks(golden):
    mixed, weights = merged_adapters(golden, "mixed")
    assert merge(mixed, weights, "svd").ranks() == {"l1": 4, "l2": 4}
    assert merge(mixed, weights, "ties_svd", rank=2).ranks() == {"l1": 2, "l2": 2}
    assert merge(mixed, weights, "cat").ranks() == {"l1": 9, "l2": 9}
    for method in ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"):
        with pytest.raises(GatesError, match=r"needs equal ranks, but l1 has 3 in 'a0', 2 in 'a1'"):
            merge(mixed, weights, method)


def test_svd_of_large_layers_forms_no_change():
    generator = torch.Generator().manual_seed(0)
    n = 60_000  # ΔW would take 14 GB
    adapters = {
        name: LoraBundle(
            "flux",
            {"x": Factors(*(torch.randn(*s, generator=generator) for s in ((2, n), (n, 2))))},
        )
        for name in "ab"
    }
    made = merge(adapters, None, "svd", rank=3)
    assert made.ranks() == {"x": 3}
    assert 0.8 < made.norms()["x"] / merge(adapters).norms()["x"] < 1


def by_all_entries_and_all_sizes(changes, density, rank):
    """``ties_svd`` as PEFT computes it: sorted entries, and every singular value."""
    flat = torch.stack(changes).flatten(1)
    kept = flat.abs().topk(int(density * flat.shape[1])).indices
    pruned = torch.zeros_like(flat).scatter(1, kept, flat.gather(1, kept))
    agrees = pruned.sign() == torch.where(pruned.sum(0) >= 0, 1, -1)
    total = ((pruned * agrees).sum(0) / agrees.sum(0).clamp(min=1)).view_as(changes[0])
    left, sizes, right = torch.linalg.svd(total, full_matrices=False)
    return total, (left[:, :rank] * sizes[:rank]) @ right[:rank]


@pytest.mark.fault("46 D6")
def test_ties_of_wide_layers_are_near_the_best_approximation_and_several_times_faster():
    draw = torch.Generator().manual_seed(0)
    adapters = {
        name: LoraBundle(
            "flux",
            {"x": Factors(*(torch.randn(*s, generator=draw) for s in ((16, 1000), (1000, 16))))},
        )
        for name in "ab"
    }
    changes = [one.delta_weight("x") for one in adapters.values()]

    threads = torch.get_num_threads()

    def timed(function):
        seconds = []
        torch.set_num_threads(1)
        for _ in range(3):
            begin = time.process_time()
            found = function()
            seconds.append(time.process_time() - begin)
        torch.set_num_threads(threads)
        return found, min(seconds)

    made, fast = timed(lambda: merge(adapters, None, "ties_svd", density=0.3, rank=16))
    (total, best), slow = timed(lambda: by_all_entries_and_all_sizes(changes, 0.3, 16))
    lost, least = (torch.linalg.matrix_norm(total - one) for one in (made.delta_weight("x"), best))
    assert lost <= (1 + 1e-3) * least
    assert slow > 2 * fast  # about six times on a quiet machine
    again, _ = timed(lambda: merge(adapters, None, "ties_svd", density=0.3, rank=16))
    assert made.digest() == again.digest()


def test_iterations_find_the_best_approximation():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(90, 95, generator=generator, dtype=torch.float64)
    matrix = matrix @ torch.diag(0.8 ** torch.arange(95.0, dtype=torch.float64))
    state = torch.get_rng_state()
    found = torch.matmul(*truncate(matrix, 5, generator))
    assert torch.equal(torch.get_rng_state(), state)
    left, sizes, right = torch.linalg.svd(matrix)
    assert_close(found, left[:, :5] * sizes[:5] @ right[:5], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tie"}, "method is 'tie'; choose one of cat, svd"),
        ({"density": 0}, "density is 0, expected a fraction above 0"),
        ({"density": float("nan")}, "density is nan"),
        ({"rank": 0}, "rank is 0, expected 1 or more"),
    ],
)
def test_options_are_checked(golden, options, message):
    with pytest.raises(GatesError, match=message):
        merge(merged_adapters(golden, "same")[0], **options)


def test_adapters_that_do_not_fit_each_other(golden, refuses):
    adapters, _ = merged_adapters(golden, "same")
    other = LoraBundle("sd3", adapters["a1"].modules)
    refuses(
        GatesError,
        ("found 'a0' for flux, 'b' for sd3", lambda: merge({"a0": adapters["a0"], "b": other})),
        ("found no adapter", lambda: merge({})),
    )
    dora = adapters["a1"].modules["l1"]._replace(magnitude=torch.ones(16, 1))
    with pytest.raises(GatesError, match="adapter 'd' is a DoRA at l1"):
        merge({"a": adapters["a0"], "d": LoraBundle("flux", {"l1": dora})})
    narrow = LoraBundle("flux", {"l1": adapters["a1"].modules["l2"]})
    with pytest.raises(GatesError, match="l1 has 12 to 16 features in 'a', 16 to 7 features in"):
        merge({"a": adapters["a0"], "n": narrow})
