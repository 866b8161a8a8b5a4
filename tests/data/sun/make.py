"""Fake cases in the layout of the SUN Colonoscopy Video Database, original or renamed."""

from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 60, 50
CASES = (1, 2, 10, 24)


def name(case: int, frame: int) -> str:
    """Return a file name as SUN has them; frames do not sort as text."""
    return f"1_{case}_PNR{case:03d}_a_{frame}.jpg"


def official(root: Path, cases=CASES, frames: int = 11, *, renamed: bool = False) -> Path:
    """Write cases with one box a frame, lines in the order of the text of their names.

    Args:
        root: New folder.
        cases: Their numbers, of the published table.
        frames: Frames of a case.
        renamed: Write the frames as ``renamed/case{N}/image_{k:03d}.jpg``.
    """
    (root / "annotation_txt").mkdir(parents=True)
    for case in cases:
        folder = root / (f"renamed/case{case}" if renamed else f"case{case}")
        folder.mkdir(parents=True)
        lines = []
        for frame in range(frames):
            pixels = np.full((HEIGHT, WIDTH, 3), (20 * frame + case) % 256, np.uint8)
            file = f"image_{frame:03d}.jpg" if renamed else name(case, frame)
            Image.fromarray(pixels).save(folder / file, quality=95)
            lines.append(f"{name(case, frame)} {5 + frame},{6},{25 + frame},{30},0")
        path = root / "annotation_txt" / f"case{case}.txt"
        path.write_text("\n".join(sorted(lines)) + "\n", encoding="utf-8")
    return root
