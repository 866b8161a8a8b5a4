"""``gates diffusion demo``: a page from a prompt to adapters, images and gates."""
