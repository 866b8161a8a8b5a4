import numpy as np
import pytest

from harness.evidence import Bar, Resamples, compare, moments

METHODS = ("background", "inverse distance", "optimal interpolation", "network, gated")


@pytest.fixture
def rows():
    """Three methods against one of them on two tasks in two metrics."""
    draws, found = np.random.default_rng(0), []
    for task in ("10 % of the points", "1 % of the points"):
        common = draws.normal(size=40)
        values = {
            name: 2 + common - 0.3 * i + 0.4 * draws.normal(size=40)
            for i, name in enumerate(METHODS)
        }

        def of(x):
            return lambda weights: {
                "error (K)": moments(x)(weights)["value"],
                "hits": moments(x < 1)(weights)["value"],
            }

        scores = {name: of(x) for name, x in values.items()}
        found += compare(scores, Resamples.clusters(range(40)), task=task, reference=METHODS[0])
    return found


@pytest.fixture
def bars():
    return [
        Bar("error over that of the background", 0.62, "<=", 1.0),
        Bar("accuracy of the gated network", 0.81, ">=", 0.85),
        Bar("seconds an epoch", 240.0, "<=", 100.0, "s"),
        Bar("drift", -0.02, "<=", 0.0, "K a day"),
        Bar("never measured", float("nan"), "<=", 1.0),
    ]


@pytest.fixture
def runs():
    """Losses and a figure of two methods with two seeds each."""
    from harness.figures import Curve

    draws, steps = np.random.default_rng(0), np.arange(1500)

    def training(level):
        loss = (level + np.exp(-steps / 300)) * np.exp(0.1 * draws.normal(size=len(steps)))
        seen = steps[99::100]
        return {
            "train/loss": Curve(steps, loss),
            "val/loss": Curve(seen, 1.05 * loss[seen]),
            "val/accuracy": Curve(seen, 0.9 - 0.5 * loss[seen] / 2),
        }

    return {name: [training(x) for _ in range(2)] for name, x in (("switch", 0.2), ("top2", 0.1))}
