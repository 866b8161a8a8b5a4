"""Every module of the core is built where and as the caller says, also without memory."""

import importlib
import inspect
from dataclasses import is_dataclass

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from core_gates import adapters, attention, conv, features, gates, moe, training
from core_gates.routing import PermutationSearch

D, E, H = 8, 6, 4
WINDOW = (1, 2, 2)
ENOUGH = 16  # numbers that show their spread
ROOMS = [
    "adapters",
    "attention",
    "conv",
    "features",
    "gates",
    "moe",
    "monitor",
    "routing",
    "training",
]
MASK = torch.ones(2, E, dtype=torch.bool).triu(1)

BUILT_OTHERWISE = {"HashGate", "MultiGate", "PermutedGate", "PreGate"}


def layer(**o):
    return nn.Linear(D, H, **o)


MODULES = {
    **{
        name: lambda name=name, **o: getattr(gates, name)(D, E, **o)
        for name in sorted(set(gates.__all__) - BUILT_OTHERWISE)
        if name.endswith("Gate")
    },
    "ActivationGate that learns": lambda **o: gates.ActivationGate(D, E, learn_tau=True, **o),
    "HashGate": lambda **o: gates.HashGate(D, E, num_ids=10, **o),
    "MaskedMixture with free weights": lambda **o: gates.MaskedMixture(
        D, MASK, self_mask=MASK, self_weights="free", **o
    ),
    "MlpGate with norms": lambda **o: gates.MlpGate(D, E, norm="batch", **o),
    "MaskedMixture": lambda **o: gates.MaskedMixture(D, MASK, self_mask=MASK, bias=True, **o),
    "PermutedGate": lambda **o: gates.PermutedGate(
        gates.TopKGate(D, E, **o), search=PermutationSearch(5), **o
    ),
    "SigmoidGate that balances": lambda **o: gates.SigmoidGate(D, E, k=2, balance_rate=0.1, **o),
    "AttnGate": lambda **o: attention.AttnGate(4, 2, D, **o),
    "DecodeAttnGate": lambda **o: attention.DecodeAttnGate(4, 2, D, **o),
    "GatedAttention": lambda **o: attention.GatedAttention(
        D, 4, 2, qk_norm=True, qkv_bias=True, **o
    ),
    "GatedAttentionUnit": lambda **o: attention.GatedAttentionUnit(
        D, 4, 6, window=3, position="simple", **o
    ),
    "GatedCrossAttention": lambda **o: attention.GatedCrossAttention(D, 2, WINDOW, **o),
    "HeadGate": lambda **o: attention.HeadGate(D, 4, 2, bias_init=3.0, **o),
    "MultiHeadEMA": lambda **o: attention.MultiHeadEMA(D, **o),
    "ScaleNorm": lambda **o: attention.ScaleNorm(**o),
    "SeqBoatLayer": lambda **o: attention.SeqBoatLayer(D, 4, 6, position="local", **o),
    "SparseModularActivation": lambda **o: attention.SparseModularActivation(D, **o),
    "SwinBlock": lambda **o: attention.SwinBlock(D, 2, WINDOW, **o),
    "WindowAttention": lambda **o: attention.WindowAttention(D, 2, WINDOW, **o),
    "GatedConv": lambda **o: conv.GatedConv(2, D, 3, **o),
    "PartialConv": lambda **o: conv.PartialConv(2, D, 3, **o),
    "SameConv": lambda **o: conv.SameConv(2, D, 3, **o),
    "FeatureSelectionGate": lambda **o: features.FeatureSelectionGate(D, **o),
    "LowRankFeatureGate": lambda **o: features.LowRankFeatureGate(D, 2, **o),
    "LowRankFeatureGates": lambda **o: features.LowRankFeatureGates(D, 3, 2, **o),
    "PriorGate": lambda **o: features.PriorGate(D, H, **o),
    "TransferGate": lambda **o: features.TransferGate(D, **o),
    "SelfGate": lambda **o: features.SelfGate(D, 2, **o),
    "GatedLoraLinear": lambda **o: adapters.GatedLoraLinear(layer(**o), **o),
    "LoraGate": lambda **o: adapters.LoraGate(D, time="film", **o),
    "RelevanceGate": lambda **o: adapters.RelevanceGate(**o),
    "SoftThreshold": lambda **o: adapters.SoftThreshold(D, **o),
    "SparseLoraLinear": lambda **o: adapters.SparseLoraLinear(layer(**o), D, **o),
    "SparseLowRank": lambda **o: adapters.SparseLowRank(D, H, D, **o),
    "GatedMlp": lambda **o: moe.GatedMlp(D, H, bias=True, **o),
    "NormedExperts": lambda **o: moe.NormedExperts(E, D, [H, D], **o),
    "NormedExperts in groups": lambda **o: moe.NormedExperts([2, 1], D, [H], runs=[1, 2], **o),
    "NormedExperts without norm": lambda **o: moe.NormedExperts(E, D, [H], norm=None, **o),
    "StackedExperts": lambda **o: moe.StackedExperts(E, D, H, bias=True, **o),
    "SyncBatchNorm": lambda **o: training.SyncBatchNorm(D, **o),
}
# What they hold, other modules were given, or they have no parameters at all.
WRAPPERS = {"BlockSelector", "CrossLayerPredictor", "ExpertParallel", "MoELayer", "MultiGate"}
WRAPPERS |= {"GatedSiblings", "OpenGate", "PreGate", "SiblingLinear", "TokenBatchNorm"}
BASES = {"Gate", "LimitedGate", "StagedGate", "SteppedGate"}


def fill(module, value):
    for tensor in module.state_dict().values():
        tensor.fill_(value if tensor.is_floating_point() else 77)


def reset(module):
    torch.manual_seed(0)
    for part in reversed(list(module.modules())):  # a whole after its parts
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    return module.state_dict()


@pytest.mark.fault("core A17")
@pytest.mark.fault("core S9")
@pytest.mark.parametrize("name", MODULES)
def test_device_and_dtype(name):
    make = MODULES[name]
    state = {k: t for k, t in make(device="meta").state_dict().items() if t.numel()}
    assert all(tensor.is_meta for tensor in state.values())
    for dtype in (torch.float64, torch.bfloat16):
        tensors = make(dtype=dtype).state_dict().values()
        floating = {t.dtype for t in tensors if t.is_floating_point() and t.numel()}
        assert floating <= {dtype, torch.float32}  # which state is kept in
    assert {p.dtype for p in make(dtype=torch.float64).parameters()} <= {torch.float64}


@pytest.mark.fault("core A17")
@pytest.mark.fault("core S9")
@pytest.mark.parametrize("name", MODULES)
def test_what_was_built_without_memory_starts_like_the_others(name):
    late = MODULES[name](device="meta").to_empty(device="cpu")
    fill(late, torch.nan)
    state = reset(late)
    again = MODULES[name]()
    fill(again, 7.0)
    assert_close(state, reset(again), rtol=0, atol=0)
    torch.manual_seed(0)
    fresh = MODULES[name]().state_dict()
    assert state.keys() == fresh.keys()
    for key, value in fresh.items():
        found, expected = state[key].double(), value.double()
        assert found.isfinite().all(), key
        if found.numel():
            spread, usual = found.std(correction=0), expected.std(correction=0)
            if found.numel() >= ENOUGH:
                assert_close(spread, usual, rtol=0.5, atol=0.02, msg=key)
            if usual == 0:
                assert_close(found, expected, rtol=0, atol=0, msg=key)


@pytest.mark.fault("core S9")
def test_every_public_module_is_among_them():
    rooms = [importlib.import_module(f"core_gates.{room}") for room in ROOMS]
    public = {kind.__name__ for room in rooms for kind in classes(room)}
    assert public - WRAPPERS - BASES == {name.split()[0] for name in MODULES}


def classes(room):
    offered = (getattr(room, name) for name in room.__all__)
    return [kind for kind in offered if inspect.isclass(kind) and issubclass(kind, nn.Module)]


@pytest.mark.fault("core S9")
@pytest.mark.parametrize("room", ROOMS)
def test_one_thing_has_one_name(room):
    module = importlib.import_module(f"core_gates.{room}")
    for name in module.__all__:
        for parameters in signatures(getattr(module, name)):
            assert not {"temperature", "top_k", "r"} & set(parameters), name
            mask = parameters.get("padding_mask")
            if mask is not None and mask.default is not inspect.Parameter.empty:
                assert mask.kind is inspect.Parameter.KEYWORD_ONLY, name
            for option in ("device", "dtype"):
                if getattr(module, name) in classes(module) and option in parameters:
                    assert parameters[option].default is None, name
                    assert parameters[option].kind is inspect.Parameter.KEYWORD_ONLY, name


def signatures(offered):
    """The parameters of a function, or of the constructor and the public methods of a class."""
    if inspect.isclass(offered):
        made = "" if is_dataclass(offered) else "__init__"  # which holds a mask, and ignores none
        methods = [m for n, m in vars(offered).items() if n == made or not n.startswith("_")]
        functions = [m for m in methods if inspect.isfunction(m)]
    else:
        functions = [offered] if inspect.isfunction(offered) else []
    return [inspect.signature(function).parameters for function in functions]
