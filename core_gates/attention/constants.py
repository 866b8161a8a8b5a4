"""Numbers that all attention with gates starts from."""

INIT_STD = 0.02
NORM_EPS = 1e-6
