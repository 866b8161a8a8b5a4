import subprocess
import sys

SCRIPT = "import sys; sys.modules['xarray'] = None; import weather.data"


def test_missing_xarray_names_the_extra():
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    last = finished.stderr.strip().splitlines()[-1]
    assert last.endswith("MissingExtraError: weather needs xarray: pip install '.[weather]'")
