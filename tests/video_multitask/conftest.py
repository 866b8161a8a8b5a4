import pytest

from video_multitask.simulator.log import export_kuairand, simulate


@pytest.fixture(scope="session")
def feed():
    """31 days of a small world."""
    return simulate(rows=24_000, users=150, videos=300, days=31, seed=5)


@pytest.fixture(scope="session")
def release(feed, tmp_path_factory):
    """The same as a folder of KuaiRand's files."""
    return export_kuairand(feed, tmp_path_factory.mktemp("export") / "KuaiRand-Simulated").parent
