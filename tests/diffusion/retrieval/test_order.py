"""Subjects and styles by weights: made-up zoos in which styles change late layers most."""

import numpy as np
import pytest
import torch

from diffusion.lora_file import Factors, LoraBundle
from diffusion.retrieval.order import RoleOrder, _features, _with_copies, described, fit_order

LAYERS = [f"transformer_blocks.{block}.attn.to_q" for block in range(12)]
SIZE = 16


def adapter(kind, seed, rank=4, contrast=1.0, scale=1.0):
    """Norms that fall over the layers for a subject and rise for a style, in random directions."""
    draw = torch.Generator().manual_seed(seed)
    slope = torch.linspace(1, -1, len(LAYERS)) * (contrast if kind == "subject" else -contrast)
    modules = {}
    for name, level in zip(LAYERS, slope, strict=True):
        down, up = (torch.randn(*size, generator=draw) for size in ((rank, SIZE), (SIZE, rank)))
        noise = 0.3 * torch.randn((), generator=draw)
        modules[name] = Factors(down, up * (level + noise).exp(), scale)
    return LoraBundle("flux", modules)


def spectral(kind, seed, rank=4, contrast=0.5):
    """The same, and all but one component are weak in a subject, which one of rank 1 hides."""
    one = adapter(kind, seed, rank, contrast)
    falls = torch.tensor([1.0] + [0.3 if kind == "subject" else 0.8] * (rank - 1))
    return LoraBundle(
        "flux", {name: own._replace(up=own.up * falls) for name, own in one.modules.items()}
    )


def zoo(seed, count=8, make=adapter, **options):
    """Subjects and styles."""
    return [
        [make(kind, 1000 * seed + 100 * start + number, **options) for number in range(count)]
        for start, kind in enumerate(("subject", "style"))
    ]


@pytest.fixture(scope="module")
def order():
    return RoleOrder(fit_order(*zoo(1)))


def test_features_are_those_of_the_dense_change():
    bundle = adapter("subject", 3, scale=-0.7)
    found = described(bundle, [*LAYERS, "absent"])
    for row, name in zip(found, LAYERS, strict=False):
        values = np.linalg.svd(bundle.delta_weight(name).double().numpy(), compute_uv=False)
        assert row[0].item() == pytest.approx(np.log(np.linalg.norm(values)), rel=1e-5)
        assert row[1].item() == pytest.approx(values[1] / values[0], rel=1e-4)
    assert found[-1].isnan().all()


@pytest.mark.parametrize(
    ("factors", "known"),
    [
        (Factors(torch.ones(1, 4), torch.ones(5, 1)), [True, False]),  # rank 1
        (Factors(torch.zeros(2, 4), torch.ones(5, 2)), [False, False]),
        (Factors(torch.full((2, 4), torch.nan), torch.ones(5, 2)), [False, False]),
        (Factors(torch.full((2, 4), 3e38), torch.ones(5, 2), 3e38), [True, True]),
        (Factors(torch.rand(9, 4), torch.rand(5, 9)), [True, True]),  # a rank above the sizes
    ],
)
def test_what_a_layer_does_not_show_is_missing(factors, known):
    found = described(LoraBundle("flux", {"layer": factors}), ["layer"])
    assert found.isfinite().tolist() == [known]


def test_another_zoo_is_ranked_whatever_its_scale_rank_and_layers(order):
    rng = np.random.default_rng(0)
    for options in ({}, {"rank": 2}, {"rank": 8}, {"scale": 1e-3}, {"scale": 50.0}):
        subjects, styles = zoo(2, **options)
        found = order.verdicts(subjects, styles)
        assert (found["right"] > 0.9, found["wrong"]) == (True, 0)
    kept = [rng.permutation(LAYERS)[:9].tolist() for _ in subjects]
    some = [[one.select(own) for one, own in zip(kind, kept, strict=True)] for kind in zoo(2)]
    found = order.verdicts(*some)
    assert found["right"] > 0.5
    assert found["wrong"] == 0
    given = {"b": styles[0], "c": styles[1], "a": subjects[0]}
    assert (order.ranked(given)[0], sorted(order.ranked(given))) == ("a", ["a", "b", "c"])
    assert order.ranked({"b": styles[0]}) == ["b"]


def test_what_weights_do_not_decide_is_asked(order):
    same = adapter("subject", 7)
    assert order.ranked({"a": same, "b": same}) is None
    other = LoraBundle("flux", {"elsewhere": Factors(torch.ones(2, 4), torch.ones(4, 2))})
    assert order.ranked({"a": same, "b": other}) is None
    assert order.ranked({"a": other, "b": other}) is None


def test_the_less_is_seen_the_clearer_it_has_to_be():
    order = RoleOrder(fit_order(*zoo(1)))
    subject, style = adapter("subject", 8), adapter("style", 9)
    for kept, fraction in ((style, 1.0), (style.select(LAYERS[::2]), 0.5)):
        gap = float(order.scores([subject, kept])[0].diff().abs())
        for factor, expected in ((0.99, ["a", "b"]), (1.01, None)):
            order.margin = factor * fraction * gap
            assert order.ranked({"b": kept, "a": subject}) == expected


def test_pairs_are_counted_as_they_are_ranked(order):
    subjects, styles = zoo(3, count=5, contrast=0.1)
    ranked = [order.ranked({"style": b, "subject": a}) for a in subjects for b in styles]
    names = ["asked" if one is None else one[0] for one in ranked]
    found = order.verdicts(subjects, styles)
    assert found["right"] == pytest.approx(names.count("subject") / 25)
    assert found["wrong"] == pytest.approx(names.count("style") / 25)
    assert found["asked"] == pytest.approx(names.count("asked") / 25)
    assert len(set(names)) > 1


def test_the_margin_is_above_every_mistake_on_adapters_left_out():
    subjects, styles = zoo(4, count=6, contrast=0.15)  # hardly differ
    found = []
    for one in [*subjects, *styles]:
        rest = [[b for b in own if b is not one] for own in (subjects, styles)]
        found.append(float(RoleOrder(fit_order(*rest, copies=0)).scores([one])[0]))
    gaps = np.subtract.outer(found[:6], found[6:])
    assert gaps.min() < 0
    wanted = max(np.quantile(gaps, 0.01) / 2, -gaps.min())
    styles.insert(0, styles.pop(int(gaps.min(0).argmin())))  # whatever the order
    margin = RoleOrder(fit_order(subjects, styles, copies=0)).margin
    assert margin == pytest.approx(wanted, rel=1e-6)


def test_an_adapter_is_left_out_together_with_its_copies():
    """Otherwise adapters that do not differ would seem to: the fit would know each by heart."""
    for seed in (1, 11):
        same = zoo(seed, contrast=0.0)
        margins = [RoleOrder(fit_order(*same, copies=copies)).margin for copies in (0, 12)]
        assert margins[0] > 1
        assert margins[1] > 0.7 * margins[0]


def test_copies_of_lower_rank_let_adapters_of_rank_1_be_ordered():
    """Ratios of singular values tell everything in the zoo, and are missing at rank 1."""
    for seed in (1, 11):
        without, with_copies = (
            RoleOrder(fit_order(*zoo(seed, make=spectral), copies=copies)) for copies in (0, 12)
        )
        for other in (2, 3):
            whole, thin = (zoo(other, make=spectral, rank=rank) for rank in (4, 1))
            assert without.verdicts(*whole)["right"] == with_copies.verdicts(*whole)["right"] == 1
            right = [order.verdicts(*thin)["right"] for order in (without, with_copies)]
            assert right[1] > right[0] + 0.1
            assert with_copies.verdicts(*thin)["wrong"] == 0


def test_copies_keep_half_of_the_layers_or_more_and_the_first_singular_values():
    values = torch.rand(400, 5, dtype=torch.float64).sort(1, descending=True).values
    own, *copies = _with_copies(values, 60, torch.Generator().manual_seed(1))
    assert torch.equal(own, _features(values))
    cut = [_features(values[:, :rank]) for rank in range(1, 6)]
    fractions, ranks = [], set()
    for copy in copies:
        kept = copy[:, 0].isfinite()
        fractions.append(float(kept.double().mean()))
        (rank,) = (
            number
            for number, one in enumerate(cut, 1)
            if torch.equal(copy[kept].nan_to_num(), one[kept].nan_to_num())
        )
        ranks.add(rank)
        assert copy[~kept].isnan().all()
    assert ranks == {1, 2, 3, 4, 5}
    assert 0.4 < min(fractions) < 0.6 < 0.9 < max(fractions)


def test_copies_are_the_same_each_time(order):
    torch.manual_seed(5)
    again = RoleOrder(fit_order(*zoo(1)))
    assert torch.equal(again.weights, order.weights)
    assert again.margin == order.margin


def test_tensors_are_all_of_it(order, tmp_path):
    from safetensors.torch import load_file, save_file

    learned = fit_order(*zoo(1))
    assert sorted(learned) == sorted([*LAYERS, "decision"])
    save_file(learned, tmp_path / "order.safetensors")
    again = RoleOrder(load_file(tmp_path / "order.safetensors"))
    bundles = [one for own in zoo(2) for one in own]
    assert torch.equal(again.scores(bundles)[0], order.scores(bundles)[0])
    assert again.margin == order.margin > 0


def test_two_styles_or_two_subjects_are_not_ranked(order, monkeypatch):
    """However far apart their scores are: one would be taken for what it is not."""
    monkeypatch.setattr(order, "margin", 0.0)
    for kind in zoo(2):
        scores = order.scores(kind)[0]
        first, last = int(scores.argmax()), int(scores.argmin())
        assert scores[first] - scores[last] > 0
        assert (scores[first] > 0) == (scores[last] > 0)
        assert order.ranked({"a": kind[first], "b": kind[last]}) is None
