"""Reading the rows of a frame table at the size that a network takes."""

from __future__ import annotations

from core_gates.errors import GatesError
from endoscopy.data.frames.transforms import Frame, resize_frame
from endoscopy.data.images import read_depth, read_mask, read_rgb
from endoscopy.data.tables.frame_table import FrameTable


class FrameReader:
    """Decode and resize one row at a time.

    Args:
        table: Rows.
        size: Side length in pixels of the result.
        masks: Read masks where the table names them.
        depths: Read depths where the table names them.
    """

    def __init__(
        self, table: FrameTable, size: int, *, masks: bool = False, depths: bool = False
    ) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.table, self.size, self.masks, self.depths = table, size, masks, depths
        columns = ["bbox_xmin", "bbox_ymin", "bbox_xmax", "bbox_ymax"]
        sides = table.frames[["width", "height"]].to_numpy(float)
        boxes = table.frames[columns].to_numpy(float, copy=True)
        boxes[:, 0::2] *= size / sides[:, :1]
        boxes[:, 1::2] *= size / sides[:, 1:]
        self.boxes = boxes

    def box(self, row: int) -> tuple[float, float, float, float]:
        """Return xmin, ymin, xmax, ymax in pixels of the result."""
        xmin, ymin, xmax, ymax = self.boxes[row].tolist()
        return xmin, ymin, xmax, ymax

    def read(self, row: int) -> Frame:
        """Return a frame of (size, size) pixels.

        Raises:
            GatesError: A file is damaged, or a mask or depth has another size than its frame.
        """
        path = self.table.path(row)
        if path is None:
            raise GatesError(f"row {row} of the frame table has no frame_path; prepare it again")
        image = read_rgb(path)
        mask_path = self.table.path(row, "mask_path") if self.masks else None
        depth_path = self.table.path(row, "depth_path") if self.depths else None
        mask = None if mask_path is None else read_mask(mask_path)
        depth = None if depth_path is None else read_depth(depth_path)
        for other, source in ((mask, mask_path), (depth, depth_path)):
            if other is not None and other.shape != image.shape[:2]:
                raise GatesError(
                    f"{source} has {other.shape[1]} x {other.shape[0]} pixels, its frame "
                    f"{image.shape[1]} x {image.shape[0]}; make them equal"
                )
        frame = resize_frame(Frame(image, (0.0, 0.0, 0.0, 0.0), mask, depth), self.size)
        return frame._replace(box=self.box(row))
