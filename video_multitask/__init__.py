"""Short-video ranking: KuaiRand, behaviours, a feed simulator, streaming, scoring."""
