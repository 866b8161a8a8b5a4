"""Training runs of sizing networks as pieces of work: prepared, found, trained, kept, exported."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L

from core_gates.errors import GatesError
from endoscopy.bundles.bundle_fitting import Bundles, bundle_of, shipped_folder
from endoscopy.bundles.sizing_bundle import Provenance, SizingBundle, load_bundle, model_card
from endoscopy.data.sizing_datamodule import REAL, PolypSizingDataModule
from endoscopy.experiments.sizers import (
    CONFIGURED,
    MAIN,
    VARIANTS,
    RenderedSet,
    Rendering,
    Sizers,
    Training,
)
from endoscopy.metrics import CLASS_NAMES, TRUTH, count_on_cut_offs
from endoscopy.renderer.rendered_dataset import claim_dataset, finish_dataset, write_objects
from endoscopy.runtimes import CHECKED, export_onnx, export_program, exportable, save_program
from endoscopy.segmenter import Segmenter, load_segmenter, shipped_segmenter
from endoscopy.training.sizing_module import SizingModule
from harness.command.verbs import Place, refuse_existing
from harness.experiment import Job, Piece, Run, Store
from harness.files.atomic import replacing, write_json, write_text
from harness.files.digest import figshare_manifest, read_manifest, total_bytes
from harness.files.download import download_and_unpack
from harness.runs.callbacks import load_weights, seen
from harness.runs.processes import Tick, in_processes
from harness.runs.terminal import ticking

REAL_COLON = 22202866  # article on figshare
TABLE, REPORT = "frames.parquet", "read_report.json"


def prepare_data(data: PolypSizingDataModule, folder: Path) -> Path:
    """Read and check everything, build the cache, and write the frame table.

    Prints what was read, left out and repaired, the split, and the size of the cache before it
    is built.

    Args:
        data: Names sources, split and cache.
        folder: Where ``frames.parquet`` and ``read_report.json`` go.

    Returns:
        The frame table.
    """
    table = data.load()
    print("\n".join(data.report.lines()))
    sizes = table.objects["gt"].to_numpy(float)
    exact = ", ".join(f"{count} on {cut:g} mm" for cut, count in count_on_cut_offs(sizes).items())
    classes = TRUTH.classes(sizes)
    counts = ", ".join(f"{(classes == k).sum()} {name}" for k, name in enumerate(CLASS_NAMES))
    print(f"{len(table)} frames of {len(sizes)} objects: {counts}; {exact} exactly")
    assert data.parts is not None
    parts = [
        f"{name} {len(set(table.object_codes[rows]))} objects, {len(rows)} frames"
        for name, rows in data.parts._asdict().items()
    ]
    print(f"split {data.folds.name if data.folds else data.split_kind}: {'; '.join(parts)}")
    cache = data.plan_cache()
    if cache is not None and not cache.is_complete():
        print(cache.summary())
        with ticking("caching", len(cache)) as tick:
            read_report = cache.build(lambda *_: tick())
        if read_report.unreadable:
            print("\n".join(read_report.lines()))
    if cache is not None:
        print(cache.folder)
    write_json(folder / REPORT, data.report.to_dict())
    return table.write_parquet(folder / TABLE)


def download_real_colon(data: PolypSizingDataModule, folder: str, manifest: str | None) -> None:
    """Download and unpack REAL-Colon, the total size printed first, and let the data read it.

    Args:
        data: Of a configuration that reads REAL-Colon.
        folder: Where it goes.
        manifest: JSON list of files; figshare is asked where it is None.

    Raises:
        GatesError: The configuration reads something else, or the download fails.
    """
    if "real_colon" not in data.sources:
        raise GatesError(
            f"--download brings REAL-Colon, and the data are {', '.join(data.sources)}: take a "
            "configuration of REAL-Colon, such as real_colon"
        )
    files = figshare_manifest(REAL_COLON) if manifest is None else read_manifest(manifest)
    print(f"{len(files)} files of {total_bytes(files) / 1e9:.2f} GB into {folder}", flush=True)
    data.sources["real_colon"] = str(download_and_unpack(files, folder, notify=print))


CHUNK = 20  # objects that a process renders at a time


def render(
    data: PolypSizingDataModule, rendering: Rendering, names: Sequence[str]
) -> list[RenderedSet]:
    """Render what is missing, and return the sets."""
    for rendered_set in rendering.missing(data, names):
        claim_dataset(rendered_set.folder, rendered_set.config, rendered_set.objects)
        chunks = [
            (rendered_set, start, min(start + CHUNK, rendered_set.objects))
            for start in range(0, rendered_set.objects, CHUNK)
        ]
        with ticking(f"rendering {rendered_set.name}", rendered_set.objects) as tick:
            in_processes(write_chunk, chunks, tick)
        finish_dataset(rendered_set.folder, rendered_set.config, rendered_set.objects)
    return [rendering.set(data, name) for name in names]


def render_missing(data: PolypSizingDataModule, rendering: Rendering, names: Sequence[str]) -> None:
    """Announce and render the missing sets; do nothing for other kinds of data."""
    if "synthetic" not in data.sources:
        return
    if missing := rendering.missing(data, names):
        sets = ", ".join(
            f"{rendered_set.name} of {rendered_set.objects} objects" for rendered_set in missing
        )
        print(f"rendered sets missing: {sets}; rendering them now", flush=True)
        render(data, rendering, names)


def write_chunk(one: RenderedSet, start: int, stop: int, *, tick: Tick) -> None:
    """Write some objects of a set."""
    for _ in write_objects(one.folder, one.config, range(start, stop)):
        tick()


WEIGHTS = "weights"
TRAINER, CHECKPOINT = "trainer.", "checkpoint."
OPTIONS = signature(SizingModule).parameters


def decisive(settings: Mapping[str, Any], sizers: Sizers) -> dict[str, Any]:
    """Return the settings that determine a network, of the Trainer and of the domain."""
    trained = {n: v for n, v in settings.items() if n.startswith((TRAINER, CHECKPOINT))}
    return trained | sizers.settings()


def piece_of(run: Run, sizers: Sizers, training: Training, **settings: Any) -> Piece:
    """Return the piece of a training run.

    Args:
        run: With the settings of `decisive`.
        sizers: The networks.
        training: Which.
        settings: Arguments of `SizingModule`, or others that differ.
    """
    training = sizers.resolved(training)
    numbers = {"n": training.objects, "f": training.fold}
    keys = {name: number for name, number in numbers.items() if number is not None}
    changed = sizers.version(training.variant) | settings
    return run.piece(training.variant, training.seed, keys, **changed)


def training_of(piece: Piece) -> Training:
    """Return the training run of a piece."""
    objects, fold = piece.keys.get("n", piece.get("objects")), piece.keys.get("f")
    return Training(
        piece.method,
        piece.seed or 0,
        None if objects is None else int(objects),
        None if fold is None else int(fold),
    )


def trained(
    piece: Piece, job: Job, sizers: Sizers, **trainer: Any
) -> tuple[SizingModule, PolypSizingDataModule]:
    """Return the trained module of a piece and the data that it was trained on.

    Args:
        piece: With ``trainer.`` options, and options of the module without a prefix.
        job: Trains.
        sizers: The networks.
        trainer: Options of the Trainer that are not in the piece.
    """
    training = training_of(piece)
    L.seed_everything(training.seed, verbose=False)
    changed = {name: value for name, value in piece.settings.items() if name in OPTIONS}
    module = sizers.untrained(training, **changed)
    data = sizers.data(training)
    job.note(objects=data.training_objects())
    monitor, mode = piece.get("checkpoint.monitor"), piece.get("checkpoint.mode", "min")
    options = trainer | {
        name.removeprefix(TRAINER): value
        for name, value in piece.settings.items()
        if name.startswith(TRAINER)
    }
    if monitor is None:
        options["limit_val_batches"] = 0
    job.fit(module, data, monitor=monitor, mode=mode, **options)
    sizers.settle(training.variant, module, data)
    return module, data


def train(piece: Piece, job: Job, *, sizers: Sizers, config: str) -> SizingBundle:
    """Train one network and fit all that predictions need."""
    module, data = trained(piece, job, sizers)
    return bundle_of(module, data, facts=facts(piece, config), settings=piece.settings)


def facts(piece: Piece, config: str) -> dict[str, Any]:
    """Return the facts of a training run for its model card."""
    return {
        "configuration": config,
        "variant": VARIANTS[piece.method].summary,
        "seed": piece.seed,
        "epochs": piece.get("trainer.max_epochs"),
    }


class Trainings:
    """The networks of a run: existing ones, and those to be trained.

    Args:
        run: Where they are kept; its settings become those of `decisive`.
        sizers: The networks.
    """

    def __init__(self, run: Run, sizers: Sizers) -> None:
        run.settings = decisive(run.settings, sizers)
        self.run, self.sizers = run, sizers
        self.store: Store[SizingBundle] = run.store(WEIGHTS, Bundles())

    def pieces(self, trainings: Iterable[Training]) -> list[Piece]:
        """Return the pieces of training runs."""
        return [piece_of(self.run, self.sizers, training) for training in trainings]

    def obtain(self, wanted: Sequence[Training], sets: Sequence[str] = (MAIN,)) -> list[Training]:
        """Render, cache and train what is missing; return the training runs that have results.

        Args:
            wanted: Training runs.
            sets: Names of rendered sets.

        Returns:
            Those with results.
        """
        pieces = self.pieces(wanted)
        self.store.missing(pieces)  # refuses before anything is rendered
        make_ready(self.sizers, sets)
        for training in wanted:
            self.sizers.data(training).prepare_data()
        work = partial(train, sizers=self.sizers, config=self.run.config)
        trained = self.run.obtain(self.store, pieces, work, ticks=_epochs)
        return [training_of(piece) for piece in trained]

    def load(self, training: Training) -> SizingBundle:
        """Return a trained network.

        Raises:
            GatesError: It is missing or damaged, or was trained on test objects.
        """
        data = self.sizers.data(training)
        tested = {key for part in ("test", "calibration") for key in data.object_keys(part)}
        (piece,) = self.pieces([training])
        return self.store.load(piece, tested=tested)


def make_ready(sizers: Sizers, sets: Sequence[str] = (MAIN,)) -> None:
    """Render and cache what is missing, and read the data; only one process may do so."""
    if sizers.rendering is not None:
        render_missing(sizers.datamodule, sizers.rendering, sets)
    sizers.datamodule.check_sources()
    print_random_start(sizers.datamodule, sizers.timm_weights)
    sizers.datamodule.prepare_data()
    sizers.datamodule.setup("fit")


def print_random_start(data: PolypSizingDataModule, timm_weights: str | None) -> None:
    """Say that training on real frames starts from random weights, if it does."""
    if timm_weights is None and set(REAL) & data.sources.keys():
        print(
            "training starts from random weights, the published one from those of ImageNet: give "
            "--timm_weights FILE"
        )


def checkpoint_bundle(sizers: Sizers, path: Path) -> SizingBundle:
    """Return the network of a checkpoint, its intervals fitted to the present data.

    Raises:
        GatesError: It is damaged or belongs to another configuration.
    """
    module, data = sizers.untrained(Training()), sizers.datamodule
    objects = load_checkpoint(path, module)
    data.setup("test")
    sizers.settle(CONFIGURED, module, data)
    bundle = bundle_of(module, data, facts={"checkpoint": str(path)})
    bundle.training = Provenance({}, objects)
    return bundle


def load_checkpoint(path: Path, module: SizingModule) -> tuple[str, ...]:
    """Read the weights of a checkpoint into a module; return the keys of its training objects.

    Raises:
        GatesError: It is damaged or belongs to another configuration.
    """
    checkpoint = load_weights(path)
    try:
        module.load_state_dict(checkpoint.get("state_dict", {}))
    except RuntimeError as error:
        raise GatesError(
            f"{path} is a checkpoint of another configuration: give the one it was trained with"
        ) from error
    trained_on = checkpoint.get(PolypSizingDataModule.__name__, {}).get("trained_on", ())
    return tuple(sorted({*trained_on, *seen(checkpoint)}))


def _epochs(piece: Piece) -> int:
    return int(piece.get("trainer.max_epochs") or 1)


NAME, FOLDS = f"{CONFIGURED}-s0", f"{CONFIGURED}-f[0-9]*-s0"


class NamedBundle(NamedTuple):
    """A trained network and where it came from.

    Attributes:
        name: For people: a folder, perhaps one of several folds, or ``shipped synthetic/...``.
        bundle: The network.
    """

    name: str
    bundle: SizingBundle


def find_bundle(place: Place, weights: str | None) -> NamedBundle:
    """Return the network of ``weights``, or of the run folder, or the shipped one, in this order.

    Of a run with several folds it is that of the lowest, and its name states it: networks of
    several folds have no common intervals.

    Args:
        place: Run folder and configuration.
        weights: A folder of weights.

    Raises:
        GatesError: There is none, or it is damaged.
    """
    if weights is not None:
        return NamedBundle(weights, load_bundle(weights))
    folder = place.run_folder.path / WEIGHTS
    folds = sorted(folder.glob(FOLDS), key=lambda path: int(path.name.split("-")[1][1:]))
    for bundle_folder in (folder / NAME, *folds):
        if bundle_folder.is_dir():
            others = f" (one of {len(folds)} folds; --weights takes another)"
            shown = (
                f"{bundle_folder}{others}"
                if bundle_folder in folds and len(folds) > 1
                else str(bundle_folder)
            )
            return NamedBundle(shown, load_bundle(bundle_folder))
    shipped = shipped_folder(place.config, NAME)
    if shipped.is_dir():
        return NamedBundle(f"shipped {place.config}/{NAME}", load_bundle(shipped))
    raise GatesError(
        f"there are no weights in {folder} and none are shipped for the configuration "
        f"{place.config!r}: train them with `gates endoscopy fit --config {place.config}`, or "
        "give --weights"
    )


def find_segmenter(path: str | None = None) -> Segmenter:
    """Return the segmenter of a file, or the shipped one.

    Raises:
        GatesError: There is none, or it is damaged.
    """
    segmenter = shipped_segmenter() if path is None else load_segmenter(path)
    if segmenter is None:
        raise GatesError("no segmenter is shipped: give the polyps with --boxes or --masks")
    return segmenter


Format = Literal["onnx", "torch"]
FILES: dict[str, str] = {"onnx": "model.onnx", "torch": "model.pt2"}


def export(
    place: Place,
    weights: str | None = None,
    output: str | None = None,
    formats: tuple[Format, ...] = ("onnx", "torch"),
    overwrite_output: bool = False,
) -> None:
    """Write the folded network as ONNX and for torch.export, checked against PyTorch.

    The gates are folded into the neighboring weights, so that they cost nothing. The model
    card and a configuration with target, scope and normalization are written next to the networks.

    Args:
        place: Filled in by the command line.
        weights: Folder of weights; by default those of the run, else the shipped ones.
        output: Folder to write; that of the run by default.
        formats: ``onnx``, checked with onnxruntime, and ``torch``, a program of torch.export.
        overwrite_output: Replace a folder that exists.
    """
    if not formats:
        raise GatesError("--formats is empty: give onnx, torch or both")
    folder = place.run_folder.path / "exported" if output is None else Path(output)
    refuse_existing(folder, overwrite=overwrite_output)
    named_bundle = find_bundle(place, weights)
    print(f"weights: {named_bundle.name}")
    model, example, metadata = exportable(named_bundle.bundle)
    with replacing(folder) as partial:
        partial.mkdir()
        for name in dict.fromkeys(formats):
            path = partial / FILES[name]
            if name == "onnx":
                export_onnx(model, example, path, metadata)
            else:
                save_program(export_program(model, example), path)
            size, counts = path.stat().st_size / 1e6, ", ".join(map(str, CHECKED))
            print(f"{path.name}: {size:.2f} MB, agrees with PyTorch on {counts} frames")
        write_json(partial / "config.json", metadata)
        write_text(partial / "README.md", model_card(named_bundle.bundle.config()))
    print(folder)
