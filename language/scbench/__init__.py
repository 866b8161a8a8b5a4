"""SCBench: models that are asked several times about one context (arXiv 2412.10319)."""
