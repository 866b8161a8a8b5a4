from tests.fixtures.coarse_figures import coarse_figures  # noqa: F401
