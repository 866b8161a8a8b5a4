"""What is trained and made of adapters, as pieces of work: zoo, encoders, gates, losses, images."""
