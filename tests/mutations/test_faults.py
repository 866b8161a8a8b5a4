"""The faults that are planted to see whether tests catch them."""

import pytest

from tests.mutations.faults import FAULTS
from tests.mutations.run import ROOT, planted


@pytest.mark.slow
def test_every_fault_can_be_planted():
    assert len(FAULTS) == 40
    for fault in FAULTS:
        assert planted(ROOT, fault) != (ROOT / fault.file).read_text()
        assert all((ROOT / "tests" / name).exists() for name in fault.tests.split())


@pytest.mark.parametrize("text", ["", "x = 1\nx = 1\n"], ids=["absent", "twice"])
def test_a_fault_of_another_text_is_refused_in_one_line(tmp_path, text):
    fault = FAULTS[0]._replace(file="a.py", original="x = 1", replacement="x = 2")
    (tmp_path / "a.py").write_text(text)
    with pytest.raises(SystemExit, match=r"a.py has 'x = 1' [02] times, expected once: bring"):
        planted(tmp_path, fault)
