"""Experiments from settings, and contests of networks of one size."""

from importlib.resources import files

import polars as pl
import pytest
import torch
import yaml

from core_gates.errors import GatesError
from harness.files.piece import Piece, flatten
from recsys.baselines import KINDS
from recsys.experiments import from_settings
from recsys.experiments.contest import Contest
from recsys.experiments.from_settings import (
    check_axes,
    check_axis,
    data_of,
    mapping_in,
    module_of,
    nested,
    source_of,
    with_whole_mappings,
)
from recsys.models import num_weights
from recsys.ranker import input_width
from recsys.schema import Dense, FeatureSchema, Sparse, Task

GIVEN = {
    "a word": {"dim": 8, "norm": "batch"},
    "nested": {"gate": "SwitchGate", "gate_options": {"num_experts": 4}},
    "nothing": {},
    "none": {"dim": 8, "norm": None},
    "none below": {"gate_options": {"capacity_factor": None}},
    "a dot": {"conditions": {"a.b": "c"}},
    "an empty name": {"conditions": {"": "c"}},
    "a list": {"rank": [4, None]},
}


@pytest.mark.parametrize("options", GIVEN.values(), ids=GIVEN)
def test_a_mapping_comes_back_as_it_was_given(options):
    arguments = {"net": "HoME", "options": options}
    settings = with_whole_mappings(flatten(arguments, "model."), "model.", arguments)
    kept = Piece("home", 0, None, settings).settings  # without what is None
    assert (mapping_in(kept, "model.options"), kept["model.net"]) == (options, "HoME")


def test_names_that_tell_all_stay_dotted():
    """Results that exist keep their settings."""
    arguments = {"net": "HoME", "options": {"dim": 8, "gate_options": {"k": 2}}}
    flat = flatten(arguments, "model.")
    assert with_whole_mappings(flat, "model.", arguments) == flat
    assert set(flat) == {"model.net", "model.options.dim", "model.options.gate_options.k"}


def test_dotted_names_replace_values_of_a_whole_mapping_and_change_no_setting():
    settings = {"model.options.dim": 4, "model.options": {"dim": 8, "norm": None}}
    assert nested(settings, "model.") == {"options": {"dim": 4, "norm": None}}
    assert settings["model.options"] == {"dim": 8, "norm": None}


def test_all_mappings_of_a_configuration_reach_the_module():
    arguments = {
        "net": "HoME",
        "options": {"norm": None},
        "balancing": "uncertainty",
        "encoders": {"last": {"hidden_dim": 3}},
    }
    settings = with_whole_mappings(flatten(arguments, "model."), "model.", arguments)
    module = module_of(Piece("home", 0, None, settings).settings)
    for name, value in arguments.items():
        assert getattr(module, name) == value


def test_a_method_replaces_a_mapping_of_the_configuration():
    schema = FeatureSchema(tasks=(Task("y"),), dense=(Dense("d"),))
    common = {"model.net": "HoME", "model.encoders.last.hidden_dim": 3}
    methods = {"home": {"settings": {"model.encoders": {"last": {"softmax": True}}}}}
    own = Contest(methods=methods).settings("home", common, schema)
    module = module_of(Piece("home", 0, None, {**common, **own}).settings)
    assert module.encoders == {"last": {"softmax": True}}


def test_whole_options_of_the_configuration_belong_to_its_network():
    schema = FeatureSchema(tasks=(Task("y"),), dense=(Dense("d"),))
    common = {"model.net": "HoME", "model.options": {"dim": 8, "norm": None}}
    own = Contest(methods={"home": {"options": {"dim": 4}}}).settings("home", common, schema)
    assert own["model.options"] == {"dim": 4, "norm": None}


SOURCE = {
    "data.source.class_path": "recsys.data.readers.own_table.OwnTable",
    "data.source.init_args.labels": ["y"],
    "data.source.init_args.split": "row",
}


@pytest.fixture
def settings(tmp_path):
    rows = {"c": [n % 7 for n in range(200)], "y": [n % 3 == 0 for n in range(200)]}
    pl.DataFrame(rows).write_csv(tmp_path / "t.csv")
    return {**SOURCE, "data.source.init_args.path": str(tmp_path / "t.csv")}


def test_a_source_has_its_arguments(settings):
    found = source_of({**settings, "data.batch_size": 8, "model.net": "HoME"})
    assert (found.labels, found.split) == (["y"], "row")
    assert len(found.read().train) > 100


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"class_path": "recsys.data.readers.own_table.OwnTabel"}, "has no attribute 'OwnTabel'"),
        ({"class_path": "recsys.data.reader.OwnTable"}, "No module named 'recsys.data.reader'"),
        ({"class_path": "OwnTable"}, "class_path is OwnTable, expected a class with its package"),
        ({"init_args.path_": "x"}, "unexpected keyword argument 'path_'"),
        ({"init_args.split": "tme"}, "split is 'tme'.*time, user, row"),
        ({"init_args.labels": []}, "name the labels"),
    ],
)
def test_a_wrong_class_or_argument_is_one_line(settings, change, words):
    wrong = {**settings, **{f"data.source.{name}": value for name, value in change.items()}}
    with pytest.raises(GatesError, match=words) as caught:
        source_of(wrong)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("data.source")


def test_no_source_is_one_line():
    with pytest.raises(GatesError, match=r"data\.source\.class_path is missing"):
        source_of({"data.batch_size": 8})


def test_tables_are_read_once_in_a_process(settings, monkeypatch):
    reads = []

    def counted(given):
        reads.append(given)
        return source_of(given)

    monkeypatch.setattr(from_settings, "source_of", counted)
    from_settings._read.cache_clear()
    one = data_of({**settings, "data.batch_size": 16})
    two = data_of({**settings, "data.batch_size": 32, "model.net": "MMoE"}, seed=3)
    assert one.tables is two.tables
    assert len(reads) == 1
    assert data_of({**settings, "data.source.init_args.test": 0.2}).tables is not one.tables
    assert (len(reads), (one.batch_size, two.batch_size)) == (2, (16, 32))
    assert (one.seed, two.seed) == (0, 3)


def test_the_seed_of_a_piece_orders_its_rows(settings):
    """Not that of the configuration, which every piece shares."""
    given = {**settings, "data.seed": 5, "data.batch_size": 16}
    batches = [next(iter(data_of(given, seed).train_dataloader())) for seed in (0, 0, 1)]
    assert torch.equal(batches[0].sparse, batches[1].sparse)
    assert not torch.equal(batches[0].sparse, batches[2].sparse)


@pytest.mark.parametrize(
    "options",
    [
        {"model.options": {"dim": 4, "tower_dims": [3]}},
        {"model.options.dim": 4, "model.options.tower_dims": [3]},
    ],
)
def test_options_of_a_network_may_be_nested_or_dotted(settings, options):
    module = module_of({"model.net": "MMoE", "model.learning_rate": 0.5, **options, **settings})
    assert (module.options, module.learning_rate) == ({"dim": 4, "tower_dims": [3]}, 0.5)
    ranker = module.build(data_of(settings).transform)
    assert ranker.spec.name == "MMoE"
    assert {"dim": 4}.items() <= ranker.spec.options.items()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"model.nett": "MMoE"}, "model: .*unexpected keyword argument 'nett'"),
        ({"data.batchsize": 3}, "data: .*unexpected keyword argument 'batchsize'"),
        ({"data.batch_size": 0}, "data: batch_size must be at least 1"),
    ],
)
def test_unknown_settings_are_one_line(settings, wrong, words):
    given = {**settings, **wrong}
    with pytest.raises(GatesError, match=words) as caught:
        module_of(given) if "model" in words else data_of(given)
    assert "\n" not in str(caught.value)


SETTINGS = {"data.source.class_path": "video_multitask.sources.kuairand.KuaiRandStream"}
FRACTIONS = (
    "model.learning_rate", "model.embedding_l2", "trainer.gradient_clip_val",
    "data.source.init_args.scored",
)  # fmt: skip
WRONG = {
    "trainer.max_epochs": "takes no numbers with fractions",
    "trainer.precision": "takes no numbers with fractions",
    "data.batch_size": "takes no numbers with fractions",
    "data.order": "takes no numbers with fractions",
    "data.source.init_args.window": "takes no numbers with fractions",
    "model.net": "takes no numbers with fractions",
    "model.options.dim": "every method has its own options",
    "model.learning_rat": "does not exist; what can be tuned there: learning_rate, ",
    "data.source.init_args.y": "does not exist; what can be tuned there: scored",
}


@pytest.mark.fault("video V12")
@pytest.mark.parametrize("name", WRONG)
def test_whole_numbers_words_and_unknown_names_are_refused(name):
    check_axes(dict.fromkeys(FRACTIONS), SETTINGS)
    with pytest.raises(GatesError) as caught:
        check_axes({**dict.fromkeys(FRACTIONS), name: [1, 2]}, SETTINGS)
    assert f"contest.space names {name}, " in str(caught.value)
    assert WRONG[name] in str(caught.value)


CONFIGS = sorted(p.name for p in (files("apps.video") / "configs").iterdir() if "yaml" in p.name)


@pytest.mark.parametrize("config", CONFIGS)
def test_what_configurations_tune_can_be_tuned(config):
    content = yaml.safe_load((files("apps.video") / "configs" / config).read_text())
    contest = Contest(**content.get("contest", {}))
    source = content["data"]["source"]["class_path"] if "data" in content else None
    check_axes(contest.space, {"data.source.class_path": source})
    for entry in contest.baselines.values():
        for axis in entry.get("space", {}):
            check_axis("space", axis, KINDS[entry["kind"]], axis)


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
    entries = {"home": {}, "set": {"settings": {"model.learning_rate": 0.1}}}
    box = {"model.learning_rate": [1e-3, 1e-1]}
    assert list(Contest(methods=entries, space=box).boxes()) == ["home"]
    both = Contest(methods=entries, space={**box, "model.embedding_l2": [1e-4, 1e-2]}).boxes()
    assert (both["set"], Contest().boxes()) == ({"model.embedding_l2": (1e-4, 1e-2)}, {})


def test_without_methods_the_network_of_the_configuration_takes_part():
    made, found = Contest(reference="ours", space={"model.learning_rate": [0.1, 1.0]}), schema()
    assert list(made.boxes()) == list(made.entries) == ["ours"]
    settings = made.settings("ours", common(), found)
    assert (settings["model.net"], settings["model.options"]) == ("HoME", {"dim": 16, **HOME})


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
