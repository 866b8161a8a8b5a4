"""An adapter in canonical form, whatever dialect its file was written in."""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffusion.lora_file.errors import LoraFileError
from diffusion.lora_file.factors.change import Factors
from diffusion.lora_file.factors.kind import Sizes
from diffusion.lora_file.lazy import sizes_of
from diffusion.lora_file.report import MappingReport


@dataclass(frozen=True)
class LoraBundle:
    """The change of every layer of a model, by diffusers name.

    Attributes:
        family: ``flux`` or ``sd3``.
        modules: Layers of the transformer; those of a file are read at every access.
        text_encoders: Such as ``text_encoder_2`` to layers by the names of transformers.
        metadata: Text of the header of the file.
        report: What became of every tensor of the file.
        storage: Dtype of most factors in the file; float32 if there is none.
        name: Stem of the file, or that of its folder where programs call every file alike; empty if
            there is none.
    """

    family: str
    modules: Mapping[str, Factors]
    text_encoders: Mapping[str, Mapping[str, Factors]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    report: MappingReport | None = None
    storage: torch.dtype = torch.float32
    name: str = ""

    def delta_weight(self, module: str, weight: Tensor | None = None) -> Tensor:
        """Return what is added to the weight of a layer (out_features, in_features).

        Args:
            module: diffusers name.
            weight: Weight of the base, which DoRA needs.

        Raises:
            LoraFileError: The adapter does not change the layer, or needs the weight.
        """
        if module not in self.modules:
            raise LoraFileError(f"the adapter does not change the layer {module}")
        return self.modules[module].delta_weight(weight)

    def sizes(self) -> dict[str, Sizes]:
        """Return the rank, inputs and outputs of each layer of the transformer."""
        return sizes_of(self.modules)

    def ranks(self) -> dict[str, int]:
        """Return the rank of each layer of the transformer."""
        return {name: sizes.rank for name, sizes in self.sizes().items()}

    def norms(self) -> dict[str, float]:
        """Return ‖ΔW‖ (Frobenius) of each layer; for DoRA that of the change of the direction."""
        return {name: self.modules[name].norm() for name in self.modules}

    def digest(self) -> str:
        """Return a SHA-256 that does not depend on dialect, metadata or precision of storage.

        It covers names, shapes, scales and the values of all factors in float32.
        """
        digest = hashlib.sha256()
        for component, modules in sorted(
            {"transformer": self.modules, **self.text_encoders}.items()
        ):
            for name in sorted(modules):
                factors = modules[name]
                down, up, scale, magnitude = factors
                shape = (factors.rank, factors.in_features, factors.out_features)
                digest.update(f"{component} {name} {shape} {scale:.9g}\n".encode())
                for tensor in (down, up, *([] if magnitude is None else [magnitude])):
                    digest.update(tensor.float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def select(self, names: Iterable[str]) -> "LoraBundle":
        """Return the adapter of some layers of the transformer alone."""
        chosen = {name: self.modules[name] for name in names}
        return dataclasses.replace(self, modules=chosen, text_encoders={})
