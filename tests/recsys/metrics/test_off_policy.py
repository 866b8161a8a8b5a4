import numpy as np
import pytest

from core_gates.errors import GatesError
from recsys.metrics import off_policy


def log_of(rng, rows=2000, arms=5):
    """A log of a skewed policy; the click rate of each arm is known."""
    rates = np.linspace(0.05, 0.4, arms)
    policy = rng.dirichlet(np.ones(arms))
    policy = 0.9 * policy + 0.1 / arms
    arm = rng.choice(arms, rows, p=policy)
    return rng.random(rows) < rates[arm], arm, policy, rates


@pytest.mark.parametrize("interval", ["normal", "bootstrap"])
def test_intervals_of_the_uniform_policy_hold_the_truth(interval):
    held = np.zeros(2)
    rng = np.random.default_rng(0)
    for _ in range(100):
        rewards, arm, policy, rates = log_of(rng)
        found = off_policy(
            rewards, np.full(2000, 0.2), policy[arm], interval=interval, resamples=300
        )
        held += [one.low <= rates.mean() <= one.high for one in (found.ips, found.snips)]
    assert (held >= 85).all()
    assert (held < 100).all()


def test_the_logging_policy_itself_earns_its_mean():
    rewards, arm, policy, _ = log_of(np.random.default_rng(1))
    found = off_policy(rewards, policy[arm], policy[arm])
    assert found.ips.value == found.snips.value == pytest.approx(rewards.mean())
    assert found.effective == len(rewards) == found.rows
    assert found.clipped == 0
    error = np.sqrt(rewards.var(ddof=1) / len(rewards))
    assert found.ips.high - found.ips.low == pytest.approx(2 * 1.959964 * error, rel=1e-6)


def test_clipping_and_effective_sample_size():
    target, logged = np.array([0.5, 0.5, 0.9]), np.array([0.5, 0.05, 0.9])
    rewards = np.array([1, 1, 0])
    plain = off_policy(rewards, target, logged)
    assert plain.ips.value == pytest.approx(11 / 3)
    assert plain.snips.value == pytest.approx(11 / 12)
    assert plain.effective == pytest.approx(144 / 102)
    cut = off_policy(rewards, target, logged, clip=2)
    assert cut.ips.value == pytest.approx(1)
    assert cut.snips.value == pytest.approx(3 / 4)
    assert cut.clipped == pytest.approx(1 / 3)
    assert cut.effective == pytest.approx(16 / 6)


def test_clusters_widen_the_interval():
    rng = np.random.default_rng(2)
    users = np.repeat(np.arange(50), 40)
    rewards = rng.random(50)[users] > rng.random(2000)
    ones = np.full(2000, 0.5)
    rows = off_policy(rewards, ones, ones).snips
    clustered = off_policy(rewards, ones, ones, clusters=users).snips
    drawn = off_policy(rewards, ones, ones, clusters=users, interval="bootstrap").snips
    assert clustered.units == drawn.units == 50
    assert clustered.high - clustered.low > 2 * (rows.high - rows.low)
    assert drawn.high - drawn.low == pytest.approx(clustered.high - clustered.low, rel=0.15)


def test_a_policy_that_never_takes_a_logged_action_has_no_estimate():
    found = off_policy([1, 0], [0, 0], [0.5, 0.5])
    assert found.ips.value == 0
    assert np.isnan(found.snips.value)
    assert found.effective == 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (([1], [0.5], [0.0]), r"logged probabilities must lie in \(0, 1\]"),
        (([1], [1.5], [0.5]), r"target probabilities lie in \[0, 1\], found 1.5 to 1.5"),
        (([1, 0], [0.5], [0.5]), "expected one finite number for each of 1 rows"),
        (([1], [0.5, 0.5], [0.5]), r"target \(2,\) and logged \(1,\)"),
    ],
)
def test_faults(arguments, line):
    with pytest.raises(GatesError, match=line):
        off_policy(*arguments)
    with pytest.raises(ValueError, match="clip must be positive"):
        off_policy([1], [0.5], [0.5], clip=0)
    with pytest.raises(ValueError, match="interval is 'exact'; choose one of normal, bootstrap"):
        off_policy([1], [0.5], [0.5], interval="exact")
