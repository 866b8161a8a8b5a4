"""A trained model at work: on files, and in requests."""
