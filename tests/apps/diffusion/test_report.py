"""Reports of runs whose results have random numbers: pages, figures and their numbers."""

import csv
import shutil

import numpy as np
import pytest
import torch

from apps.diffusion.report import losses_of, write_report
from apps.diffusion.studies.base_study import image_pieces
from apps.diffusion.studies.fused_views import DRAWN
from diffusion.experiments.combined_losses import MOST
from diffusion.experiments.trained_gates import combinations
from harness.evidence import Bar, Row
from harness.experiment import Arrays, Run
from harness.experiment.run import CHOICES
from harness.experiment.store import Figures
from harness.experiment.tuning import Choice

METHODS = {"gates": 0.8, "sum": 1.0, "mean": 0.9, "ties tuned": 0.7, "mean tuned": 0.85}


@pytest.fixture
def root(zoo_root, tmp_path):
    shutil.copytree(zoo_root, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def run_of(root, capsys):
    """Return the run of a study with scores of one row."""

    def make(study):
        run = Run(root / "diffusion" / study, app="diffusion", package=None)
        rows = [Row("gates", study, "loss", 1.0, 0.9, 1.1, 12)]
        run.finish(rows, [Bar("a figure", 1.0, "<=", 2.0)], seeds=[0], headline="A headline.")
        return run

    return make


def numbers(run, name):
    with (run.folder / "figures" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def figures(run):
    found = {path.name for path in (run.folder / "figures").iterdir()}
    assert {f"{name.rpartition('.')[0]}.csv" for name in found} <= found
    return {name.removesuffix(".png") for name in found if name.endswith(".png")}


def test_images_of_the_base(run_of, root, write):
    world = write.world_of(root)
    pieces = image_pieces(world)[:4]
    store = world.run.store("images", Arrays())
    draw = torch.Generator().manual_seed(0)
    for piece in pieces:
        size = (len(piece["captions"]), 3, 32, 32)
        images = torch.randint(0, 256, size, generator=draw, dtype=torch.uint8)
        store.keep(piece, {"images": images})
    run = run_of("base")
    path = write_report(run, world, "base")
    assert figures(run) == {"bars", "base", "base-2", "adapters"}
    assert {row["adapter"] for row in numbers(run, "adapters")} == {"fish", "house", "tree"}
    assert "A headline." in path.read_text()
    assert "What was made in the run folder embedded" in path.read_text()


def test_captions_and_adapters(run_of, root, write):
    world = write.world_of(root)
    run = run_of("retrieval")
    write_report(run, world, "retrieval")
    rows = numbers(run, "retrieval")
    assert len(rows) == 1600
    assert all(abs(float(row["mean cosine"])) <= 1 for row in rows)
    shutil.rmtree(root / "diffusion/embedded/zoos/zoo-s1")
    page = write_report(run, write.world_of(root), "retrieval").read_text()
    assert "adapters of seed 1 are missing" in page


def keep_losses(run, group="test2"):
    draw = np.random.default_rng(0)
    pairs = len(combinations(group))
    found = {}
    for method, level in METHODS.items():
        for seed in (0, 1):
            losses = level * np.exp(draw.normal(0, 0.05, (pairs, MOST))).astype(np.float32)
            losses[0, -1] = np.nan
            found.setdefault(method, []).append(losses)
            piece = run.piece(method, seed, {"of": group})
            run.store("losses", Arrays()).keep(piece, {"losses": torch.from_numpy(losses)})
    return found


def test_differences_by_pair(run_of, root, write):
    run = run_of("fusion")
    kept = keep_losses(run)
    choice = Choice({"weight": 1.0, "density": 0.5}, [{"score": 0.1}], [])
    run.store(CHOICES, Figures()).keep(run.piece("ties", 100), choice._asdict())
    write_report(run, write.world_of(root), "fusion")
    assert figures(run) == {"bars", "pairs-test2"}
    rows = numbers(run, "pairs-test2")
    assert {row["rival"] for row in rows} == {"sum", "mean", "ties tuned"}
    own, other = (np.mean([np.nanmean(one, 1) for one in kept[m]], 0) for m in ("gates", "sum"))
    expected = np.log(own[0] / other[0])
    assert float(rows[0]["log_loss_ratio"]) == pytest.approx(expected, abs=1e-5)
    assert rows[0]["combination"] == combinations("test2")[0].name


def test_images_of_pairs(run_of, root, write):
    run, pairs = run_of("images"), combinations("test2")
    images = torch.randint(0, 256, (DRAWN * len(pairs), 3, 32, 32), dtype=torch.uint8)
    places = torch.arange(len(pairs)).repeat_interleave(DRAWN)
    for method in ("gates", "sum"):
        made = {"made": images, "true": images, "combination": places}
        run.store("images", Arrays()).keep(run.piece(method, 0, {"of": "test2"}), made)
    write_report(run, write.world_of(root), "images")
    assert figures(run) == {"bars", "pairs"}
    assert {row["column"] for row in numbers(run, "pairs")} == {"true drawing", "gates", "sum"}


def test_what_is_missing_is_said(run_of, root, write):
    world = write.world_of(root)
    world.run.package = None
    page = write_report(run_of("fusion"), world, "fusion").read_text()
    assert "no losses of gates yet" in page
    assert losses_of(run_of("fusion"), "test2") == {}
    page = write_report(run_of("images"), world, "images").read_text()
    assert "There are no images yet" in page
    page = write_report(run_of("base"), world, "base").read_text()
    assert "No images of adapters were made yet" in page


def test_the_verb_takes_the_study_of_the_configuration(run_of, root, write, gates, monkeypatch):
    monkeypatch.setattr("apps.diffusion.report.World", lambda root, **_: write.world_of(root))
    run_of("retrieval").scores.rename(root / "scores.json")
    (root / "diffusion" / "mine").mkdir()
    (root / "scores.json").rename(root / "diffusion" / "mine" / "scores.json")
    printed = gates("report", "--config", "retrieval", "--name", "mine", "--root", root)
    assert printed.splitlines()[-1] == str(root / "diffusion" / "mine" / "report.html")
    assert (root / "diffusion" / "mine" / "figures" / "retrieval.png").exists()


def test_faulty_calls(root, faulty_inputs):
    call = ("diffusion", "report", "--root", "runs")
    faulty_inputs(
        {
            "no scores": ((*call, "--config", "base"), "evaluate"),
            "no study": (("diffusion", "report"), "give --config with base,"),
            "an unknown study": ((*call, "--study", "all"), "--study is 'all'"),
        },
        folder=root.parent,
    )
