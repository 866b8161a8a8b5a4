"""The structured report carries lengths and the patient; nothing else carries the patient."""

import numpy as np
import pandas as pd
import pydicom
import pytest

from endoscopy.bundles.sizing_bundle import Scope
from endoscopy.data.readers.tabular import ReadReport
from endoscopy.dicom_report import LENGTH, write_dicom_report
from endoscopy.inputs.image_files import InputReport
from endoscopy.prediction import Prediction

highdicom = pytest.importorskip("highdicom")
NUMERIC_VALUE = 0x0040A30A
SCOPE = Scope("our ward", ("ward",))


@pytest.fixture
def source(tmp_path, write):
    """A multi-frame endoscopic image of a patient."""
    dataset = write.header()
    dataset.Rows, dataset.Columns, dataset.NumberOfFrames = 8, 8, 2
    dataset.save_as(tmp_path / "source.dcm", enforce_file_format=True)
    return tmp_path / "source.dcm"


def predicted(source, kind="dicom", scope="ward"):
    uid = pydicom.dcmread(source).SOPInstanceUID
    frames = pd.DataFrame({
        "unique_id": ["a", "a", "b"],
        "frame_id": [f"{uid}#1", f"{uid}#2", f"{uid}#2"],
        "bbox_xmin": [1.0, 2.0, 3.0], "bbox_xmax": [5.0, 6.0, 7.0],
        "bbox_ymin": [1.0, 1.5, 2.0], "bbox_ymax": [4.0, 5.0, 6.0],
        "predicted_mm": [4.0, 6.0, 9.0],
        "sharpness": [0.1, 0.3, 0.2],
        "reasons": ["", "", "too near; blurred"],
    })  # fmt: skip
    objects = pd.DataFrame({
        "unique_id": ["a", "b"], "predicted_mm": [5.0, 9.0], "lower_mm": [4.0, 7.5],
        "upper_mm": [6.25, 10.8], "abstained": [False, True], "reasons": ["", "too near; blurred"],
    })  # fmt: skip
    report = InputReport(uid, kind, 2, 2)
    return Prediction(frames, scope, report, ReadReport("boxes")), objects


def test_the_report_holds_length_interval_region_and_patient(tmp_path, source):
    path = write_dicom_report(tmp_path / "report.dcm", source, *predicted(source), SCOPE)
    report = highdicom.sr.srread(path)
    original = pydicom.dcmread(source)
    for tag in ("PatientName", "PatientID", "StudyInstanceUID", "AccessionNumber"):
        assert report[tag].value == original[tag].value
    assert report.SeriesInstanceUID != original.SeriesInstanceUID
    groups = report.content.get_planar_roi_measurement_groups()
    assert [group.tracking_identifier for group in groups] == ["a", "b"]
    [length] = groups[0].get_measurements()
    assert (length.name, length.value, length.unit.value) == (LENGTH, 5.0, "mm")
    numbers = [float(e.value) for e in pydicom.dcmread(path).iterall() if e.tag == NUMERIC_VALUE]
    assert numbers == [5.0, 1.25, 1.0]  # and the distances to the bounds
    text = str(report).lower()
    assert "upper measurement uncertainty" in text
    assert "research only" in text
    np.testing.assert_array_equal(
        groups[0].roi.value, [[2, 1.5], [6, 1.5], [6, 5], [2, 5], [2, 1.5]]
    )
    image = groups[0].roi.ContentSequence[0].ReferencedSOPSequence[0]
    assert image.ReferencedSOPInstanceUID == original.SOPInstanceUID
    assert image.ReferencedFrameNumber == 2


def test_a_lesion_that_abstains_has_a_reason_and_no_length(tmp_path, source):
    path = write_dicom_report(tmp_path / "report.dcm", source, *predicted(source), SCOPE)
    group = highdicom.sr.srread(path).content.get_planar_roi_measurement_groups()[1]
    assert group.get_measurements() == []
    [evaluation] = group.get_qualitative_evaluations()
    assert evaluation.value.meaning == "too near"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scope": None}, "no millimeter calibration for this scope"),
        ({"kind": "video"}, "no DICOM source"),
    ],
)
def test_without_calibration_or_a_study_there_is_no_report(
    tmp_path, source, changes, words, refused
):
    refused(
        words,
        write_dicom_report,
        tmp_path / "report.dcm",
        source,
        *predicted(source, **changes),
        SCOPE,
    )
    assert [file.name for file in tmp_path.iterdir()] == ["source.dcm"]


def test_a_source_without_a_study_is_refused_in_one_line(tmp_path, source, refused):
    prediction, objects = predicted(source)
    dataset = pydicom.dcmread(source)
    del dataset.StudyInstanceUID
    dataset.save_as(source)
    refused(r"cannot carry a report: .*StudyInstanceUID", write_dicom_report,
            tmp_path / "report.dcm", source, prediction, objects, SCOPE)  # fmt: skip
