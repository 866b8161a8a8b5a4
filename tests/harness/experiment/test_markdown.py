import math

from harness.evidence.rows import Bar, Row
from harness.experiment.scores import write_markdown

EXPECTED = """# Weather: unit

## Bars

| bar | figure | limit | verdict |
|---|---|---|---|
| oi over background | 0.5000 | <= 1.000 x | met |
| adas over oi | 1.500 | <= 1.000 | missed |

## 0.1

| method | rmse | ratio |
|---|---|---|
| oi | 3.000 [2.000, 4.000] | 0.5000 |
| free run | – |  |
| oi − free run | −0.5000 [−0.7000, −0.3000] |  |
"""


def test_bars_then_a_table_a_task(tmp_path):
    rows = [
        Row("oi", "0.1", "rmse", 3.0, 2.0, 4.0),
        Row("oi", "0.1", "ratio", 0.5),
        Row("free run", "0.1", "rmse", math.nan, math.nan, 2.0),
        Row("oi", "0.1", "rmse", -0.5, -0.7, -0.3, versus="free run", p=0.001),
    ]
    bars = [Bar("oi over background", 0.5, "<=", 1.0, "x"), Bar("adas over oi", 1.5, "<=", 1.0)]
    path = tmp_path / "scores.md"
    write_markdown(path, ["# Weather: unit"], rows, bars)
    assert path.read_text() == EXPECTED
    write_markdown(path, ["Quick run", "A note"], rows[:1])
    assert path.read_text().startswith("Quick run\n\nA note\n\n## 0.1\n")
