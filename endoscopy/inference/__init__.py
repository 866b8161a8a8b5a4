"""Sizing the polyps of images, videos and DICOM with a trained network."""
