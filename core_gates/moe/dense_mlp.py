"""The dense feed-forward network, and reading one whatever its layers are called."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.activations import activate
from core_gates.errors import check_at_least
from core_gates.routing.repeated import probing

_NAMES = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    (None, "fc1", "fc2"),
    (None, "w1", "w2"),
)
_ACTIVATION_OF = {nn.ReLU: "relu", nn.SiLU: "silu", nn.GELU: "gelu"}
_TOKENS = 16
_SCALES = (1.0, 30.0)  # of tokens: what is clamped shows in large ones alone


class GatedMlp(nn.Module):
    """``down(act(gate(x)) * up(x))`` (Shazeer, 2020), the network whose copies are experts.

    Args:
        dim: Features of a token.
        hidden_dim: Hidden features.
        activation: Element-wise module; SiLU if not given.
        bias: Whether the layers have biases.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``x`` (..., D) to the same.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        activation: nn.Module | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias, device, dtype)
        self.up_proj = nn.Linear(dim, hidden_dim, bias, device, dtype)
        self.down_proj = nn.Linear(hidden_dim, dim, bias, device, dtype)
        self.activation = nn.SiLU() if activation is None else activation

    def forward(self, x: Tensor) -> Tensor:
        """Apply the network to every token."""
        return cast(Tensor, self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x)))


class DenseMlp(NamedTuple):
    """Weights (F, D) of ``gate`` and ``up``, (D, F) of ``down``, their biases, the activation."""

    up: Tensor
    down: Tensor
    activation: str
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    gate_bias: Tensor | None = None

    @property
    def form(self) -> str:
        """What all experts of a stack have in common."""
        gate = "" if self.gate is None else "gated "
        bias = "without" if self.up_bias is None else "with"
        return f"{gate}{self.activation} of {tuple(self.up.shape)} {bias} biases"

    def stacked(self) -> dict[str, Tensor]:
        """Return the parameters of one of the stacked experts by name."""
        first, bias, name = self.up, self.up_bias, "up_proj"
        if self.gate is not None:
            first, name = torch.cat([self.gate, self.up]), "gate_up_proj"
            if self.gate_bias is not None and self.up_bias is not None:
                bias = torch.cat([self.gate_bias, self.up_bias])
        tensors = {name: first, "down_proj": self.down}
        if bias is not None and self.down_bias is not None:
            tensors |= {f"{name}_bias": bias, "down_proj_bias": self.down_bias}
        return tensors


def read_mlps(networks: Sequence[nn.Module], activation: str | None = None) -> list[DenseMlp]:
    """Take dense networks of one form apart.

    Args:
        networks: At least one; see `StackedExperts.from_dense` for the names of the layers.
        activation: Name of their activation, needed where no submodule shows it.

    Raises:
        ValueError: The layers are not found or do not fit, some have biases and others none, the
            activation is not found, there is another submodule, or the networks are unlike.
    """
    check_at_least(1, num_experts=len(networks))
    parts = [_read(network, activation) for network in networks]
    first, *others = (part.form for part in parts)
    for form in others:
        if form != first:
            raise ValueError(f"the networks of one stack must be alike, found {first} and {form}")
    return parts


def check_copy(mlp: nn.Module, part: DenseMlp, expert: Callable[[Tensor], Tensor]) -> None:
    """Compare an expert with the network that it copies, on random tokens in evaluation mode.

    Its outputs are compared, and, on small and large tokens, the hidden features and outputs of
    its formula, half precision in float32 where the network can be copied. The network is as
    before afterwards. On the device ``meta`` nothing is compared.

    Args:
        mlp: The network.
        part: What was read from it.
        expert: The expert, from tokens (N, D) to (N, D).

    Raises:
        ValueError: The network does not map tokens to tokens, or to others than the expert, or its
            last weights are zero and its hidden features are not seen.
    """
    if part.down.is_meta:
        return
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(_TOKENS, len(part.down), generator=generator, device="cpu").to(part.up)
    with probing(mlp, part.down.device):
        _refuse_unlike(mlp, part, expert(x.to(part.down)), _called(mlp, x)[0])
    if part.up.dtype.itemsize < 4:
        with suppress(RuntimeError):  # some weights of parametrized layers cannot be copied
            mlp = deepcopy(mlp).float()
            part = _read(mlp, part.activation)
    with probing(mlp, part.down.device):
        for scale in _SCALES:
            tokens = scale * x.to(part.up)
            outputs, hidden = _called(mlp, tokens)
            first = [part.up] if part.gate is None else [part.gate, part.up]
            bias = [part.up_bias] if part.gate is None else [part.gate_bias, part.up_bias]
            z = torch.cat([F.linear(tokens, w, b) for w, b in zip(first, bias, strict=True)], -1)
            wanted = activate(z, part.activation, part.gate is not None)
            if hidden is not None:
                _refuse_unlike(mlp, part, wanted, hidden, "hidden features")
            elif not part.down.any():
                raise ValueError(
                    f"the last weights of {type(mlp).__name__} are zero, so that nothing can be"
                    " compared: copy it after a step of training"
                )
            _refuse_unlike(mlp, part, F.linear(wanted, part.down, part.down_bias), outputs)


def _called(mlp: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the outputs of a network and the inputs of its last layer, if that is called."""
    name, seen = type(mlp).__name__, []
    handle = _layers(mlp)[2].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        y = mlp(x)
    except Exception as failure:
        reason = " ".join(f"{type(failure).__name__}: {failure}".split())
        raise ValueError(f"{name} cannot be called with tokens (N, D): {reason}") from failure
    finally:
        handle.remove()
    if not isinstance(y, Tensor) or y.shape != x.shape:
        what = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"{name} returns {what} for tokens, expected a tensor {tuple(x.shape)}")
    return y, seen[0] if seen else None


def _refuse_unlike(
    mlp: nn.Module, part: DenseMlp, outputs: Tensor, expected: Tensor, what: str = "outputs"
) -> None:
    finite = expected.isfinite()
    largest = expected.where(finite, 0).abs().max().item()
    error = (outputs.to(expected) - expected).where(finite, 0).abs().max().item()
    eps = max(torch.finfo(outputs.dtype).eps, torch.finfo(expected.dtype).eps)
    if not error <= eps ** (2 / 3) * largest:
        act = part.activation
        form = f"down({act}(up(x)))" if part.gate is None else f"down({act}(gate(x)) * up(x))"
        raise ValueError(
            f"experts that copy {type(mlp).__name__} differ from it by {error:.2g} where its"
            f" {what} reach {largest:.2g}: expected {form}; pass another activation=, or apply the"
            " rest before or after the experts"
        )


def _read(mlp: nn.Module, activation: str | None) -> DenseMlp:
    gate, up, down = _layers(mlp)
    layers = [layer for layer in (gate, up, down) if layer is not None]
    if len({layer.bias is None for layer in layers}) > 1:
        raise ValueError("either all layers of the network must have a bias, or none")
    weights = [layer.weight for layer in layers]
    shapes = [tuple(weight.shape) for weight in weights]
    if {*shapes[:-1]} != {shapes[-1][::-1]} or not all(w.is_floating_point() for w in weights):
        described = ", ".join(f"{tuple(weight.shape)} {weight.dtype}" for weight in weights)
        raise ValueError(
            f"the weights of {type(mlp).__name__} are {described}, expected (F, D) and at last"
            " (D, F) of a floating dtype"
        )
    return DenseMlp(
        up.weight,
        down.weight,
        _activation(mlp, activation),
        None if gate is None else gate.weight,
        up.bias,
        down.bias,
        None if gate is None else gate.bias,
    )


def _layers(mlp: nn.Module) -> tuple[nn.Linear | None, nn.Linear, nn.Linear]:
    linear = {name: child for name, child in mlp.named_children() if isinstance(child, nn.Linear)}
    for gate, up, down in _NAMES:
        wanted = {up, down} if gate is None else {gate, up, down}
        if wanted == set(linear):
            return None if gate is None else linear[gate], linear[up], linear[down]
    if isinstance(mlp, nn.Sequential) and len(linear) == 2:
        first, second = linear.values()
        return None, first, second
    layouts = ", ".join(" ".join(n for n in names if n) for names in _NAMES)
    raise ValueError(
        f"the linear layers of {type(mlp).__name__} are named {', '.join(linear) or 'nothing'};"
        f" expected {layouts}, or a Sequential of two"
    )


def _others(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
    """Yield what a network has next to its linear layers, by name."""
    yield from (
        (f"{path}{name}", parameter) for name, parameter in module.named_parameters(recurse=False)
    )
    for name, child in module.named_children():
        if isinstance(child, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            yield from _others(child, f"{path}{name}.")
        elif path or not isinstance(child, nn.Linear):
            yield f"{path}{name}", child


def _activation(mlp: nn.Module, given: str | None) -> str:
    """Return the activation.

    Raises:
        ValueError: It is not evident, or the network has more than that.
    """
    modules = dict(_others(mlp))
    others = {n: m for n, m in modules.items() if not isinstance(m, nn.Dropout | nn.Identity)}
    shown = [name for name, module in others.items() if type(module) in _ACTIVATION_OF]
    unseen = [n for n, m in others.items() if isinstance(m, nn.Module) and not [*m.parameters()]]
    place = next(iter(shown or unseen), None)
    for name, module in others.items():
        if name != place:
            raise ValueError(
                f"{type(mlp).__name__} has {name!r} ({type(module).__name__}), which experts cannot"
                " copy: expected linear layers, one activation, Dropout and Identity; leave it out,"
                " or apply it before or after the experts"
            )
    if given is not None:
        return given
    if shown:
        module = others[shown[0]]
        tanh = isinstance(module, nn.GELU) and module.approximate == "tanh"
        return "gelu_tanh" if tanh else _ACTIVATION_OF[type(module)]
    if not unseen and any(isinstance(module, nn.Identity) for module in modules.values()):
        return "identity"
    raise ValueError(
        f"the activation of {type(mlp).__name__} is not evident from its submodules; pass"
        " activation="
    )
