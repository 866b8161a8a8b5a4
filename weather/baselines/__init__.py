"""Classical assimilation methods, which Adas is compared with."""
