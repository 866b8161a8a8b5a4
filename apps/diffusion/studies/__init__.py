"""What ``gates diffusion evaluate`` shows, a configuration a file."""
