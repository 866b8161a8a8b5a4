"""Reasons why a file of low-rank adapters is refused."""

from core_gates.errors import GatesError


class LoraFileError(GatesError):
    """A file of low-rank adapters cannot be read or written."""


class ContainerError(LoraFileError):
    """A file is unsafe, damaged or larger than the limits allow."""


class FamilyError(LoraFileError):
    """A file belongs to another family of models."""


class FormatError(LoraFileError):
    """A format has no way to store some modules."""
