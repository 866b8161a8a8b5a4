"""Readers of public data sets, and of any table."""

from recsys.data.readers.aliexpress import AliExpress
from recsys.data.readers.census import Census
from recsys.data.readers.files import read_table
from recsys.data.readers.movielens import MovieLens
from recsys.data.readers.open_bandit import OpenBandit
from recsys.data.readers.own_table import OwnTable

__all__ = ["AliExpress", "Census", "MovieLens", "OpenBandit", "OwnTable", "read_table"]
