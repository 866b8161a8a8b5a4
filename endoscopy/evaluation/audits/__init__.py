"""Audits: what a predictor of sizes leans on. Each takes a predictor and frames, returns rows."""

from endoscopy.evaluation.audits.conditions import condition_rows
from endoscopy.evaluation.audits.masks import box_audit, mask_audit
from endoscopy.evaluation.audits.oracle_scale import (
    fit_scale,
    oracle_scale_audit,
    oracle_scales,
    size_proxy,
)
from endoscopy.evaluation.audits.shortcut import partition_audit, shortcut_audit

__all__ = [
    "box_audit",
    "condition_rows",
    "fit_scale",
    "mask_audit",
    "oracle_scale_audit",
    "oracle_scales",
    "partition_audit",
    "shortcut_audit",
    "size_proxy",
]
