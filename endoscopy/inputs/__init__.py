"""Frames and lesion locations that `predict` reads: images, videos, DICOM, boxes, masks."""
