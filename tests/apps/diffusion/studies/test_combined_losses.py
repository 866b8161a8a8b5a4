"""Rivals that are fitted on the very pair: on which drawings, how well, and what a kill costs."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import apps.diffusion.studies.fused_views as study
import diffusion.experiments.adapter_conditions as adapter_conditions
import diffusion.experiments.combined_losses as works
from apps.diffusion.studies.base_study import ENCODER, UNSEEN
from apps.diffusion.studio import encoder_of
from core_gates.errors import GatesError
from diffusion.data.concepts import concepts
from diffusion.experiments.trained_gates import Bench, GatesForm
from diffusion.experiments.zoo import EncoderForm
from diffusion.fusion import GatedFusion
from diffusion.fusion.gates_file import gate_tensors
from diffusion.lora_file import load_lora
from harness.experiment import Arrays, Job, Piece, Run

TRAINED = [one.name for one in concepts() if one.name not in UNSEEN]
SMALL = {
    "lora_hub": {"drawings": 2, "times": 2, "evaluations": 8, "regularization": 0.05},
}
ASKED = {"group": "test2", "part": "test", "times": 2, "most": 2}


@pytest.fixture
def places(zoo_root, write):
    world = write.world_of(zoo_root)
    return {"base_folder": world.base_folder, "files": world.zoo(0)}


@pytest.fixture
def made(places, tmp_path, monkeypatch):
    """``made(rival, **settings)``: the work on two pairs."""
    every = works.combinations
    monkeypatch.setattr(works, "combinations", lambda group: every(group)[:2])
    number = iter(range(99))

    def make(rival, part="test", folder=None, tick=lambda: None, **changes):
        folder = folder or tmp_path / f"job{next(number)}"
        folder.mkdir(exist_ok=True)
        given = {"rival": rival, "settings": SMALL.get(rival, {}) | changes, **ASKED, "part": part}
        piece = Piece(rival, None, {}, given)
        if rival in SMALL:
            return works.seen_losses(piece, Job(folder, tick), form=Arrays(), **places)
        return works.losses(piece, Job(folder, tick), trained={}, **places)

    return make


def test_lorahub_is_never_worse_than_its_start(made):
    found = made("lora_hub", regularization=0.0, evaluations=14)
    assert (found["after"] < found["before"]).all()  # random adapters help a little, either way
    assert (found["factors"] != 0).any(1).all()
    assert (found["factors"].abs() <= 1.5).all()
    weighed = made("lora_hub")
    assert (weighed["after"] <= weighed["before"]).all()
    first = made("lora_hub", evaluations=1)
    assert_close(first["after"], first["before"])
    assert (first["factors"] == 0).all()
    # without adapters it is the base, on the noise that the base is measured by
    assert_close(first["losses"], made("none")["losses"])


@pytest.mark.parametrize("rival", SMALL)
def test_drawings_of_the_test_are_not_seen(made, monkeypatch, rival):
    found, tasks = made(rival), Bench.tasks
    spoiled = {"test"}

    def spoil(self, group, part, most):
        made = tasks(self, group, part, most)
        for task in made:
            if part in spoiled:
                task.latents.fill_(torch.nan)
        return made

    monkeypatch.setattr(Bench, "tasks", spoil)
    blind = made(rival)
    assert blind["losses"].isnan().all()
    for name in ("before", "after", "factors"):
        assert torch.equal(blind[name], found[name])
    spoiled.add("gate")
    with pytest.raises(GatesError, match="nan"):
        made(rival)


@pytest.mark.parametrize("rival", SMALL)
def test_a_kill_costs_one_pair(made, monkeypatch, tmp_path, rival):
    whole = made(rival)
    fit, fitted = works.fitted_hub, []

    def counted(bench, adapters, task, name, settings):
        fitted.append(name)
        return fit(bench, adapters, task, name, settings)

    def killed():
        raise KeyboardInterrupt

    monkeypatch.setattr(works, "fitted_hub", counted)
    with pytest.raises(KeyboardInterrupt):
        made(rival, folder=tmp_path / "killed", tick=killed)
    assert len(fitted) == 1
    ticks = []
    resumed = made(rival, folder=tmp_path / "killed", tick=lambda: ticks.append(1))
    assert len(ticks) == 2
    assert len(set(fitted)) == len(fitted) == 2
    for name, value in whole.items():
        assert_close(resumed[name], value, rtol=0, atol=0, equal_nan=True)


def test_a_quick_run_fits_nothing(tmp_path):
    run = Run(tmp_path / "fusion", app="diffusion", quick=True)

    def piece(method, group, seed):
        assert (group, seed) == ("test2", None)
        return run.piece(method.name, seed, rival=method.rival, settings=method.settings)

    assert study.losses_of_seeing(SimpleNamespace(run=run, places={}, piece=piece)) == {}
    assert not list(run.folder.rglob("result.*"))


def test_losses_depend_on_the_roles_and_scores_that_gates_are_told(
    places, tmp_path, monkeypatch, write, zoo_root
):
    world, every = write.world_of(zoo_root), works.combinations
    monkeypatch.setattr(works, "combinations", lambda group: every(group)[:2])
    shapes = {one.name for one in concepts() if one.kind == "subject"}
    monkeypatch.setattr(
        adapter_conditions, "role_of",
        lambda one: "subject" if one.metadata["modelspec.title"] in shapes else "style",
    )  # fmt: skip
    library = {name: load_lora(file) for name, file in places["files"].items()}
    pair = {name: library[name] for name in every("test2")[0].adapters}
    made = GatedFusion(world.base.transformer, pair, mode="strengths", switch=True)
    torch.manual_seed(2)
    with torch.no_grad():
        for gate in made.gates.values():
            gate.factors.add_(torch.randn(2, 3))
        made.context.switch.copy_(torch.tensor([1.0, 0.5, -0.5]))
    (tmp_path / "made").mkdir()
    GatesForm().save(tmp_path / "made", gate_tensors(made.gate_states()))
    encoder = encoder_of(world)

    def losses(encoder=encoder, **settings):
        given = {"rival": "s", "settings": {"mode": "strengths"} | settings, **ASKED}
        piece, job = Piece("s", 0, {}, given), Job(tmp_path, lambda: None)
        trained = {piece.name: tmp_path / "made"}
        return works.losses(piece, job, trained=trained, encoder=encoder, **places)["losses"]

    found = [
        losses(), losses(told=1.0), losses(switch=True), losses(told=1.0, switch=True),
    ]  # fmt: skip
    for number, one in enumerate(found):
        assert not any(torch.allclose(one, other) for other in found[:number])
    assert_close(losses(told=1.0, switch=True, encoder=None), found[1])
    one, text = every("test2")[0], world.text.encode(["a fish", "a fox"])
    scores = adapter_conditions.CaptionScores(encoder, library).scores(one.adapters, text)
    expected = torch.nn.functional.cosine_similarity(
        text.pooled, world.run.store("encoders", EncoderForm()).load(
            world.encoder_piece("encoder", 0, concepts=TRAINED, **ENCODER)
        ).token(library[one.subject])[None],
    )  # fmt: skip
    assert_close(scores[:, 0], expected)


@pytest.mark.fault("46 D7")
@pytest.mark.parametrize(
    ("given", "settings", "group"),
    [
        ({"mode": "strengths"}, {"mode": "strengths"}, "tried"),
        ({"rival": "x_lora", "layerwise": True, "group": "train2"}, {"layerwise": True}, "tried2"),
    ],
)
def test_a_trial_of_a_rate_trains_and_scores_what_it_trained(
    given, settings, group, tmp_path, monkeypatch
):
    def losses(piece, job, base_folder, files, trained):
        assert float(GatesForm().load(trained[piece.name])["a"]) == 0.5
        assert settings.items() <= piece["settings"].items()
        assert (piece["group"], piece["rival"]) == (group, given.get("rival", "method"))
        return {"losses": torch.full((2, 3), 2.0)}

    def train(piece, *_):
        assert (piece["steps"], piece["learning_rate"]) == (7, 0.01)
        return {"a": torch.tensor(0.5)}

    monkeypatch.setattr(works, "losses", losses)
    monkeypatch.setattr(works, "train_gates", train)
    piece = Piece("method", 100, {"trial": 3}, {**given, "steps": 7, "learning_rate": 0.01})
    job = Job(tmp_path, lambda: None)
    for _ in range(2):  # also after a kill
        assert works.trial(piece, job, tmp_path, {}) == {"score": pytest.approx(math.log(2))}
