"""SeqBoat: sequence models whose gate decides token by token whether attention runs."""
