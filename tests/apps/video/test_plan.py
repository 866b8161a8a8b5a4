import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from apps.video.plan import Columns, Events, ShapeOptions, plan
from core_gates.errors import GatesError
from harness.experiment import Piece
from harness.files.piece import Record
from harness.planning import Device
from recsys.model_folder import load_model, read_settings

SHAPE = ShapeOptions(
    options={"dim": 8, "hidden_dims": [16], "rank": [4, 4], "tower_dims": [8]},
    tasks={"watch": 2, "inter": 1},
    columns=[Columns(count=3, rows=1000, dim=4), Columns(count=2, rows=50, dim=8)],
    dense=5,
    histories=[Events(length=7)],
)
SMALL = {"shape": SHAPE}


@pytest.fixture
def planned(tmp_path):
    place = SimpleNamespace(run_folder=SimpleNamespace(path=tmp_path, training=tmp_path))

    def run(**options):
        plan(place, **options)
        content = json.loads((tmp_path / "plan.json").read_text())
        return {
            section: {name: entry["value"] for name, entry in lines.items()}
            for section, lines in content.items()
        }

    return run


def part(found, beginning):
    return next(lines for name, lines in found.items() if name.startswith(beginning))


def test_figures_of_tables_and_exchange_have_their_closed_form(planned, capsys):
    found = planned(gpus=4, batch_size=100, **SMALL)
    rows, width = {4: 3000, 8: 100}, {4: 3 + 7, 8: 2}  # histories are of the first column
    assert found["shape"]["inputs of the network"] == 3 * 4 + 2 * 8 + 4 + 2 * 5
    assert found["weights"]["tables"] == 3000 * 4 + 100 * 8
    memory = part(found, "memory")
    assert memory["tables"] == 4 * (3000 * 4 + 100 * 8) / 4
    assert memory["row-wise Adagrad"] == 4 * sum(rows.values()) / 4
    assert memory["their Adam moments"] == 8 * found["weights"]["dense"]
    sent = part(found, "sent")
    assert sent["ids"] == 100 * 8 * sum(width.values()) * 3 / 4
    assert sent["rows"] == 100 * 4 * (4 * 10 + 8 * 2) * 3 / 4
    assert sent["all-to-all"] == sent["ids"] + 2 * sent["rows"]
    rates = part(found, "training")
    step = max(rates["arithmetic of a step"], rates["exchange of a step"]) / 1000
    assert rates["rows a second"] == pytest.approx(400 / step)
    hourly = 4 * 2.5 / 3600
    assert rates["price of 10^9 rows"] == pytest.approx(hourly * 1e9 / rates["rows a second"])
    assert "1/4 of the rows, fp32" in capsys.readouterr().out


def test_options_change_what_they_should(planned):
    base, half = planned(gpus=4, **SMALL), planned(gpus=4, distinct=0.5, **SMALL)
    assert part(half, "sent")["all-to-all"] == part(base, "sent")["all-to-all"] / 2
    full = planned(gpus=4, precision="fp32", **SMALL)
    kept = "kept for backward"
    assert full["arithmetic per row"][kept] == 2 * base["arithmetic per row"][kept]
    assert full["arithmetic per row"]["forward"] == base["arithmetic per row"]["forward"]
    slow = planned(gpus=4, device=Device(flops=1e9, utilization=0.2), **SMALL)
    fast = planned(gpus=4, device=Device(flops=1e9, utilization=0.4), **SMALL)
    prices = [part(found, "scoring")["price of 10^9 rows"] for found in (slow, fast)]
    assert prices[0] == pytest.approx(2 * prices[1])
    smaller = planned(gpus=4, shape=replace(SHAPE, network="SharedBottom", options={}))
    assert smaller["weights"]["tables"] == base["weights"]["tables"]
    assert smaller["weights"]["dense"] != base["weights"]["dense"]


def test_a_model_folder_is_planned_as_it_is(planned, model_folder):
    found = planned(model=str(model_folder), gpus=2)
    counts = load_model(model_folder).ranker.count_params()
    assert found["weights"]["tables"] == counts["tables"]
    assert found["weights"]["dense"] == counts["net"] + counts["encoders"]
    assert part(found, "sent")["all-to-all"] > 0


def test_the_model_of_the_run_is_planned_unless_a_shape_is_given(
    planned, model_folder, tmp_path, capsys
):
    (tmp_path / "model").symlink_to(model_folder)
    with pytest.raises(GatesError, match=r"is no model of the training in .*which has no record"):
        planned(gpus=2)
    Record.of(Piece("fit", settings=read_settings(model_folder)["settings"])).write(tmp_path)
    of_run, asked = planned(gpus=2), planned(gpus=2, model=str(model_folder))
    assert of_run == asked
    assert planned(gpus=2, **SMALL) != asked
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("planned: ")]
    assert lines[0].endswith("/model")
    assert lines[2] == "planned: HoME with made-up columns"


def test_one_gpu_sends_nothing_and_too_much_does_not_fit(planned, capsys):
    assert part(planned(gpus=1, device=Device(memory=1e3), **SMALL), "sent")["all-to-all"] == 0
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"gpus": 0}, "ranks must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"distinct": 0.0}, "distinct must lie in"),
        ({"network": "Home"}, "no network 'Home' (did you mean 'HoME'?)"),
        ({"options": {"dims": 3}}, "no option 'dims' (did you mean 'dim'?)"),
        ({"histories": [Events(0)]}, "max_length must be at least 1"),
        ({"tasks": {}}, "the schema has no task"),
        ({"model": "none"}, "none is no model folder"),
    ],
)
def test_wrong_options_are_one_line(planned, wrong, words):
    of_shape = {name: value for name, value in wrong.items() if hasattr(SHAPE, name)}
    others = {name: value for name, value in wrong.items() if name not in of_shape}
    with pytest.raises(GatesError) as caught:
        planned(**others, **({} if "model" in wrong else {"shape": replace(SHAPE, **of_shape)}))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.fault("46 R3")
def test_a_shape_next_to_a_model_is_refused(planned, model_folder):
    with pytest.raises(GatesError, match="--model and --shape are both given"):
        planned(shape=SHAPE, model=str(model_folder))
