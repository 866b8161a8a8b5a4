"""Short-video ranking with HoME and its rivals."""
