"""Mappings among settings: what is built of them is what was given."""

import pytest

from harness.experiment.piece import Piece, flatten
from recsys.experiments.building import module_of
from recsys.experiments.contest import Contest
from recsys.experiments.mappings import mapping_in, nested, with_whole_mappings
from recsys.schema import Dense, FeatureSchema, Task

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
    assert mapping_in(kept, "model.options") == options
    assert kept["model.net"] == "HoME"


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
        "balancing": "gradnorm",
        "balancing_options": {"alpha": 1.25},
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
