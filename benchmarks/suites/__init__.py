"""One module a suite; each defines ``comparisons()`` and ``TESTS``."""
