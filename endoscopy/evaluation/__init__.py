"""Evaluation of polyp sizing: scores, intervals, baselines, audits and the honest table."""
