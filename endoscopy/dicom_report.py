"""A DICOM structured report of sizes; the only output that carries patient tags."""

import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code
from pydicom.uid import generate_uid

from core_gates.errors import GatesError
from endoscopy.bundles.sizing_bundle import NO_CALIBRATION, RESEARCH_ONLY, Scope
from endoscopy.inputs.frame_sources import dicom_headers
from endoscopy.prediction import Prediction
from harness.files.atomic import replacing

COLONOSCOPY = Code("73761001", "SCT", "Colonoscopy")
LENGTH = Code("410668003", "SCT", "Length")
MAKER = "Gatesuite"


def write_dicom_report(
    path: str | Path,
    source: str | Path,
    prediction: Prediction,
    objects: pd.DataFrame,
    scope: Scope,
    *,
    procedure: Code = COLONOSCOPY,
) -> Path:
    """Write a report with the length of every lesion (DICOM PS3.16, TID 1500).

    A lesion is a planar region, the box on its sharpest frame, with its size as the median over
    frames and the interval as measurement uncertainty. A lesion whose frames all abstain has the
    reason instead of a size.

    Args:
        path: Where to write; the file is complete or absent.
        source: The DICOM source of the prediction, whose patient and study the report belongs to.
        prediction: Of the source.
        objects: From `endoscopy.prediction.objects_of`, in millimeters.
        scope: Of the model.
        procedure: What was done.

    Raises:
        GatesError: The source is not DICOM, lacks a tag, or its scope has no calibration.
        MissingExtraError: highdicom is not installed.
    """
    highdicom = require_reportable(source, prediction.input.kind, prediction.scope, scope)
    headers = {str(header.SOPInstanceUID): header for _, header in dicom_headers(source)}
    groups = [
        _group(highdicom.sr, row, prediction.frames, headers) for _, row in objects.iterrows()
    ]
    try:
        report = _report(highdicom, groups, list(headers.values()), procedure)
    except (AttributeError, ValueError) as error:
        line = (str(error).splitlines() or [""])[0]
        raise GatesError(
            f"{source}: cannot carry a report: {line}; complete its patient and study tags"
        ) from error
    path = Path(path)
    with replacing(path) as temporary:
        report.save_as(temporary, enforce_file_format=True)
    return path


def require_reportable(source: str | Path, kind: str, named: str | None, scope: Scope) -> Any:
    """Refuse a source for which no report can be written, before anything is predicted.

    Args:
        source: For messages.
        kind: Of the source, see `endoscopy.inputs.frame_sources.source_kind`.
        named: Scope of the source, None if unknown.
        scope: Of the model.

    Returns:
        The package highdicom.

    Raises:
        GatesError: The source is not DICOM, or its scope has no calibration.
        MissingExtraError: highdicom is not installed.
    """
    import highdicom

    if kind != "dicom":
        raise GatesError(f"{source}: is no DICOM source; a structured report needs its study")
    if not scope.is_calibrated(named):
        raise GatesError(
            f"{source}: {NO_CALIBRATION}, and a structured report holds millimeters; name a scope "
            f"that the model card names: {', '.join(scope.calibrated_for) or 'it names none'}"
        )
    return highdicom


def _report(highdicom: Any, groups: list[Any], evidence: list[Dataset], procedure: Code) -> Dataset:
    sr = highdicom.sr
    device = sr.ObserverContext(
        observer_type=Code("121007", "DCM", "Device"),
        observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
            uid=generate_uid(), name=f"{MAKER} polyp sizing, {RESEARCH_ONLY}"
        ),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values in the source that violate the standard
        content = sr.MeasurementReport(
            observation_context=sr.ObservationContext(observer_device_context=device),
            procedure_reported=procedure,
            imaging_measurements=groups,
        )
        document: Dataset = sr.ComprehensiveSR(
            evidence=evidence,
            content=content[0],
            series_instance_uid=generate_uid(),
            series_number=1000,
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer=MAKER,
            is_complete=True,
            is_final=False,
            is_verified=False,
            series_description=f"Polyp sizes, {RESEARCH_ONLY}",
        )
    return document


def _group(sr: Any, row: pd.Series, frames: pd.DataFrame, headers: dict[str, Any]) -> Any:
    """Return the measurements of one lesion."""
    object_frames = frames[frames["unique_id"] == row["unique_id"]]
    counting = object_frames[object_frames["reasons"] == ""]
    best = (object_frames if counting.empty else counting).sort_values("sharpness").iloc[-1]
    abstained = bool(row["abstained"])
    reason = str(best["reasons"]).split("; ")[0]
    evaluation = sr.QualitativeEvaluation(
        name=Code("ABSTENTION", "99GATES", "Reason for giving no size"),
        value=Code(reason.upper().replace(" ", "_")[:16], "99GATES", reason),
    ) if abstained else None  # fmt: skip
    return sr.PlanarROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(uid=generate_uid(), identifier=row["unique_id"]),
        referenced_region=_region(sr, best, headers),
        finding_type=Code("41329004", "SCT", "Polyp"),
        algorithm_id=sr.AlgorithmIdentification(
            name=f"{MAKER} polyp sizing", version=_version(), parameters=[RESEARCH_ONLY]
        ),
        measurements=[] if abstained else [_length(sr, row)],
        qualitative_evaluations=[evaluation] if evaluation is not None else [],
    )


def _length(sr: Any, row: pd.Series) -> Any:
    size = float(row["predicted_mm"])
    low, high = float(row.get("lower_mm", np.nan)), float(row.get("upper_mm", np.nan))
    properties = None
    if np.isfinite(low) and np.isfinite(high):
        properties = sr.MeasurementProperties(
            lower_measurement_uncertainty=round(size - low, 2),
            upper_measurement_uncertainty=round(high - size, 2),
        )
    return sr.Measurement(
        name=LENGTH,
        value=round(size, 2),  # fits a decimal string of DICOM
        unit=Code("mm", "UCUM", "mm"),
        derivation=Code("373099004", "SCT", "Median"),
        properties=properties,
    )


def _region(sr: Any, best: pd.Series, headers: dict[str, Any]) -> Any:
    uid, _, number = str(best["frame_id"]).partition("#")
    xmin, xmax, ymin, ymax = (
        float(best[f"bbox_{side}"]) for side in ("xmin", "xmax", "ymin", "ymax")
    )
    corners = [(xmin, ymin), (xmax, ymin), (xmax, ymax), (xmin, ymax), (xmin, ymin)]
    image = sr.SourceImageForRegion(
        referenced_sop_class_uid=headers[uid].SOPClassUID,
        referenced_sop_instance_uid=uid,
        referenced_frame_numbers=[int(number)] if number else None,
    )
    return sr.ImageRegion("POLYLINE", np.array(corners), image)


def _version() -> str:
    try:
        return version("gatesuite")
    except PackageNotFoundError:
        return "unknown"
