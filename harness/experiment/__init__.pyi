"""Names of the room, each with its file."""

from .forms import Arrays as Arrays
from .forms import Figures as Figures
from .forms import Form as Form
from .forms import Table as Table
from .job import Job as Job
from .piece import Piece as Piece
from .piece import Setting as Setting
from .run import Run as Run
from .store import SettingsDiffer as SettingsDiffer
from .store import Store as Store
from .tuning import Choice as Choice
from .tuning import Space as Space
from .tuning import lowest as lowest
from .work import Work as Work
