import pytest

from core_gates.ops import BlockLayout, block_sparse_attention
from core_gates.routing import refuse_coupled_gates


@pytest.mark.fault("core A11")
@pytest.mark.parametrize("documented", [block_sparse_attention, BlockLayout, refuse_coupled_gates])
def test_causality_hides_what_comes_after(documented):
    """A token that follows is *after* another one; *behind* may be read as before it."""
    assert "behind" not in documented.__doc__
    assert " after it" in documented.__doc__
