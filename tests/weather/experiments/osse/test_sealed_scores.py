"""A sealed world, corrections of interpolation, and what their scores say of missing networks."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from core_gates.errors import GatesError
from harness.evidence import Row
from harness.experiment.tuning import first_trials, more_trials
from harness.files.piece import Record
from tests.weather.experiments.osse.conftest import experiment, world
from weather.baselines.covariance import SampleCovariance
from weather.baselines.optimal_interpolation import CorrectedInterpolation
from weather.experiments.experiment import built
from weather.experiments.osse import osse_experiment, sealed_world
from weather.experiments.osse.osse_cycles import OsseCycles
from weather.experiments.osse.osse_scores import OsseScores
from weather.experiments.osse.recorded_errors import tapered
from weather.experiments.osse.sealed_world import seal
from weather.experiments.twin.scenarios import gap_of, observed, osse_tasks
from weather.experiments.twin.twin_cycles import settled
from weather.models.adas.analysis import nearness
from weather.observations.gridded import GriddedObservations
from weather.operations.analyses import AnalysisOptions, Assimilation

METHODS = ("free_run", "oi", "damped_oi", "adas_oi", "adas_increment")


def scored(experiment, seeds=(0, 1), tasks=("0.1/perfect", "0.1/error")):
    scores = experiment.scores((0.1,), None, seeds, (), {}, quick=False)
    for work in scores.works():
        if work.task in tasks and work.method in METHODS:
            scores.take(work, scores.compute(work))
    return scores


def test_timelines_start_from_the_day_before_and_a_difference_of_two_members(folder):
    own = experiment(folder).world
    for period in ("test", "training", "choice"):
        error = own.first_background(period)[:, 0] - own.states(period)[0]
        pool = own.states("training")
        gaps = (pool[:, None, :, None] - pool[None, :, None, :]) * 0.1  # (T,T,B,B,C,H,W)
        for member, one in enumerate(error):
            apart = (gaps - one).abs().amax((-3, -2, -1))
            times, others = divmod(int(apart.argmin()), 16)
            assert float(apart.min()) < 1e-3, (period, member, times)
            assert others // 4 != others % 4  # of different members


def test_the_sealed_world_has_its_seed_in_everything_but_the_climate(folder):
    one = experiment(folder)
    other = one.world.sealed(5, 5, folder / "other.zarr")
    other.prepare()
    sealed = one.sealed
    assert not torch.equal(sealed.truth("test"), other.truth("test"))
    assert not torch.equal(sealed.networks("test", 0.1), other.networks("test", 0.1))
    assert not torch.equal(
        sealed.first_background("test") - sealed.states("test")[0][:, None],
        other.first_background("test") - other.states("test")[0][:, None],
    )
    assert_close(sealed.climatology(), one.world.climatology())
    assert not set(one.test_objects()) & set(one.training_objects())
    assert not set(one.test_objects()) & set(other.objects("test"))
    works = one.scores((0.1,), None, (0,), (), {}).works()
    assert {work.scope[0] for work in works} == {("world-", f"{sealed.seed:016x}")}


def test_the_seal_is_broken_by_weights_and_settings_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(sealed_world, "files", lambda _: tmp_path)
    kept = tmp_path / "weights/nets/weights/a-s0/weights.safetensors"
    kept.parent.mkdir(parents=True)
    found = [seal("nets/weights/a-s*")]
    for content in (b"one", b"two"):
        kept.write_bytes(content)
        found.append(seal("nets/weights/a-s*"))
    chosen = tmp_path / "weights/osse/choices/oi-s0/result.json"
    chosen.parent.mkdir(parents=True)
    for scale in (1.0, 2.0):
        chosen.write_text(json.dumps({"setting": {"scale": scale}, "trials": []}))
        found.append(seal("nets/weights/a-s*", "osse/choices/*"))
    chosen.write_text(json.dumps({"trials": [{}], "setting": {"scale": scale}}))
    (chosen.parent / "record.json").write_text("another revision")
    other = kept.parents[1] / "b-s0/weights.safetensors"
    other.parent.mkdir()
    other.write_bytes(b"of a form that takes no part")
    assert seal("nets/weights/a-s*", "osse/choices/*") == found[-1]
    assert len(set(found)) == 5
    assert all(0 <= seed < 2**64 for seed in found)


def test_an_outage_is_silent_for_ten_days_not_at_once_for_all(folder):
    own = world(folder, cycles=180)
    rows = range(4)
    (task, *_) = osse_tasks("outage", (0.1,))
    own._nature = torch.zeros(184, own.num_members, 3, 16, 32)
    heard = torch.stack(
        [found.mask.flatten(1).any(1) for found in observed(task, own, "training", rows)]
    )
    assert (~heard).sum(0).tolist() == [40] * 4
    for row in rows:
        assert (~heard[:, row]).nonzero().flatten().tolist() == list(gap_of(row))
    assert len({gap_of(row).start for row in rows}) > 1


def test_mixed_reports_are_the_same_in_all_three_tasks(folder):
    own = experiment(folder, "mixed").world
    declared, withheld, denied = (
        next(iter(observed(task, own, "training", range(4)))) for task in osse_tasks("mixed", ())
    )
    sd = own.error_sd[:, None, None].expand_as(declared.errors)
    poor = declared.mask & (declared.errors > 2 * sd)
    assert_close(declared.errors[poor], (5 * sd)[poor])
    assert 0.3 < float(poor.sum() / declared.mask.sum()) < 0.7
    assert bool((withheld.mask == (declared.mask & ~poor)).all())
    assert_close((denied.values, denied.errors[denied.mask]), (declared.values, sd[denied.mask]))
    truth = own.truth("training")[0]
    off = ((declared.values - truth) / declared.errors)[declared.mask]
    assert 0.8 < float(off.square().mean()) < 1.2


class Add:
    members, guided = 1, False

    def __init__(self, what):
        self.what = what

    def analyze(self, background, observations):
        seen = observations.mask.flatten(1).any(1).view(-1, 1, 1, 1, 1)
        return torch.where(seen, background + self.what, background)


def test_a_correction_adds_shares_and_keeps_what_is_not_observed(refused):
    background = torch.randn(3, 1, 2, 4, 8, generator=torch.manual_seed(0))
    errors = torch.full((3, 2, 4, 8), torch.inf)
    errors[0, 0, 1, 1] = errors[2, 1, 3, 5] = 1.0
    reports = GriddedObservations(torch.zeros_like(errors), errors)
    method = CorrectedInterpolation(Add(4.0), Add(10.0), alpha=0.3, beta=0.5)
    found = method.analyze(background, reports)
    assert_close(found[[0, 2]], background[[0, 2]] + 5.0)
    assert torch.equal(found[1], background[1])
    alone = CorrectedInterpolation(Add(4.0)).analyze(background, reports)
    assert_close(alone[0], background[0] + 4.0)
    for options, message in (({"alpha": 0.5}, "no interpolation"), ({"beta": -1.0}, "negative")):
        refused(message, CorrectedInterpolation, Add(4.0), **options, error=ValueError)


def test_a_tapered_covariance_is_that_of_the_samples_times_gaspari_cohn(folder):
    made = experiment(folder)
    task = made.tasks((0.1,))[0]
    errors = made.recorded().recording(task, 1).errors
    errors = errors - errors.mean(0)
    expected = SampleCovariance(errors, made.grid, localization_km=3000.0).dense().matrix
    matrix = errors.flatten(1).T @ errors.flatten(1) / (len(errors) - 1)
    assert_close(tapered(matrix, made.grid, 3000.0).matrix, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.costly("two networks cycle for a week with both forecast models")
def test_scores_compare_with_interpolation_on_every_timeline(folder):
    made = experiment(folder)
    scores = scored(made, tasks=("0.1/perfect",))
    rows = {(r.method, r.task, r.metric): r for r in scores.rows()}
    sparse = "0.1/perfect"
    own, oi = scores.errors[sparse, "adas_oi"], scores.errors[sparse, "oi"]
    assert own.shape == (2, 5, 3)  # both networks on all timelines
    logs = own[..., 0].double().log().mean(0) - oi[0, :, 0].double().log()
    row = rows["adas_oi", sparse, "over_oi"]
    assert row.value == pytest.approx(float(logs.mean().exp()))
    assert row.low <= row.value <= row.high
    assert row.n == 5
    damped = scores.errors[sparse, "damped_oi"][0, :, 0].double().log()
    ratio = (own[..., 0].double().log().mean(0) - damped).mean().exp()
    assert rows["adas_oi", sparse, "over_damped_oi"].value == pytest.approx(float(ratio))
    pooled = (
        own[..., 0].double().square().mean(0).mean().sqrt()
        / oi[..., 0].double().square().mean().sqrt()
    )
    assert rows["adas_oi", sparse, "rms_over_oi"].value == pytest.approx(float(pooled))
    assert rows["adas_oi", sparse, "milliseconds"].value > rows["oi", sparse, "milliseconds"].value
    assert rows["adas_oi", sparse, "milliseconds_over_oi"].value > 2
    assert 0.3 < rows["oi", sparse, "milliseconds_over_oi"].value < 3
    bars = {bar.name: bar for bar in scores.bars()}
    assert bars[f"adas_oi over damped_oi, {sparse}"].value == pytest.approx(float(ratio))
    assert bars[f"free run over climatological sd, {sparse}"].met is not None
    told = {row.note for row in scores.rows() if row.note}
    assert all("gates weather fit --config" in note for note in told)
    assert any("gated false" in note for note in told)  # no ungated network in this folder


def test_without_any_network_bars_are_not_measured(folder, refuses):
    made = experiment(folder)
    made.networks = str(folder / "nowhere")
    scores = scored(made, tasks=())
    scores.errors["0.1/perfect", "free_run"] = torch.ones(1, 5, 3)
    bars = [bar for bar in scores.bars() if bar.name.startswith("adas_oi")]
    assert {(bar.met, math.isnan(bar.value)) for bar in bars} == {(None, True)}
    refuses(
        GatesError,
        ("not trained: run `gates weather fit", lambda: made.network("ungated", 0)),
        ("trains corrections of interpolation: add --form adas_oi", lambda: made.check()),
    )


def test_single_reports_and_silence(folder, monkeypatch):
    monkeypatch.setattr(osse_experiment, "QUICK_CYCLES", 30)
    made = experiment(folder, "outage")
    scores = scored(made, seeds=(0,), tasks=("single_report",))
    assert set(scores.reports) == {"oi", "adas_oi", "adas_increment"}
    ratios, timelines = scores.reports["oi"]
    assert timelines.tolist() == [0, 1, 2, 3, 4] * 4
    assert 0.5 < float(ratios.mean()) < 1.1
    row = next(r for r in scores.rows() if r.method == "oi" and r.metric == "over_background")
    assert row.value == pytest.approx(float(ratios.double().log().mean().exp()))


def test_a_trial_of_a_correction_builds_on_the_choice_of_interpolation(folder):
    made = experiment(folder)
    first = made.trials((0.1,), None, cycles=4, settings={})
    assert not [name for name in first if name.startswith("adas_oi")]
    assert first["oi@0.1/perfect"].share == 2
    chosen = {"scale": 0.3, "length_km": 5000.0, "turn": 3.0}
    trials = made.trials((0.1,), None, cycles=4, settings={"oi@0.1/perfect": chosen})
    trial = trials["adas_oi@0.1/perfect"]
    assert (trial.builds_on["interpolation"], trial.axes) == (chosen, ["alpha", "beta"])
    assert trial.space[0] == {"alpha": 1.0, "beta": 0.0}
    assert trial.score(trial.space[0]) == 1.0  # interpolation itself, to the last bit
    damped, plain = trials["damped_oi@0.1/perfect"], trials["oi@0.1/perfect"].score(chosen)
    assert damped.builds_on == {"interpolation": chosen}
    assert damped.score(dict(damped.plain)) == pytest.approx(plain, rel=1e-4)
    for axis, value in (("relative_scale", 0.3), ("turn", 1.0), ("alpha", 0.5)):
        assert damped.score({**damped.plain, axis: value}) != pytest.approx(plain, rel=1e-2), axis


@pytest.mark.fault("46 WEATHER")
def test_damped_interpolation_is_searched_where_its_settings_have_a_meaning(folder):
    chosen = {"scale": 0.3, "length_km": 5000.0, "turn": 0.75}  # of the first recording
    trials = experiment(folder).trials((0.1,), None, cycles=4, settings={"oi@0.1/error": chosen})
    space, _, share, _, plain = trials["damped_oi@0.1/error"]
    assert plain == {"relative_scale": 1.0, "turn": 1, "alpha": 1.0}
    first, more = first_trials(space, 12 * share, 0, plain), more_trials(space, 24, 0, plain)
    assert ((len(first), len(more)), {setting["turn"] for setting in first}) == ((15, 9), {1, 2})
    assert {setting["turn"] for setting in more} == {1}
    assert max(setting["alpha"] for setting in more) <= 1
    assert len({setting["alpha"] for setting in more}) == 9


def test_networks_of_all_seeds_share_a_trial_where_reports_are_sparse(folder, monkeypatch):
    """The score is the upper end of the interval over timelines, averaged over networks."""
    made = experiment(folder)
    setting = {"scale": 0.3, "length_km": 5000.0, "turn": 3.0}
    rivals, (task, _) = made._rivals(made.world), made.tasks((0.1,))
    runs = OsseCycles(made.world, rivals, 6)
    base = rivals.interpolation(task, setting)
    shares = {"alpha": 0.5, "beta": 0.8}
    logs, names = {}, {}
    for seeds in ((0,), (1,), (0, 1)):
        monkeypatch.setattr(osse_experiment, "SEEDS", seeds)
        monkeypatch.setattr(osse_experiment, "SPARSE", 0.2)
        trial = made.trials((0.1,), None, cycles=6, settings={"oi@0.1/perfect": setting})[
            "adas_oi@0.1/perfect"
        ]
        names[seeds] = trial.builds_on["weights"]
        methods = [rivals.corrected("adas_oi", s, task).build(setting | shares) for s in seeds]
        own, other = (
            settled(runs.run(task, "oi", one, "choice"), runs.sd) for one in (methods[0], base)
        )
        logs[seeds] = (own / other).log().mean(1)
        if len(seeds) == 2:
            logs[seeds] = (logs[0,] + logs[1,]) / 2
        assert len(logs[seeds]) == 2  # timelines for tuning and validation
        upper = logs[seeds].mean() + 1.96 * logs[seeds].std() / 2**0.5
        assert trial.score(shares) == pytest.approx(float(upper.exp()), rel=1e-3)
    assert not torch.equal(logs[0,], logs[1,])
    assert len(set(names.values())) == 3
    monkeypatch.setattr(osse_experiment, "SPARSE", 0.05)
    trial = made.trials((0.1,), None, cycles=4, settings={"oi@0.1/perfect": setting})[
        "adas_oi@0.1/perfect"
    ]
    assert trial.builds_on["weights"] == names[0,]


def kept_settings(**settings):
    """What `tune` would have left, by task; its names are those that it was asked for."""
    chosen = {f"{name}@0.3/perfect": setting for name, setting in settings.items()}
    return chosen, SimpleNamespace(
        configuration="sealed",
        weights=lambda form: None,
        scored=lambda task: {},
        chosen=lambda name: {name: chosen[name]} if name in chosen else {},
    )


OI = {"scale": 0.3, "length_km": 5000.0, "turn": 3.0}
DAMPED = {"relative_scale": 0.5, "turn": 1.0, "alpha": 0.5}


@pytest.mark.fault("46 W1")
def test_corrections_are_offered_and_are_those_that_are_scored(folder, tmp_path):
    """To the last bit, within 2,500 km of a report."""
    made = experiment(folder)
    shutil.copytree(folder / "weights", tmp_path / "weights")
    shutil.copytree(folder / "weights/adas_increment-s1", tmp_path / "weights/ungated-s0")
    made.networks = str(tmp_path)
    shares = {"alpha": 0.5, "beta": 0.8}
    chosen, kept = kept_settings(oi=OI, damped_oi=DAMPED, adas_oi=shares, ungated_oi=shares)
    world, task = made.world, made.tasks((0.3,))[0]
    background = world.first_background("training")
    reports = next(iter(observed(task, world, "training", range(4))))
    scores = made.scores((0.3,), None, (0,), (), chosen)
    analyses = []
    for name in ("damped_oi", "adas_oi", "ungated_oi"):
        said = []
        options = AnalysisOptions("", method=name, task=task.name)
        job = Assimilation(None, made, kept, options, say=said.append)
        found, _ = job._method()
        scored = built(chosen, scores.method(task, name), task.name)
        analysis = found.analyze(background, reports)
        near = nearness(reports.mask, made.grid)[:, None, None].expand_as(analysis) == 1
        assert near.float().mean() > 0.95
        assert torch.equal(analysis[near], scored.analyze(background, reports)[near])
        assert not any(torch.equal(analysis, other) for other in [background, *analyses])
        assert not said  # both settings were found
        assert ("weights_sha256" in job.attributes) == (name != "damped_oi")
        analyses.append(analysis)


@pytest.mark.fault("46 W1")
def test_methods_that_run_are_listed_once(folder):
    _, kept = kept_settings()
    with pytest.raises(GatesError, match=r"choose from (.*)") as refused:
        Assimilation(None, experiment(folder), kept, AnalysisOptions("", method="bogus"))._method()
    names = str(refused.value).partition("choose from ")[2].split(", ")
    assert {"oi", "damped_oi", "adas_oi"} < set(names)
    assert len(names) == len(set(names))
    assert not {"ungated_oi", "letkf"} & set(names)  # without a network, and an ensemble


@pytest.mark.fault("46 W1")
def test_an_outage_has_the_settings_of_its_reports(folder):
    said = []
    _, kept = kept_settings(oi=OI)
    options = AnalysisOptions("", method="oi", task="0.3/outage")
    job = Assimilation(None, experiment(folder, "outage"), kept, options, say=said.append)
    method, _ = job._method()
    assert not said
    assert method.scale == OI["scale"]
    assert json.loads(job.attributes["settings"]) == OI


def test_networks_that_saw_sealed_timelines_or_were_changed_are_refused(folder, tmp_path, refused):
    made = experiment(folder)
    shutil.copytree(folder / "weights", tmp_path / "weights")
    made.networks, place = str(tmp_path), tmp_path / "weights/adas_increment-s0"
    assert made.network("adas_increment", 0)
    for facts, said in (
        ({"objects": made.test_objects()[:1]}, "was trained on 1 timelines of the sealed world"),
        ({"files": {"weights.safetensors": "0"}}, "weights.safetensors was changed after"),
    ):
        Record("", {}, {}, **facts).write(place)
        refused(said, made.network, "adas_increment", 0)


def test_gates_are_pooled_over_tasks_whose_settings_another_configuration_has(folder):
    made = experiment(folder, "mixed")
    names = made.borrowed((0.1,))
    assert {"oi@0.1/perfect", "adas_oi@0.1/error", "ungated_oi@0.1/error"} < set(names)
    assert experiment(folder).borrowed((0.1,)) == []
    oi = {"scale": 0.3, "length_km": 5000.0, "turn": 3.0}
    tuned = {name: oi if name.startswith("oi@") else {"alpha": 0.5, "beta": 0.5} for name in names}
    lacking = {name: tuned[name] for name in names if name != "adas_oi@0.1/error"}
    for settings, tasks in ((tuned, {"0.1/perfect", "0.1/error"}), (lacking, {"0.1/perfect"})):
        works = made.scores((0.1,), None, (0,), (), settings).works()
        found = {(work.method, work.task) for work in works if not work.task.startswith("mixed")}
        assert found == {("adas_oi", task) for task in tasks}  # there is no ungated network


def test_the_conclusion_says_in_words_what_errs_less_and_at_which_cost():
    few, over = "0.1/perfect/4 timelines", "over_damped_oi"
    rows = [
        Row("adas_oi", "0.1/perfect", over, 0.7, 0.6, 0.8, n=16),
        Row("adas_oi", "0.1/perfect", "over_oi", 0.5, 0.4, 0.6, n=16),
        Row("adas_oi", "0.1/error", over, 1.1, 0.9, 1.2, n=16),
        Row("adas_oi", few, over, 0.72, 0.6, 0.8, n=4),
        Row("four_d_var", few, over, 0.5, 0.4, 0.6, n=4),
        Row("ungated_oi", few, over, 0.6, 0.4, 0.6, n=4),
        Row("ungated_oi_tapered", few, over, 0.6, 0.4, 0.6, n=4),
        Row("adas_oi_tapered", few, over, 0.75, 0.65, 0.85, n=4),
        Row("letkf", few, over, 0.9, 0.8, 1.0, n=4),
        Row("adas_oi", "gate/pooled", "over_ungated_oi", 1.02, 0.97, 1.06, n=16),
    ]
    costs = {"damped_oi": 1.1, "adas_oi": 33.0, "ungated_oi": 33.0, "four_d_var": 2200.0}
    places = ("0.1/perfect", "0.1/error", few)
    rows += [Row(name, place, "milliseconds_over_oi", cost) for name, cost in costs.items()
             for place in places]  # fmt: skip
    scores = SimpleNamespace(tasks=osse_tasks("osse", (0.1,)))
    assert OsseScores.conclusion(scores, rows) == (
        "On 16 sealed timelines with 10 % of the points and a perfect model the corrected analysis "
        "errs by 0.70 [0.60, 0.80] of damped optimal interpolation at 30 times its cost. "
        "On 16 sealed timelines with 10 % of the points and an imperfect model the corrected "
        "analysis errs by 1.10 [0.90, 1.20] of damped optimal interpolation at 30 times its cost. "
        "On 4 sealed timelines and 120 cycles with 10 % of the points and a perfect model the "
        "corrected analysis errs by 0.72 [0.60, 0.80] of damped optimal interpolation at 30 times "
        "its cost (tapered 0.75 [0.65, 0.85]); less err four_d_var by 0.50 [0.40, 0.60] at 2000 "
        "times, ungated_oi by 0.60 [0.40, 0.60] at 30 times. "
        "Gates do not help: 1.020 [0.970, 1.060]."
    )
    gate = rows.index(next(row for row in rows if row.task == "gate/pooled"))
    for low, high, verdict in ((1.01, 1.03, "cost accuracy"), (0.97, 0.99, "help")):
        rows[gate] = rows[gate]._replace(low=low, high=high)
        assert f"Gates {verdict}: " in OsseScores.conclusion(scores, rows)
