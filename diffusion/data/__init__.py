"""Captioned drawings in many styles, and folders of images that adapters are trained on."""
