"""``gates language`` on labeled sequences: SeqBoat on speech, ListOps and bytes."""
