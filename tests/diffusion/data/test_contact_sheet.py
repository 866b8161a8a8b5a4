"""Contact sheets: whole factors, in rows."""

import numpy as np
import pytest
from PIL import Image

from diffusion.data.pictures import GAP, contact_sheet, enlarged


def test_small_images_are_enlarged_by_a_whole_factor():
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20
    large = enlarged(Image.fromarray(pixels), 5)
    assert large.size == (6, 6)
    assert np.array_equal(np.asarray(large)[::3, ::3], pixels)
    assert enlarged(Image.new("RGB", (200, 300))).size == (200, 300)


def test_images_lie_in_rows():
    images = [Image.new("RGB", (128, 128), (10 * n, 0, 0)) for n in range(1, 6)]
    sheet = np.asarray(contact_sheet(images))
    assert sheet.shape == (2 * 128 + GAP, 3 * 128 + 2 * GAP, 3)
    step = 128 + GAP
    assert [int(sheet[row * step, column * step, 0]) for row in (0, 1) for column in (0, 1, 2)] == [
        10, 20, 30, 40, 50, 255,
    ]  # fmt: skip
    assert contact_sheet(images, columns=5).size == (5 * 128 + 4 * GAP, 128)
    with pytest.raises(ValueError, match="empty"):
        contact_sheet([])
