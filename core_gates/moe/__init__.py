"""Mixtures of experts: the layer, experts, dispatch, upcycling and expert parallelism."""
