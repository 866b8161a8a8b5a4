"""How a trained network is stored: its weights, its units and all that their use takes."""

from __future__ import annotations

from pathlib import Path

import torch

from core_gates.errors import GatesError
from weather.models.adas.analysis import AdasAnalysis, load_weights, read_header, save_weights
from weather.models.adas.network import Adas
from weather.state import Normalizer

OWN = ("confidence_kind", "confidence_scale", "background_error")


class AnalysisForm:
    """Keeps an analysis as ``weights.safetensors``, see :func:`~.analysis.save_weights`."""

    FILE = "weights.safetensors"

    def save(self, folder: Path, result: AdasAnalysis) -> None:
        """Write the weights as bfloat16, with what the network is."""
        save_weights(folder / self.FILE, result)

    def load(self, folder: Path) -> AdasAnalysis:
        """Return the network in evaluation mode.

        Raises:
            GatesError: The file is missing or damaged.
        """
        path = folder / self.FILE
        arguments = read_header(path)["form"]
        own = {name: arguments.pop(name) for name in OWN if name in arguments}
        try:
            network = Adas(**arguments)
        except (TypeError, ValueError) as error:
            raise GatesError(
                f"{path}: a network that cannot be built ({error}); train again"
            ) from error
        channels = network.num_channels
        units = Normalizer(torch.zeros(channels), torch.ones(channels))
        analysis = AdasAnalysis(network, units, torch.ones(channels), **own)
        load_weights(path, analysis)
        return analysis.eval()
