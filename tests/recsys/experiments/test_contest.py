"""Who takes part, what each is built of, and that all have one size."""

import pytest

from core_gates.errors import GatesError
from recsys.experiments.contest import Contest
from recsys.experiments.from_settings import nested
from recsys.models.sizing import num_weights
from recsys.ranker import input_width
from recsys.schema import Dense, FeatureSchema, Sparse, Task

RIVALS = ("SingleTask", "SharedBottom", "OMoE", "MMoE", "CGC", "PLE", "AdaTT")
HOME = {"hidden_dims": [32], "rank": [4, 4], "tower_dims": [16]}


def schema(columns=5, dim=8):
    sparse = tuple(Sparse(f"c{number}") for number in range(columns))
    tasks = [Task(f"w{n}", category="watch") for n in range(4)]
    tasks += [Task(f"i{n}", category="inter") for n in range(5)]
    return FeatureSchema(tasks=tuple(tasks), sparse=sparse, dense=(Dense("d"),), dim=dim)


def common(dim=16, **further):
    options = {f"model.options.{name}": value for name, value in {"dim": dim, **HOME}.items()}
    return {"model.net": "HoME", "model.learning_rate": 0.01, **options, **further}


def contest(**methods):
    return Contest(methods={"home": {"net": "HoME"}, **methods})


def weights(settings, found):
    return num_weights(
        settings["model.net"], settings["model.options"], input_width(found), found.tasks
    )


@pytest.mark.parametrize("net", RIVALS)
@pytest.mark.parametrize(("columns", "dim"), [(3, 8), (12, 16), (7, 32)])
def test_rivals_have_the_size_of_the_reference(net, columns, dim):
    found = schema(columns)
    made = contest(rival={"net": net, "options": {"tower_dims": [16]}})
    sizes = [weights(made.settings(m, common(dim), found), found) for m in ("home", "rival")]
    assert abs(sizes[1] / sizes[0] - 1) <= 0.05
    assert made.settings("rival", common(dim), found)["model.options"]["tower_dims"] == [16]


def test_ablations_are_widened_to_the_size_of_the_whole():
    found, made = schema(), contest(bare={"options": {"feature_gate": False, "mask": False}})
    home, bare = (made.settings(m, common(), found) for m in ("home", "bare"))
    assert abs(weights(bare, found) / weights(home, found) - 1) <= 0.05
    assert bare["model.options"]["dim"] != home["model.options"]["dim"]
    kept = {"rank": [4, 4], "tower_dims": [16], "feature_gate": False, "mask": False}
    assert kept.items() <= bare["model.options"].items()


def test_settings_differ_only_where_they_must():
    """The options of the configuration belong to its network; they go from that of another."""
    found = schema()
    made = contest(
        rival={"net": "MMoE", "sized": False, "options": {"num_experts": 3}},
        other={"settings": {"data.source.init_args.x": 2}, "sized": False},
    )
    base = common(patience=9)
    gone = dict.fromkeys(name for name in base if name.startswith("model.options."))
    assert made.settings("home", base, found) == gone | {
        "patience": 2, "model.net": "HoME", "model.options": {"dim": 16, **HOME},
    }  # fmt: skip
    assert made.settings("rival", base, found) == gone | {
        "patience": 2, "model.net": "MMoE", "model.options": {"num_experts": 3},
    }  # fmt: skip
    difference = dict(made.settings("other", base, found))
    assert difference.pop("data.source.init_args.x") == 2
    assert difference == made.settings("home", base, found)


def test_all_are_tuned_in_one_box():
    made = Contest(
        methods={"home": {"net": "HoME"}, "rival": {"net": "MMoE"}},
        space={"model.learning_rate": [1e-3, 1e-1]},
    )
    assert made.boxes() == {m: {"model.learning_rate": (1e-3, 1e-1)} for m in ("home", "rival")}
    assert contest().boxes() == {}
    assert Contest().boxes() == {}


def test_without_methods_the_network_of_the_configuration_takes_part():
    made, found = Contest(reference="ours", space={"model.learning_rate": [0.1, 1.0]}), schema()
    assert list(made.boxes()) == list(made.entries) == ["ours"]
    settings = made.settings("ours", common(), found)
    assert settings["model.net"] == "HoME"
    assert settings["model.options"] == {"dim": 16, **HOME}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trials": 0}, "trials must be at least 1, got 0"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"methods": {"mmoe": {}}}, "reference is 'home'; choose one of mmoe"),
        (
            {"methods": {"home": {"nett": "HoME", "dim": 3}}},
            "method 'home' has dim, nett; known are net, options, settings, sized",
        ),
        (
            {"methods": {"home": {"options": [1]}}},
            r"options of method 'home' are \[1\], expected names with values",
        ),
        (
            {"methods": {"home": {"settings": {"learning_rate": 1}}}},
            "method 'home' sets 'learning_rate', expected a name that begins with model. or",
        ),
        (
            {"methods": {"home": {}}, "space": {"lr": [0.1, 1]}},
            "space has 'lr', expected a name that begins with model. or data. or trainer.",
        ),
        (
            {"methods": {"home": {}}, "space": {"model.learning_rate": [0.1]}},
            r"space of model.learning_rate is \[0.1\], expected two numbers, the ends of a box",
        ),
        ({"baselines": {"home": {}}, "methods": {"home": {}}}, "'home' is a method and a baseline"),
        (
            {"baselines": {"b": {"kindd": "x"}}},
            "kind of the baseline 'b' is ''; choose one",
        ),
    ],
)
def test_mistakes_are_one_line(options, words):
    with pytest.raises(ValueError, match=words) as caught:
        Contest(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"net": "Home"}, "no network 'Home'"),
        ({"net": "MMoE", "options": {"expert": 3}}, "no option 'expert'"),
        (
            {"net": "SharedBottom", "options": {"tower_dims": [4000, 4000]}},
            "cannot have .* weigh",
        ),
    ],
)
def test_networks_that_cannot_be_are_refused(entry, words):
    made = contest(rival=entry)
    with pytest.raises(GatesError, match=words) as caught:
        made.settings("rival", common(), schema())
    assert "\n" not in str(caught.value)
    with pytest.raises(GatesError, match="no method 'rivals'; known are home, rival"):
        made.settings("rivals", common(), schema())


def test_dotted_names_become_nested():
    settings = {"a.b": 1, "a.c.d": 2, "a.c.e": [3], "ab": 4}
    assert nested(settings, "a.") == {"b": 1, "c": {"d": 2, "e": [3]}}
    assert nested(settings, "x.") == {}
