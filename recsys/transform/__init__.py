"""Raw tables to packed tensors, by what was learned from the training rows."""

from recsys.transform.feature_transform import Features, FeatureTransform
from recsys.transform.fitting import Fitted

__all__ = ["FeatureTransform", "Features", "Fitted"]
