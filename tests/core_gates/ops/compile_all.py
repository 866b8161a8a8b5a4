"""Run scripts of this folder in one process, which imports Triton once.

``python compile_all.py '[["compile_gated_lora.py", "bf16"], ...]'`` writes a list of what each
writes.
"""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

reports = []
for script, *words in json.loads(sys.argv[1]):
    sys.argv = [script, *words]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        runpy.run_path(str(Path(__file__).with_name(script)))
    reports.append(json.loads(said.getvalue()))
sys.stdout.write(json.dumps(reports))
