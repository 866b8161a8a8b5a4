"""Names of the room, each with its file."""

from .forms import Arrays as Arrays
from .forms import Figures as Figures
from .forms import Form as Form
from .forms import Table as Table
from .job import Job as Job
from .piece import Piece as Piece
from .piece import Setting as Setting
from .piece import differences as differences
from .piece import flatten as flatten
from .printing import print_choices as print_choices
from .printing import print_scores as print_scores
from .record import read_record as read_record
from .run import Run as Run
from .scores import Scores as Scores
from .scores import read_scores as read_scores
from .scores import write_scores as write_scores
from .ship import ROUNDED as ROUNDED
from .store import SettingsDiffer as SettingsDiffer
from .store import Store as Store
from .tuning import Choice as Choice
from .tuning import Space as Space
from .tuning import lowest as lowest
from .work import Work as Work
