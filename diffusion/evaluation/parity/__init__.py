"""Numbers that must come out as elsewhere: golden vectors, formats, other libraries."""
