"""Plain LoRA (Hu et al., 2022), with the core of a Tucker decomposition between its factors."""

from diffusion.lora_file.factors.kind import Kind, Pair, Stored, matrix, product_sizes


def _build(stored: Stored) -> Pair:
    down, up = matrix(stored["down"]), matrix(stored["up"])
    if "mid" in stored:
        up = up @ matrix(stored["mid"])
    return Pair(down, up)


PLAIN = Kind(
    "lora",
    (frozenset({"down", "up"}), frozenset({"down", "up", "mid"})),
    _build,
    lambda shapes: product_sizes(shapes["up"], shapes["down"], shapes.get("mid")),
    lambda shapes: shapes["down"][0],
)
