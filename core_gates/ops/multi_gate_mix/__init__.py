"""Several gates over one set of experts, with self gates folded into the same mix."""
