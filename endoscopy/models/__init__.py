"""Sizing networks: trunks of timm or small ones, with gates, for one to several streams."""

from endoscopy.models.sizer import (
    MultiStreamSizer,
    fold,
    fsg_resnet18,
    fsg_vit,
    fsg_vit_tiny_patch16_384,
    load_timm_weights,
    tiny_resnet,
    tiny_vit,
)
from endoscopy.models.trunks import GateKind, gate_parameters, gates_of, weight_parameters

__all__ = [
    "GateKind",
    "MultiStreamSizer",
    "fold",
    "fsg_resnet18",
    "fsg_vit",
    "fsg_vit_tiny_patch16_384",
    "gate_parameters",
    "gates_of",
    "load_timm_weights",
    "tiny_resnet",
    "tiny_vit",
    "weight_parameters",
]
