"""What all rivals promise: one interface, the model as it was, no nesting, one-line refusals."""

import pytest
import torch
from torch.testing import assert_close

from core_gates.errors import GatesError
from diffusion.fusion import GatedFusion
from diffusion.fusion.protocol import Fusion
from diffusion.lora_file import LoraBundle
from diffusion.rivals import RIVALS, make_rival

EQUAL_RANKS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")


@pytest.fixture
def made(flux, adapters, bundle):
    """``made(name)``: a rival for adapters that suit it."""

    def make(name, given=None):
        if given is None:
            given = {"a": adapters["a"], "b": bundle(2, where="attn")}
            given |= {"c": adapters["c"]}
        return make_rival(name, flux, given).double()

    return make


def test_gated_fusion_is_one_as_well(flux, adapters):
    assert isinstance(GatedFusion(flux, adapters), Fusion)
    assert GatedFusion(flux, adapters).at(0, 1) is None


def test_every_rival_is_described():
    assert {"sum", "mean", "cat", "ties", "switch", "composite", "k_lora"} < set(RIVALS)
    for rival in RIVALS.values():
        assert rival.summary.isprintable()
        assert len(rival.summary) < 90
    assert [name for name, rival in RIVALS.items() if rival.sees_pair] == ["lora_hub"]


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_change_the_model_while_attached_alone(flux, inputs, made, name):
    plain, names = flux(**inputs)[0], list(flux.state_dict())
    rival = made(name)
    assert isinstance(rival, Fusion)
    assert rival.model is flux
    assert not any(parameter is p for p in flux.parameters() for parameter in rival.parameters())
    assert bool(list(rival.parameters())) == RIVALS[name].trainable
    assert torch.equal(flux(**inputs)[0], plain)
    with rival:
        rival.at(1, 4)
        found = flux(**inputs)[0]
        assert not torch.allclose(found, plain, atol=1e-3)
        assert list(flux.state_dict()) == names
        rival.set_strengths(dict.fromkeys(rival.adapters, 0))
        assert_close(flux(**inputs)[0], plain)
        rival.set_strengths(dict.fromkeys(rival.adapters, 1))
        assert_close(flux(**inputs)[0], found)
    assert torch.equal(flux(**inputs)[0], plain)
    with rival:
        assert_close(flux(**inputs)[0], found)


@pytest.mark.parametrize("name", RIVALS)
def test_an_error_detaches_and_a_nested_use_is_refused(flux, inputs, made, name):
    plain = flux(**inputs)[0]
    rival, other = made(name), made("sum")

    def fail():
        with rival:
            for attempt in (rival.attach, other.attach, lambda: made(name)):
                with pytest.raises(GatesError, match="has adapters already"):
                    attempt()
            flux(**inputs | {"hidden_states": inputs["hidden_states"][:, :, :-1]})

    with pytest.raises(RuntimeError):
        fail()
    assert not rival.attached
    assert torch.equal(flux(**inputs)[0], plain)


@pytest.mark.parametrize("name", RIVALS)
def test_misfits_are_refused_and_the_old_adapters_stay(flux, inputs, made, bundle, name):
    rival = made(name)
    given = rival.adapters
    wide = bundle(1).modules["proj_out"]._replace(down=torch.ones(2, 99, dtype=torch.float64))
    names = list(given)[:-1]
    for bad in (bundle(5, family="sd3"), LoraBundle("flux", {"proj_out": wide})):
        with pytest.raises(GatesError) as caught:
            made(name, dict.fromkeys(names, given["a"]) | {"bad": bad})
        assert str(caught.value).isprintable()
        with rival:
            found = flux(**inputs)[0]
            with pytest.raises(GatesError):
                rival.set_adapters(dict.fromkeys(names, given["a"]) | {"bad": bad})
            assert rival.attached
            assert rival.adapters == given
            assert_close(flux(**inputs)[0], found)
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(GatesError, match="finite"):
            rival.set_strengths({"a": wrong})


@pytest.mark.parametrize("name", [n for n, rival in RIVALS.items() if rival.static])
def test_static_rivals_are_one_adapter(flux, inputs, made, dense, name):
    rival = made(name)
    with rival:
        rival.set_strengths({"b": 0.5})
        found = flux(**inputs)[0]
    assert_close(dense({"one": rival.bundle}), found)


def test_unknown_rivals_are_refused(flux, adapters, refuses):
    refuses(
        GatesError,
        ("rival is 'summ'; choose one of sum, mean", lambda: make_rival("summ", flux, adapters)),
        (
            "weight is nan, expected a finite number",
            lambda: make_rival("ties", flux, adapters, weight=float("nan")),
        ),
    )
    assert all(name in RIVALS for name in EQUAL_RANKS)
