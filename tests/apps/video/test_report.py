"""What the report draws of one user."""

from types import SimpleNamespace

import polars as pl

from apps.video.report import day_of_one_user


def test_the_list_holds_each_video_of_one_day_of_one_user_once():
    table = pl.DataFrame(
        {
            "user": [1, 1, 1, 1, 2, 2, 2, 1],
            "video": [7, 8, 7, 9, 7, 8, 9, 5],
            "date": [20, 20, 20, 21, 20, 20, 20, 20],
        }
    )
    schema = SimpleNamespace(user="user", item="video")
    rows, day = day_of_one_user(table[:4], schema)
    assert (rows.tolist(), day) == ([0, 1], "20")
    rows, day = day_of_one_user(table[:7], schema)
    assert (rows.tolist(), day) == ([4, 5, 6], "20")
    rows, day = day_of_one_user(table.drop("date"), schema)
    assert (rows.tolist(), day) == ([0, 1, 3, 7], "the days of the test")
