"""Why an encoder cannot read an adapter."""

from diffusion.lora_file import LoraBundle
from diffusion.lora_file.container.text import listed
from diffusion.retrieval.config import EncoderConfig
from diffusion.retrieval.modules import family_of, fit, modules_of


def refusal_of(bundle: LoraBundle, config: EncoderConfig) -> str | None:
    """Return one line about why an adapter cannot be read, by names and sizes; None if it can.

    Args:
        bundle: The adapter.
        config: Of the encoder.
    """
    family = family_of(config.shape)
    if bundle.family != family:
        return f"it is an adapter of {bundle.family}, and the encoder was trained on {family}"
    found = fit(bundle, modules_of(config.shape, config.types))
    if found.misfits:
        return f"it belongs to a base of another size: {listed(list(found.misfits), 1)}"
    if not found.read:
        return "it changes no layer that the encoder reads"
    if found.missing and config.missing == "refuse":
        return f"the encoder needs all layers, and it lacks {listed(list(found.missing))}"
    return None
