"""Frames and lesion locations that `predict` reads: images, videos, DICOM, boxes, masks."""

from core_gates.errors import MissingExtraError

for _package, _module in (("av", "av"), ("pydicom", "pydicom"), ("pillow", "PIL")):
    try:
        __import__(_module)
    except ImportError as error:
        raise MissingExtraError("endoscopy", _package) from error
