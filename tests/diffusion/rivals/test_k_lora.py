"""K-LoRA: golden choices, the schedule by layer calls, and what more than two adapters do."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from core_gates.errors import GatesError
from diffusion.evaluation.parity import choice_errors, read_vectors
from diffusion.rivals import k_lora
from diffusion.rivals.k_lora import KLora

GOLDEN = Path(__file__).parents[2] / "golden" / "autolora"


def test_golden_choices():
    arrays, _ = read_vectors(GOLDEN, "gated_linear_a.npz")
    assert set(arrays["klora.choice"].tolist()) == {0, 1}
    errors = dict(choice_errors(GOLDEN))
    assert len(errors) == 2 * len(arrays["klora.t"]) + 1
    assert max(errors.values()) <= 1e-7


def naive_choices(adapters, step, steps, alpha=1.5, beta=1.275):
    """The published rule over all layers of a run, from every ΔW in full."""
    content, style = adapters.values()
    deltas = [{m: b.delta_weight(m).abs() for m in b.modules} for b in (content, style)]
    means = [sum(d.sum() for d in x.values()) / sum(d.numel() for d in x.values()) for x in deltas]
    gamma = means[0] / means[1]

    def choose(module, number, layers):
        if not all(module in bundle.modules for bundle in adapters.values()):
            return next(name for name, bundle in adapters.items() if module in bundle.modules)
        count = content.ranks()[module] * style.ranks()[module]
        s_c, s_s = (d[module].flatten().sort().values[-count:].sum() for d in deltas)
        factor = (alpha * (step * layers + number) / (steps * layers) + beta) % alpha
        return list(adapters)[0 if s_c / gamma / (s_s * factor) > 1 else 1]

    return choose


@pytest.mark.parametrize("step", [0, 2, 5])
def test_a_run_follows_the_schedule(flux, inputs, bundle, dense, step):
    adapters = {"c": bundle(1), "s": bundle(2, rank=3, where="transformer_blocks", scale=0.3)}
    order = []
    with KLora(flux, adapters) as rival:
        hooks = [
            layer.register_forward_pre_hook(lambda *_, name=name: order.append(name))
            for name, layer in rival.layers.items()
        ]
        rival.set_strengths({"c": 0.7})
        rival.at(step, 6)
        found = flux(**inputs)[0]
        called, order = order, []
        assert_close(flux(**inputs)[0], found)  # as the second pass of guidance
        assert order == called
        for hook in hooks:
            hook.remove()
    choose = naive_choices(adapters, step, 6)
    chosen = {m: choose(m, number, len(called)) for number, m in enumerate(called)}
    assert len(called) == len(chosen) == 28
    assert set(chosen.values()) == ({"c"} if step == 2 else {"c", "s"})
    parts = {
        name: adapter.select([m for m, choice in chosen.items() if choice == name])
        for name, adapter in adapters.items()
    }
    assert_close(found, dense(parts, {"c": 0.7, "s": 1.0}))


def test_the_choice_changes_within_a_run(flux, bundle):
    rival = KLora(flux, {"c": bundle(1), "s": bundle(2)})
    site = next(iter(rival.sites)).name
    chosen = [rival.choice(site, call, 40) for call in range(40)]
    assert chosen[0] == chosen[5] == "s"  # the factor is 1.275 at first, and rises
    assert chosen[6] == "c"  # from (1.5 · 6 / 40 + 1.275) mod 1.5 = 0
    assert [a != b for a, b in pairwise(chosen)].count(True) <= 2


def test_more_styles_and_strengths(flux, inputs, adapters, dense):
    rival = KLora(flux, adapters)
    sites = [site.name for site in rival.sites]
    assert {rival.choice(site, call, 40) for site in sites for call in (0, 6)} == {"a", "b", "c"}
    for site in sites:  # the content and the best style alone choose alike
        for call in (0, 6, 20):
            full = rival.choice(site, call, 40)
            rival.set_strengths({"b": 0 if full == "c" else 1, "c": 0 if full == "b" else 1})
            assert rival.choice(site, call, 40) == full
            rival.set_strengths({"b": 1, "c": 1})
    with rival:
        rival.set_strengths({"a": 0, "c": 0})
        assert_close(flux(**inputs)[0], dense({"b": adapters["b"]}))
    with KLora(flux, {"a": adapters["a"]}):
        assert_close(flux(**inputs)[0], dense({"a": adapters["a"]}))


def test_entries_are_summed_in_blocks_of_rows(bundle, monkeypatch):
    factors = bundle(1, rank=3).modules["x_embedder"]
    whole = k_lora._sums(factors, 9)
    monkeypatch.setattr("diffusion.rivals.k_lora.ROWS", 5)
    parts = k_lora._sums(factors, 9)
    delta = factors.delta_weight().abs().flatten()
    assert whole.number == parts.number == delta.numel()
    for found in (whole, parts):
        assert found.top == pytest.approx(float(delta.sort().values[-9:].sum()))
        assert found.total == pytest.approx(float(delta.sum()))
    assert k_lora._sums(factors, 10**6).top == pytest.approx(whole.total)


@pytest.mark.parametrize("settings", [{"alpha": 0}, {"beta": -1}, {"gamma": 0}])
def test_settings_are_checked(flux, adapters, settings):
    with pytest.raises(GatesError, match=next(iter(settings))):
        KLora(flux, adapters, **settings)


def test_dora_is_refused(flux, bundle):
    adapter = bundle(1)
    adapter.modules["proj_out"] = adapter.modules["proj_out"]._replace(magnitude=torch.ones(8, 1))
    with pytest.raises(GatesError, match="adapter 'd' is a DoRA at proj_out"):
        KLora(flux, {"c": bundle(2), "d": adapter})
