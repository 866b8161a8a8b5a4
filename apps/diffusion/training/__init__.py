"""Training runs of ``gates diffusion``, a verb a file."""
