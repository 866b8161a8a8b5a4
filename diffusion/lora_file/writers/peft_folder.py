"""The format of PEFT: a folder with weights and a configuration, of one network."""

from diffusion.lora_file.bundle import LoraBundle
from diffusion.lora_file.writers.layout import Layout, kept_metadata, refuse
from diffusion.lora_file.writers.peft_settings import settings_of, tensors_of


def peft_folder(bundle: LoraBundle) -> Layout:
    """Lay an adapter out for ``PeftModel.from_pretrained``.

    Raises:
        FormatError: It has parts for text encoders, or only some layers are DoRA adapters.
    """
    others = [f"{component}.{n}" for component, own in bundle.text_encoders.items() for n in own]
    refuse("peft", others, "a folder of PEFT holds the adapter of one network")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "inference_mode": True,
        **settings_of(bundle.modules),
    }
    tensors = tensors_of(bundle.modules, "base_model.model.", "peft")
    return Layout(tensors, kept_metadata(bundle.metadata), config)
