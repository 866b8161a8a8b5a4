"""The segmenter that locates polyps, and its training on rendered frames."""
