"""Training caches: the states of a store as one array that is read frame by frame."""
