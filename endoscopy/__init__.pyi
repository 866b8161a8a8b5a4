"""What a script needs first, each with its file."""

from .models import MultiStreamSizer as MultiStreamSizer
from .models import fold as fold
from .models import gates_of as gates_of
from .training.sizing_module import SizingModule as SizingModule

__version__: str
