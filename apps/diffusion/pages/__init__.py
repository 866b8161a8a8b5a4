"""What reports of ``gates diffusion`` show besides scores, a file per study."""
