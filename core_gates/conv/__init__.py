"""Gated convolutions."""

from core_gates.conv.gated import GatedConv, PartialConv
from core_gates.conv.same import SameConv, same_conv

__all__ = ["GatedConv", "PartialConv", "SameConv", "same_conv"]
