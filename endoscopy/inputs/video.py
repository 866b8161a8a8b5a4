"""Frames from videos, through PyAV."""

import io
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from av.video.frame import VideoFrame

from core_gates.errors import GatesError
from endoscopy.inputs.frame import InputReport, SourceFrame


def read_video(
    path: str | Path, report: InputReport, max_unreadable: float = 0.01
) -> Iterator[SourceFrame]:
    """Yield the frames of the first video stream of a file, keys ``{name}_{number:06d}``.

    Frames stored as RGB come out bit for bit; others are converted with the matrix that the file
    names (BT.601 if it names none).

    Args:
        path: Any container that FFmpeg reads.
        report: Filled while frames are read.
        max_unreadable: Fraction of packets that may be damaged; they are counted and skipped.

    Raises:
        GatesError: The file is empty, not a video, or damaged beyond ``max_unreadable``.
    """
    path = Path(path)
    if not path.exists():
        raise GatesError(f"{path}: does not exist; check the path")
    if path.stat().st_size == 0:
        raise GatesError(f"{path}: is empty (0 bytes), expected a video; copy it again")
    report.kind, report.source = "video", path.stem
    with path.open("rb") as file:
        for number, image in enumerate(decode_video(file, str(path), report, max_unreadable)):
            report.read += 1
            yield SourceFrame(image, f"{path.stem}_{number:06d}", number, number)
    report.finish(max_unreadable)


def decode_video(
    file: io.BufferedIOBase, name: str, report: InputReport, max_unreadable: float
) -> Iterator[np.ndarray]:
    """Yield the frames (H, W, 3) uint8, RGB, of an open video.

    Raises:
        GatesError: It is not a video; ``name`` is for the message.
    """
    try:
        container = av.open(file, "r")
    except FFmpegError as error:
        raise GatesError(
            f"{name}: cannot be opened as a video ({error.strerror}); it may be cut off, copy it "
            "again or remux it with ffmpeg"
        ) from error
    with container:
        if not container.streams.video:
            raise GatesError(f"{name}: holds no video stream; name a file with a video stream")
        stream = container.streams.video[0]
        report.expected = report.expected or stream.frames or None
        for packet in container.demux(stream):
            try:
                decoded = stream.decode(packet)
            except FFmpegError as error:
                report.skip(f"packet at {packet.pts}", error.strerror or "damaged", max_unreadable)
                continue
            for frame in decoded:
                assert isinstance(frame, VideoFrame)
                if frame.is_corrupt:
                    report.skip(f"frame at {frame.pts}", "damaged", max_unreadable)
                else:
                    yield frame.to_ndarray(format="rgb24")
