"""Questions other than which network is best, each with its own pieces, rows and bars."""
