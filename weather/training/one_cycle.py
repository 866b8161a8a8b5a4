"""One-cycle schedule that fits the training, one that is resumed for longer included."""

from typing import Any

from torch.optim.lr_scheduler import OneCycleLR

LENGTH = ("total_steps", "_schedule_phases")


class OneCycle(OneCycleLR):
    """:class:`torch.optim.lr_scheduler.OneCycleLR` that keeps its own length when state is loaded.

    The learning rate of a lengthened training continues on the longer cycle, at the same step.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up everything but the length."""
        super().load_state_dict({**state_dict, **{name: getattr(self, name) for name in LENGTH}})
