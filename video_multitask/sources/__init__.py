"""Data sets of short video, as tables of training, validation and test rows with a schema."""
