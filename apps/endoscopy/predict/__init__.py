"""``gates endoscopy predict``: size the polyps on images, videos or DICOM."""
