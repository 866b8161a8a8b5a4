"""The forms of Adas that are compared, as changes of one network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FORMS: Mapping[str, Mapping[str, Any]] = {
    "adas_increment": {"output": "increment", "gated": True, "open_gate": False},
    "adas_official": {"output": "analysis", "gated": True, "open_gate": False},
    "ungated": {"output": "increment", "gated": False, "open_gate": False},
    "open_gate": {"output": "increment", "gated": True, "open_gate": True},
}
"""Arguments of :class:`~.network.Adas` of each form; all have the same parameters.

``adas_increment`` sees innovations and returns an increment, ``adas_official`` sees observations
and returns the whole field, as the published network does. ``ungated`` is the control of the
increment form: the gate stream is added before the activation instead of multiplied after it.
``open_gate`` is a second control, whose gates are all one: it cannot tell an observation of zero
from none.
"""

COMPARED = ("adas_increment", "adas_official", "ungated")
"""Forms that are tuned and trained by default; ``open_gate`` is trained on request."""
