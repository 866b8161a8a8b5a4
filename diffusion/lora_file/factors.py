"""How a file stores the change of one layer: factors, and formulas that give a pair of them.

Kernels of convolutions are flattened into the inputs of a matrix.

LoRA (Hu et al., 2022), LoHa (Hyeon-Woo et al., 2022), LoKr (Yeh et al., 2024), DoRA (Liu et al.,
2024).
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from core_gates.adapters.low_rank import LowRank
from diffusion.lora_file.container import LoraFileError

Stored = Mapping[str, Tensor]  # tensors of a layer by role, such as `down`

Shapes = Mapping[str, Sequence[int]]  # shapes of the tensors of a layer by role


class Pair(NamedTuple):
    """Factors A (r, in_features) and B (out_features, r) of a change BA, without its scale."""

    down: Tensor
    up: Tensor


class Sizes(NamedTuple):
    """Sizes of a pair of factors."""

    rank: int
    in_features: int
    out_features: int


class Kind(NamedTuple):
    """A way to store the change of a layer.

    Attributes:
        name: Such as ``lora``.
        forms: Sets of roles, each of which is complete.
        build: Returns the pair from tensors by role.
        sizes: Returns the sizes of that pair from shapes alone; raises ValueError if they do not
            fit each other.
        rank: Returns what α is divided by, from shapes; None where the kind uses no α.
    """

    name: str
    forms: Sequence[frozenset[str]]
    build: Callable[[Stored], Pair]
    sizes: Callable[[Shapes], Sizes]
    rank: Callable[[Shapes], int | None]

    @property
    def roles(self) -> frozenset[str]:
        """Every role that occurs in a form."""
        return frozenset().union(*self.forms)


def matrix(tensor: Tensor) -> Tensor:
    """Return a matrix, also of a convolution."""
    return tensor.flatten(1) if tensor.dim() == 4 else tensor


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape of a matrix, also of a convolution.

    Raises:
        ValueError: It is neither.
    """
    if len(shape) not in (2, 4):
        what = "x".join(map(str, shape)) or "a number"
        raise ValueError(f"a factor is {what}, expected a matrix or a convolution")
    return shape[0], math.prod(shape[1:])


def product_sizes(up: Sequence[int], down: Sequence[int], core: Sequence[int] | None) -> Sizes:
    """Return the sizes of the product up · core · down of matrices.

    Raises:
        ValueError: They do not fit each other.
    """
    (outputs, left), (right, inputs) = matrix_shape(up), matrix_shape(down)
    inner = (left, right) if core is None else matrix_shape(core)
    if inner != (left, right) or (core is None and left != right):
        middle = "" if core is None else f", {inner[0]}x{inner[1]}"
        raise ValueError(
            f"factors of {outputs}x{left}{middle} and {right}x{inputs} do not fit each other"
        )
    return Sizes(left, inputs, outputs)


def _plain_build(stored: Stored) -> Pair:
    down = matrix(stored["down"])
    if "mid" in stored:  # of LoCon, (r, r) or (r, r, kernel)
        core = stored["mid"].flatten(2) if stored["mid"].dim() == 4 else stored["mid"][..., None]
        down = torch.einsum("abk,bi->aik", core, down).flatten(1)
    return Pair(down, matrix(stored["up"]))


def _plain_sizes(shapes: Shapes) -> Sizes:
    """Return the sizes of the pair.

    Raises:
        ValueError: The factors do not fit each other.
    """
    core = shapes.get("mid")
    sizes = product_sizes(shapes["up"], shapes["down"], core and core[:2])
    return sizes._replace(in_features=sizes.in_features * math.prod(core[2:] if core else ()))


PLAIN = Kind(
    "lora",
    (frozenset({"down", "up"}), frozenset({"down", "up", "mid"})),
    _plain_build,
    _plain_sizes,
    lambda shapes: shapes["down"][0],
)


def _half(stored: Stored, name: str, core: str) -> Pair:
    """Return one of two factored matrices, with the core of a Tucker decomposition if it has one.

    With a core, the first factor is (r, out_features).
    """
    a, b = matrix(stored[f"{name}_a"]), matrix(stored[f"{name}_b"])
    return Pair(matrix(stored[core]) @ b, a.T) if core in stored else Pair(b, a)


def _half_sizes(shapes: Shapes, name: str, core: str) -> Sizes:
    """Return the sizes of such a matrix.

    Raises:
        ValueError: The factors do not fit each other.
    """
    a, b = matrix_shape(shapes[f"{name}_a"]), shapes[f"{name}_b"]
    if core not in shapes:
        return product_sizes(a, b, None)
    return product_sizes(a[::-1], b, shapes[core])._replace(rank=a[0])


_FACTORED = frozenset({"w1_a", "w1_b", "w2_a", "w2_b"})


def _loha_build(stored: Stored) -> Pair:
    left, right = _half(stored, "w1", "t1"), _half(stored, "w2", "t2")
    return Pair(khatri_rao(left.down.T, right.down.T).T, khatri_rao(left.up, right.up))


def khatri_rao(left: Tensor, right: Tensor) -> Tensor:
    """Return the products of all pairs of columns, (n, r) and (n, s) to (n, rs)."""
    return (left[:, :, None] * right[:, None, :]).flatten(1)


def _loha_sizes(shapes: Shapes) -> Sizes:
    """Return the sizes of the pair.

    Raises:
        ValueError: The factors do not fit each other.
    """
    left, right = _half_sizes(shapes, "w1", "t1"), _half_sizes(shapes, "w2", "t2")
    if left[1:] != right[1:]:
        raise ValueError(
            f"an element-wise product needs matrices of one shape, found {left.out_features}x"
            f"{left.in_features} and {right.out_features}x{right.in_features}"
        )
    return left._replace(rank=left.rank * right.rank)


LOHA = Kind(
    "loha",
    (_FACTORED, _FACTORED | {"t1", "t2"}),
    _loha_build,
    _loha_sizes,
    lambda shapes: shapes["w1_b"][0],
)


_FIRST = ({"k1"}, {"k1_a", "k1_b"})
_SECOND = ({"k2"}, {"k2_a", "k2_b"}, {"k2_t", "k2_a", "k2_b"})


def _lokr_build(stored: Stored) -> Pair:
    first, second = _lokr_half(stored, "k1"), _lokr_half(stored, "k2")
    return Pair(kronecker(first.down, second.down), kronecker(first.up, second.up))


def _lokr_half(stored: Stored, name: str) -> Pair:
    if name in stored:
        return whole(matrix(stored[name]))
    return _half(stored, name, f"{name}_t")


def kronecker(left: Tensor, right: Tensor) -> Tensor:
    """Return the Kronecker product of two matrices; ``torch.kron`` takes no transposed ones."""
    rows, columns = left.shape[0] * right.shape[0], left.shape[1] * right.shape[1]
    return (left[:, None, :, None] * right[None, :, None, :]).reshape(rows, columns)


def whole(weight: Tensor) -> Pair:
    """Return a matrix as the factors weight · I or I · weight, whichever rank is smaller."""
    outputs, inputs = weight.shape
    identity = torch.eye(min(outputs, inputs), dtype=weight.dtype)
    return Pair(identity, weight) if inputs <= outputs else Pair(weight, identity)


def _lokr_sizes(shapes: Shapes) -> Sizes:
    """Return the sizes of the pair.

    Raises:
        ValueError: The factors do not fit each other.
    """
    first, second = _lokr_half_sizes(shapes, "k1"), _lokr_half_sizes(shapes, "k2")
    return Sizes(*(a * b for a, b in zip(first, second, strict=True)))


def _lokr_half_sizes(shapes: Shapes, name: str) -> Sizes:
    if name in shapes:
        outputs, inputs = matrix_shape(shapes[name])
        return Sizes(min(outputs, inputs), inputs, outputs)
    return _half_sizes(shapes, name, f"{name}_t")


def _rank(shapes: Shapes) -> int | None:
    """Return the rank of the factored matrix, the second one if both are; None if none is."""
    for name in ("k2_b", "k1_b"):
        if name in shapes:
            return shapes[name][0]
    return None


LOKR = Kind(
    "lokr", [frozenset(a | b) for a in _FIRST for b in _SECOND], _lokr_build, _lokr_sizes, _rank
)


def magnitude_matrix(stored: Tensor) -> Tensor:
    """Return the magnitudes as (out_features, 1), of rows, or (1, in_features), of columns.

    PEFT stores a vector with one entry per row; LyCORIS a matrix of either kind.
    """
    return stored.reshape(magnitude_shape(stored.shape))


def magnitude_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape of magnitudes as a matrix.

    Raises:
        ValueError: It is neither one row nor one column.
    """
    if len(shape) == 4 and tuple(shape[2:]) == (1, 1):
        shape = shape[:2]
    if len(shape) == 1:
        return shape[0], 1
    if len(shape) != 2 or 1 not in shape:
        size = "x".join(map(str, shape)) or "a number"
        raise ValueError(f"the magnitude of DoRA is {size}, expected one row or one column")
    return shape[0], shape[1]


def merged_weight(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """Return the weight of a layer with a DoRA adapter, m · (W + ΔW) / ‖W + ΔW‖.

    Args:
        weight: W (out_features, in_features).
        delta: ΔW, of the same shape.
        magnitude: m, (out_features, 1) for norms of rows or (1, in_features) for those of columns.
    """
    changed = weight + delta
    norm = torch.linalg.vector_norm(changed, dim=1 if magnitude.shape[1] == 1 else 0, keepdim=True)
    return magnitude * changed / norm.clamp_min(torch.finfo(norm.dtype).tiny)


COLUMNS = "norms of columns of a fused layer belong to all of its parts and cannot be split"


class Factors(NamedTuple):
    """What an adapter does to one linear layer, whatever the file stored.

    Attributes:
        down: A (r, in_features).
        up: B (out_features, r).
        scale: α/r, or α/√r for rank-stabilized adapters.
        magnitude: Of DoRA, (out_features, 1) or (1, in_features); None for all others.
        kernel: Height and width of a convolution, whose in_features are channels × height × width;
            None for a Linear layer.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    magnitude: Tensor | None = None
    kernel: tuple[int, ...] | None = None

    @property
    def rank(self) -> int:
        """Number of components r."""
        return self.down.shape[0]

    @property
    def in_features(self) -> int:
        """Inputs of the layer."""
        return self.down.shape[1]

    @property
    def out_features(self) -> int:
        """Outputs of the layer."""
        return self.up.shape[0]

    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        """Return the change (out_features, in_features) that the adapter adds to the weight.

        Args:
            weight: That of the base, which DoRA needs.

        Raises:
            LoraFileError: It is a DoRA adapter and no weight is given.
        """
        delta = self.scale * _product(self.up, self.down)
        if self.magnitude is None:
            return delta
        if weight is None:
            raise LoraFileError(
                "what DoRA adds depends on the weight of the base: name a base, or read "
                "the direction from low_rank()"
            )
        return merged_weight(weight, delta, self.magnitude) - weight

    def low_rank(self) -> LowRank:
        """Return the pair of factors, for DoRA that of the direction."""
        return LowRank(self.down, self.up, self.scale)

    def norm(self) -> float:
        """Return ‖scale · BA‖ (Frobenius) from the Gram matrices of the factors, in float64."""
        if _is_identity(self.down) or _is_identity(self.up):
            product = _product(self.up, self.down).double()
            return abs(self.scale) * float(torch.linalg.vector_norm(product))
        down, up = self.down.double(), self.up.double()
        square = torch.sum((up.T @ up) * (down @ down.T)).clamp_min(0)
        return abs(self.scale) * float(square.sqrt())

    def rows(self, start: int, stop: int) -> "Factors":
        """Return the factors of some outputs.

        Raises:
            LoraFileError: A DoRA adapter holds norms of columns, which all rows share.
        """
        magnitude = self.magnitude
        if magnitude is not None:
            if magnitude.shape[1] != 1:
                raise LoraFileError(COLUMNS)
            magnitude = magnitude[start:stop]
        return Factors(self.down, self.up[start:stop], self.scale, magnitude)

    def swapped(self) -> "Factors":
        """Return the factors with the halves of the outputs exchanged."""

        def exchange(tensor: Tensor) -> Tensor:
            return torch.cat(tensor.chunk(2)[::-1])

        magnitude = self.magnitude
        if magnitude is not None and magnitude.shape[1] == 1:
            magnitude = exchange(magnitude)
        return Factors(self.down, exchange(self.up), self.scale, magnitude)


def _product(up: Tensor, down: Tensor) -> Tensor:
    """Return BA; whole matrices of LoKr have the identity as other factor, which costs nothing."""
    if _is_identity(down):
        return up
    return down if _is_identity(up) else up @ down


def _is_identity(matrix: Tensor) -> bool:
    rows, columns = matrix.shape
    if rows != columns or matrix[0, 0] != 1 or matrix[-1, 0] != (rows == 1):
        return False
    return torch.equal(matrix, torch.eye(rows, dtype=matrix.dtype))


SPELLINGS = {
    "lora_A": "down",
    "lora_B": "up",
    "lora_down": "down",
    "lora_up": "up",
    "lora_mid": "mid",
    "lora.down": "down",
    "lora.up": "up",
    "lora_linear_layer.down": "down",
    "lora_linear_layer.up": "up",
    "hada_w1_a": "w1_a",
    "hada_w1_b": "w1_b",
    "hada_w2_a": "w2_a",
    "hada_w2_b": "w2_b",
    "hada_t1": "t1",
    "hada_t2": "t2",
    "lokr_w1": "k1",
    "lokr_w1_a": "k1_a",
    "lokr_w1_b": "k1_b",
    "lokr_w2": "k2",
    "lokr_w2_a": "k2_a",
    "lokr_w2_b": "k2_b",
    "lokr_t2": "k2_t",
    "dora_scale": "magnitude",
    "lora_magnitude_vector": "magnitude",
    "alpha": "alpha",
}  # each spelling of a factor and its role; PEFT puts the name of the adapter after it

UNSUPPORTED = {
    r"\.diff(?:\.weight)?": "a full weight difference",
    r"\.diff_b(?:\.weight)?": "a difference of a bias",
    r"\.set_weight": "a replaced weight",
    r"\.lora_[AB](?:\.[\w-]+)?\.bias|\.lora_(?:up|down)\.bias": "a bias of a factor",
    r"\.(?:oft_blocks|oft_diag|oft_[rR]|boft_[rRs])(?:\.[\w-]+)*": "an orthogonal rotation (OFT)",
    r"\.[ab][12]\.weight": "a factor of GLoRA",
    r"\.(?:on_input|ia3_l)(?:\.[\w-]+)*": "a factor of IA3",
    r"\.(?:w_norm|b_norm)": "a difference of a norm",
}  # what is known and has no low-rank form

_ADAPTER = r"(?:\.(?!weight$|bias$)(?P<adapter>[\w-]+))?(?:\.weight)?"
_FACTOR = re.compile(
    r"(?P<stem>.+)\.(?P<spelling>"
    + "|".join(re.escape(s) for s in sorted(SPELLINGS, key=len, reverse=True))
    + ")"
    + _ADAPTER
)
_PROCESSOR = re.compile(r"(?P<stem>.+_lora[12]?)\.(?P<spelling>down|up)\.weight")
_UNSUPPORTED = {re.compile(f".+(?:{pattern})"): what for pattern, what in UNSUPPORTED.items()}


class Spelled(NamedTuple):
    """A name taken apart.

    Attributes:
        stem: Prefix and name of the layer.
        role: Of the factor, such as ``down``.
        spelling: As in the file, such as ``lora_A.weight``, with ``*`` for the name of an adapter.
        adapter: Name that PEFT gave to the adapter, or empty.
    """

    stem: str
    role: str
    spelling: str
    adapter: str = ""


def spell(name: str) -> Spelled | None:
    """Split the factor off a name; None if it ends with none that is known."""
    if match := _PROCESSOR.fullmatch(name):
        return Spelled(match["stem"], match["spelling"], f"_lora.{match['spelling']}.weight")
    if match := _FACTOR.fullmatch(name):
        stem, spelling, adapter = match["stem"], match["spelling"], match["adapter"] or ""
        rest = name[len(stem) + 1 + len(spelling) :]
        rest = rest.replace(f".{adapter}", ".*", 1) if adapter else rest
        return Spelled(stem, SPELLINGS[spelling], spelling + rest, adapter)
    return None


def unsupported(name: str) -> str | None:
    """Name the kind of a tensor that has no low-rank form; None if it is unknown."""
    return next((what for p, what in _UNSUPPORTED.items() if p.fullmatch(name)), None)


KINDS = (PLAIN, LOHA, LOKR)
