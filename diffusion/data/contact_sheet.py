"""Many small images on one sheet."""

from collections.abc import Sequence

from PIL import Image

GAP = 4
"""Pixels between images."""

LEAST = 128
"""Pixels of the shorter side of an image on a sheet, which smaller ones are enlarged to."""


def enlarged(image: Image.Image, least: int = LEAST) -> Image.Image:
    """Return an image enlarged by a whole factor, without smoothing.

    Args:
        image: Of any size.
        least: Pixels that the shorter side has at least.
    """
    factor = max(1, -(-least // min(image.size)))
    size = (image.width * factor, image.height * factor)
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST)


def contact_sheet(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Return images of one size in rows, on white.

    Args:
        images: At least one.
        columns: Images in a row; as many as make the sheet about square if None.

    Raises:
        ValueError: There is no image.
    """
    if not images:
        raise ValueError("images are empty, expected at least one")
    large = [enlarged(image) for image in images]
    columns = columns or round(len(large) ** 0.5 + 0.49)
    columns = min(columns, len(large))
    rows = -(-len(large) // columns)
    width, height = large[0].size
    size = (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP)
    sheet = Image.new("RGB", size, "white")
    for number, image in enumerate(large):
        row, column = divmod(number, columns)
        sheet.paste(image, (column * (width + GAP), row * (height + GAP)))
    return sheet
