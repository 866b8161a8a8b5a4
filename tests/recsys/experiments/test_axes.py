"""Only what takes any number of a box can be tuned."""

from importlib.resources import files

import pytest
import yaml

from core_gates.errors import GatesError
from recsys.baselines import KINDS
from recsys.experiments.axes import check_axes, check_axis
from recsys.experiments.contest import Contest

SETTINGS = {"data.source.class_path": "video_multitask.sources.kuairand_stream.KuaiRandStream"}
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
