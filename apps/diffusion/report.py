"""``gates diffusion report``: the page of a run, with images, gates and scores of its study."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from apps.diffusion.commands import EXTENDED, STUDIES
from apps.diffusion.embedded_world import World, root_of
from apps.diffusion.generate import TRUE, in_bytes
from apps.diffusion.studies.base_study import (
    METHODS,
    TRAINED,
    UNSEEN,
    image_pieces,
    searched_of,
    shown_scenes,
    vectors,
)
from apps.diffusion.studies.fused_views import DRAWN
from apps.diffusion.studies.fusion_study import BLIND, GROUPS, best_rival
from core_gates.errors import GatesError, check_option
from diffusion.data.scenes import drawn
from diffusion.evaluation.figures import (
    pair_differences_figure,
    retrieval_figure,
    retrieval_table,
    sheet_figure,
)
from diffusion.experiments.made_images import prompts
from diffusion.experiments.trained_gates import captions, combinations
from harness.command.configfile import find_config, read_config
from harness.command.verbs import Place
from harness.experiment.run import CHOICES, Run
from harness.experiment.store import Arrays, Figures, Store
from harness.experiment.tuning import Choice
from harness.files.piece import Record, read_record
from harness.report.page import Page
from harness.runs.terminal import working

BASE_SHOWN, EACH_SHOWN, MADE = 24, 8, "made"  # captions of the base and of each adapter


def add_base(page: Page, world: World) -> None:
    """Add sheets of what the study made, next to true drawings.

    Args:
        page: The report.
        world: In which nothing is trained.
    """
    store = world.run.store("images", Arrays())
    made = {
        piece.method: store.load(piece)["images"].permute(0, 2, 3, 1).numpy()
        for piece in image_pieces(world)
        if store.find(piece) is not None
    }
    page.section("Images")
    if "none" in made:
        _plain(page, made.pop("none"))
    if not made:
        page.text("No images of adapters were made yet: run `evaluate` first.")
        return
    shown = {name: shown_scenes(name)[:EACH_SHOWN] for name in made}
    sheet = {
        name: {TRUE: in_bytes(drawn(shown[name])), MADE: images[:EACH_SHOWN]}
        for name, images in made.items()
    }
    page.figure(
        sheet_figure(sheet, title="Adapters, one at a time", note="captions that none has seen"),
        "Every adapter on its own captions: true drawings at the left, made ones at the right.",
        name="adapters",
        table=(
            ("adapter", "caption"),
            [[name, caption] for name, scenes in shown.items() for caption in captions(scenes)],
        ),
    )


def _plain(page: Page, made: np.ndarray) -> None:
    scenes = shown_scenes("none")
    places = range(0, len(scenes), len(scenes) // BASE_SHOWN)[:BASE_SHOWN]
    names = captions(scenes)
    true = in_bytes(drawn(scenes))
    for half in (places[: BASE_SHOWN // 2], places[BASE_SHOWN // 2 :]):
        page.figure(
            sheet_figure(
                {names[i]: {TRUE: true[[i]], MADE: made[[i]]} for i in half},
                title="Unseen captions",
                note="the base alone, evenly spaced among the captions that are scored",
            ),
            "What the base draws of captions that it has not seen, next to true drawings.",
            name="base",
            table=(
                ("caption", "column"),
                [[names[i], column] for i in half for column in (TRUE, MADE)],
            ),
        )


OWN = "gates"
RIVALS = ("sum", "mean", "ties tuned", "k_lora tuned")
"""Rivals that figures show, besides the best tuned one."""

FUSION_SHOWN = 16  # pairs whose images are shown

PAIRS = "test2"


def add_images(page: Page, run: Run) -> None:
    """Add images of some unseen pairs.

    Args:
        page: The report.
        run: Of the study.
    """
    page.section("Images of unseen pairs")
    made = {
        name: images[0] for name, images in _stored(run.store("images", Arrays()), PAIRS).items()
    }
    if ways := [name for name in (OWN, *RIVALS, *_best_rival(run)) if name in made]:
        _images(page, {name: made[name] for name in ways})
    else:
        page.text("There are no images yet: run `evaluate` first.")


def add_fusion(page: Page, run: Run) -> None:
    """Add differences by pair.

    Args:
        page: The report.
        run: Of the study.
    """
    page.section("Pair by pair")
    if not sum(_differences(page, run, group) for group in GROUPS):
        page.text("There are no losses of gates yet: run `evaluate` first.")


def losses_of(run: Run, group: str) -> dict[str, np.ndarray]:
    """Return method -> logarithm of the mean loss of each combination (P,), over all seeds.

    Args:
        run: Of the study.
        group: Of combinations.
    """
    return {
        name: np.log(
            np.mean([np.nanmean(seed["losses"].numpy(), axis=1) for seed in seeds], axis=0)
        )
        for name, seeds in _stored(run.store("losses", Arrays()), group).items()
    }


def _stored(store: Store[dict[str, Tensor]], group: str) -> dict[str, list[dict[str, Tensor]]]:
    """Return method -> what is stored for a group, a result per seed."""
    arrays: dict[str, list[dict[str, Tensor]]] = {}
    for place, record in _kept(store):
        if (record.identity.get("keys") or {}).get("of") == group:
            arrays.setdefault(str(record.identity["method"]), []).append(store.form.load(place))
    return arrays


def _kept(store: Store[Any]) -> Iterator[tuple[Path, Record]]:
    """Yield all results of a run, or else of the package, each with its record."""
    folders = (store.folder, *store.read_only)
    places = {place.name: place for folder in reversed(folders) for place in folder.glob("[!.]*")}
    for _, place in sorted(places.items()):
        if (record := read_record(place)) is not None:
            yield place, record


def _best_rival(run: Run) -> list[str]:
    """Return the rival that scores call the best: by its trials, never by what is tested."""
    chosen = {
        str(record.identity["method"]): Choice(**Figures().load(place))
        for place, record in _kept(run.store(CHOICES, Figures()))
    }
    return [best_rival(chosen)] if chosen else []


def _differences(page: Page, run: Run, group: str) -> bool:
    losses = losses_of(run, group)
    rivals = [name for name in (*RIVALS, *_best_rival(run)) if {OWN, name} <= losses.keys()]
    shown = {name: losses[OWN] - losses[name] for name in rivals}
    if not shown:
        return False
    names = [combination.name for combination in combinations(group)]
    page.figure(
        pair_differences_figure(
            names, shown, title=f"Gates and rivals: {GROUPS[group]}",
            note="flow-matching loss on drawings that no adapter and no gate has seen",
        ),
        f"{GROUPS[group]}: how much lower or higher the loss of gates is than that of rivals."
        " Each row is a combination, each mark a rival.",
        name=f"pairs-{group}",
        table=(
            ("combination", "rival", "log_loss_ratio"),
            [[name, rival, float(v)] for rival, d in shown.items()
             for name, v in zip(names, d, strict=True)],
        ),
    )  # fmt: skip
    return True


CALLED = {"k_lora": "K-LoRA", "k_lora tuned": "K-LoRA tuned", BLIND: "strengths by layer"}


def _images(page: Page, made: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Add what each way makes of some unseen pairs, next to what is true."""
    pairs, some = combinations(PAIRS), next(iter(made.values()))
    places = some["combination"].tolist()
    images = {TRUE: some["true"]} | {CALLED.get(n, n): arrays["made"] for n, arrays in made.items()}
    rows = {}
    for pair in range(0, len(pairs), len(pairs) // FUSION_SHOWN):
        caption, first = prompts(pairs[pair].scenes("test"), DRAWN)[0].caption(), places.index(pair)
        rows[caption] = {n: i[[first]].permute(0, 2, 3, 1).numpy() for n, i in images.items()}
    note = "subjects in styles that no gate was trained on together; the same noise for all"
    page.figure(
        sheet_figure(rows, title="Unseen pairs", note=note),
        "One row per caption, which no adapter and no gate has seen: the drawing as it should be,"
        " then what gates and rivals make of it.",
        name="pairs",
        table=(("caption", "column"), [[c, n] for c, row in rows.items() for n in row]),
    )


def add_retrieval(page: Page, world: World) -> None:
    """Add the matrix of captions and adapters, of the first encoder.

    Args:
        page: The report.
        world: In which nothing is trained.
    """
    page.section("Captions and adapters")
    second = world.zoo(1)
    trained = world.encoders({"encoder": METHODS["encoder"]}, [0], concepts=TRAINED).get("encoder")
    if not trained or not second:
        page.text("The encoder or adapters of seed 1 are missing: run `evaluate` first.")
        return
    with working("encoding adapters"):
        searched = searched_of(world, second)
        scores = (searched.text @ vectors(trained[0], searched.bundles).T).numpy()
    owners = np.array(searched.owners)
    means = np.stack([scores[owners == name].mean(0) for name in searched.names])
    page.figure(
        retrieval_figure(
            means,
            searched.names,
            searched.names,
            note=f"mean cosine; no encoder has seen {', '.join(UNSEEN)}",
        ),
        "Captions that no adapter has seen, by concept, and the adapters of an independent "
        "training run, known by their weights alone.",
        name="retrieval",
        table=retrieval_table(means, searched.names, searched.names),
    )


UNITS = {
    "base": "colors of shapes, or adapters",
    "retrieval": "concepts",
    "fusion": "adapters and seeds",
    "images": "adapters and seeds",
}  # study -> what intervals are drawn from


def report(place: Place, study: str | None = None) -> None:
    """Write the report of a run as one HTML page, with figures as PNG and CSV next to it.

    Nothing is trained: run `evaluate` with the same configuration first.

    Args:
        place: Filled in by the command line.
        study: What the run has shown: base, parity, retrieval, fusion or images; that of the
            configuration if null.
    """
    chosen = study or _study(place)
    check_option("--study", chosen, STUDIES, GatesError)
    run = place.run(package="diffusion", extended=EXTENDED)
    print(write_report(run, World(root_of(place), quick=True), chosen))


def write_report(run: Run, world: World, study: str) -> Path:
    """Write ``report.html`` into the run folder, and return it.

    Args:
        run: Of the study.
        world: In which nothing is trained.
        study: Its name.

    Raises:
        GatesError: There are no scores yet, or a file of the run folder is damaged.
    """
    from harness.report.sections import run_page

    others = [] if world.run.folder == run.folder else [world.run.folder]
    first, draw = {
        "base": (partial(add_base, world=world), None),
        "retrieval": (None, partial(add_retrieval, world=world)),
        "fusion": (None, partial(add_fusion, run=run)),
        "images": (partial(add_images, run=run), None),
    }.get(study, (None, None))
    page = run_page(run, draw, first=first, units=UNITS.get(study, "cases"), others=others)
    return page.write(run.folder / "report.html")


def _study(place: Place) -> str:
    """Return the study of a configuration."""
    try:
        section = read_config(find_config(place.config, "diffusion")).get("evaluate") or {}
    except GatesError:
        return place.config
    if "study" not in section:
        raise GatesError(
            f"the configuration {place.config} shows nothing: give --config with "
            f"{', '.join(STUDIES)}"
        )
    return str(section["study"])
