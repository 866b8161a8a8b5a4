"""How many steps a forecast takes."""


def num_steps(hours: float, step_hours: float) -> int:
    """Return the number of steps of a forecast.

    Args:
        hours: Length of the forecast.
        step_hours: Length of a step.

    Raises:
        ValueError: The hours are negative, or no multiple of the step.
    """
    steps = round(hours / step_hours)
    if hours < 0 or abs(steps * step_hours - hours) > 1e-6:
        raise ValueError(f"hours must be a multiple of the step of {step_hours:g} h, got {hours} h")
    return steps
