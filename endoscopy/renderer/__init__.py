"""Procedural colonoscopy: frames with metric truth from a seed."""

from endoscopy.renderer.render import RenderedObjects, render_objects
from endoscopy.renderer.rendered_dataset import render_dataset
from endoscopy.renderer.scene import RendererConfig

__all__ = ["RenderedObjects", "RendererConfig", "render_dataset", "render_objects"]
