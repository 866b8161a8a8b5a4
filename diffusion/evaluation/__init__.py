"""How good found adapters, fused adapters and images are."""
