"""What a script needs first, each with its file."""

from .gated.attach import attach_output_gate as attach_output_gate
from .gated.state import load_gates as load_gates
from .gated.state import save_gates as save_gates
from .hf.experts import register_experts as register_experts
from .hf.lora import attach_sora as attach_sora
from .hf.pretrained import open_model as open_model
from .offload.loading import load_offloaded as load_offloaded
from .offload.runtime import attach_offload as attach_offload
from .seer.attach import attach_block_gates as attach_block_gates

__version__: str
