"""A configuration that extends another one, and its results, which are found again."""

import pytest

from core_gates import GatesError
from harness.command.configfile import chain, read_config
from harness.experiment import Figures, Run


@pytest.fixture
def folder(tmp_path):
    texts = {
        "base": "model: {dim: 8, depth: 2}\ndata: {rows: 5}\nevaluate: {seeds: [0]}\n",
        "middle": "extends: base\nmodel: {dim: 16}\n",
        "top": "extends: middle.yaml\nevaluate: {seeds: [1, 2]}\n",
        "loop": "extends: pool\n",
        "pool": "extends: loop\n",
        "orphan": "extends: absent\n",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def test_keys_of_the_nearest_file_hold(folder):
    assert read_config(folder / "top.yaml") == {
        "model": {"dim": 16, "depth": 2},
        "data": {"rows": 5},
        "evaluate": {"seeds": [1, 2]},
    }
    assert [path.stem for path in chain(folder / "top.yaml")] == ["top", "middle", "base"]


@pytest.mark.parametrize(
    ("name", "message"), [("loop", "which extends it"), ("orphan", "absent.yaml, which is not")]
)
def test_a_chain_without_end_is_refused(refuses, folder, name, message):
    refuses(GatesError, (message, lambda: read_config(folder / f"{name}.yaml")))


def test_results_of_the_extended_run_are_used_where_settings_agree(tmp_path):
    base = Run(tmp_path / "base", app="toy", settings={"dim": 8})
    top = Run(tmp_path / "top", app="toy", settings={"dim": 8}, extended=["base"])
    other = Run(tmp_path / "other", app="toy", settings={"dim": 16}, extended=["base"])
    base.store("weights", Figures()).keep(base.piece("net", 0), {"score": 0.5})
    assert top.store("weights", Figures()).load(top.piece("net", 0)) == {"score": 0.5}
    assert other.store("weights", Figures()).missing([other.piece("net", 0)])
    top.store("weights", Figures()).keep(top.piece("net", 1), {"score": 0.4})
    assert base.store("weights", Figures()).missing([base.piece("net", 1)])
