"""Names of the room, each with its file."""

from harness.files.piece import Piece as Piece
from harness.files.piece import Setting as Setting
from harness.files.piece import differences as differences
from harness.files.piece import flatten as flatten
from harness.files.piece import read_record as read_record

from .job import Job as Job
from .job import Work as Work
from .run import Run as Run
from .scores import Scores as Scores
from .scores import print_choices as print_choices
from .scores import print_scores as print_scores
from .scores import read_scores as read_scores
from .scores import write_scores as write_scores
from .ship import ROUNDED as ROUNDED
from .store import Arrays as Arrays
from .store import Figures as Figures
from .store import Form as Form
from .store import SettingsDiffer as SettingsDiffer
from .store import Store as Store
from .store import Table as Table
from .store import Written as Written
from .tuning import Choice as Choice
from .tuning import Space as Space
from .tuning import lowest as lowest
