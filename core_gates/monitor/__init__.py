"""What the gates of a model do, counted while it runs."""
