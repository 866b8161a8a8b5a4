import json

from weather.experiments.experiment import differences


def described(stirring, **facts):
    return json.dumps({"model": f"ShallowWater(truncation=12, stirring={stirring})", **facts})


def test_only_what_differs_is_named():
    found, expected = described(5e-10, cycles=24, seed=0), described(4e-10, cycles=420, seed=0)
    assert (
        differences(found, expected)
        == "cycles 24 instead of 420, model.stirring 5e-10 instead of 4e-10"
    )


def test_absent_facts_are_named():
    assert differences(described(1), described(1, settling=8)) == "settling absent instead of 8"


def test_what_is_no_description_is_shown_as_it_is():
    assert differences("no nature run", "{}") == "no nature run instead of {}"
