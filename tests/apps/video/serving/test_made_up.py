import numpy as np

from apps.video.serving.made_up import made_up
from apps.video.serving.requests import RequestReader


def test_rows_hold_known_values_in_every_field(shop):
    transform = shop.FeatureTransform(shop.schema()).fit(shop.rows(300))
    table = made_up(transform, 400)
    features = transform.encode(table)
    unknown_or_missing = (features.sparse < 2).any(0)
    assert not unknown_or_missing.any()
    assert (features.sequences[0] >= 2).any(1).mean() > 0.5
    assert np.unique(features.sparse, axis=0).shape[0] == 400
    assert made_up(transform, 400).equals(table)
    assert not made_up(transform, 400, seed=1).equals(table)
    assert set(table.columns) == set(RequestReader(transform, shop.TASKS).kinds)
