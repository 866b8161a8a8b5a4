"""The learning rate of the published recipes."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts


def warm_restarts(
    optimizer: Optimizer, epochs: int, cycles: int, min_learning_rate: float
) -> CosineAnnealingWarmRestarts:
    """Return a cosine from the learning rate to the smallest one, ``cycles`` times.

    It is stepped after every batch with the epoch as a real number.

    Args:
        optimizer: Whose learning rate is scheduled.
        epochs: Length of the training.
        cycles: Number of restarts, the first included.
        min_learning_rate: End of each cycle.

    Raises:
        ValueError: There are more cycles than epochs.
    """
    if not 1 <= cycles <= epochs:
        raise ValueError(f"cycles must lie between 1 and the {epochs} epochs, got {cycles}")
    return CosineAnnealingWarmRestarts(optimizer, epochs // cycles, eta_min=min_learning_rate)
