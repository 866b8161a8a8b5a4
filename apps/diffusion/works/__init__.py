"""What ``gates diffusion`` trains and makes, as pieces of work."""
