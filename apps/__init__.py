"""Commands, configurations and reports; no networks, losses or optimizers."""

import core_gates  # noqa: F401 - which names the extra of a library that is missing
