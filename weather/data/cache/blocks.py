"""Which times are read together: contiguous blocks, so that neighbors in time stay together."""


def contiguous_block(count: int, parts: int, part: int) -> range:
    """Return the positions of one of ``parts`` blocks of nearly equal length.

    Args:
        count: Positions to be dealt.
        parts: Number of blocks.
        part: Number of the block, from 0.

    Raises:
        ValueError: There is no such block.
    """
    if not 0 <= part < parts:
        raise ValueError(f"part {part} of {parts} does not exist")
    return range(part * count // parts, (part + 1) * count // parts)
