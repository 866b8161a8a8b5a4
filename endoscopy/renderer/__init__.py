"""Procedural colonoscopy: frames with metric truth from a seed."""

from endoscopy.renderer.config import RendererConfig
from endoscopy.renderer.dataset import render_dataset
from endoscopy.renderer.objects import RenderedObjects, render_objects

__all__ = ["RenderedObjects", "RendererConfig", "render_dataset", "render_objects"]
