"""Names of the room, each with its file."""

from ._select import kernels as kernels
from .block_max_attention.op import BlockMaxOutput as BlockMaxOutput
from .block_max_attention.op import block_max_attention as block_max_attention
from .block_sparse_attention.op import block_sparse_attention as block_sparse_attention
from .block_sparse_attention.reference import BlockLayout as BlockLayout
from .elementwise import ActiveTokens as ActiveTokens
from .elementwise import compress as compress
from .elementwise import extract as extract
from .elementwise import gate_multiply as gate_multiply
from .elementwise import silu_gate as silu_gate
from .elementwise import smooth_step as smooth_step
from .elementwise import soft_threshold as soft_threshold
from .feature_gate.op import feature_gate as feature_gate
from .gated_lora.op import gated_lora as gated_lora
from .gated_residual_norm.op import gated_residual_norm as gated_residual_norm
from .grouped_linear.op import grouped_linear as grouped_linear
from .grouped_mlp.op import grouped_mlp as grouped_mlp
from .multi_gate_mix.op import multi_gate_mix as multi_gate_mix
from .norm_act.op import norm_act as norm_act
from .router.op import Routed as Routed
from .router.op import router as router
