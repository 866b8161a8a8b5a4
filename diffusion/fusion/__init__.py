"""Adapters side by side under learned gates."""

from diffusion.fusion.gated_fusion import GatedFusion

__all__ = ["GatedFusion"]
