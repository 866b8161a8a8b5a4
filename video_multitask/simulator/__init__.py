"""A short-video feed whose true probabilities are known, in KuaiRand's format."""
