"""Putting feature-selection gates into an image model, and taking them out again exactly.

The models are recognized by their structure, which is that of timm; nothing of it is imported.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn

from core_gates.features.selection import FeatureSelectionGate, scale_inputs

__all__ = ["GateHost", "fold_gates", "gate_hosts", "inject_gates", "prune_gates"]

# Blocks that normalize a branch after computing it: the gate then follows the normalization.
_POST_NORM_BLOCKS = frozenset(
    {"ResPostBlock", "ResPostRelPosBlock", "EvaBlockPostNorm"}
    | {"SwinTransformerV2Block", "SwinTransformerV2CrBlock"}
)
_RESNET_STAGE = re.compile(r"(.*\.|)layer(\d+)")
_PRE_ACTIVATION_STAGE = "ResNetStage"  # of timm's ResNetV2, which normalizes what it returns


class GateHost(NamedTuple):
    """A module whose output can be gated: its features and their dimension."""

    module: nn.Module
    dim: int
    feature_dim: int


def inject_gates(
    model: nn.Module,
    *,
    where: Sequence[str] = ("*",),
    gate: Callable[..., FeatureSelectionGate] = FeatureSelectionGate,
) -> dict[str, FeatureSelectionGate]:
    """Gate the residual branches or stages of an image model, in place (arXiv 2407.04400).

    In transformer blocks (ViT, DeiT, Swin) a gate scales what attention and MLP add to the stream,
    also where several of them add in parallel; in ConvNeXt blocks what the MLP adds; in a ResNet it
    scales the output of every stage. The gate sits at the last linear map of a branch, or at the
    normalization that follows it, which equals a gate after LayerScale and dropout and before
    stochastic depth. Weights keep their names, so that checkpoints of the plain model still load
    with ``strict=False``. Hybrids of these families, such as ViTamin, are refused.

    Args:
        model: A ViT, Swin, ConvNeXt or ResNet as timm (or, ResNet, torchvision) builds it.
        where: Patterns of module names as `gate_hosts` lists them, e.g. ``blocks.*.mlp.*``.
        gate: Called with the number of features and the keywords ``feature_dim``, ``device`` and
            ``dtype``; ``functools.partial`` sets other options.

    Returns:
        Name of each gated module -> its gate, whose parameters are the group of the gate optimizer.

    Raises:
        ValueError: The model has none of these blocks, no name matches, or it is gated already.
    """
    hosts = gate_hosts(model)
    chosen = {n: h for n, h in hosts.items() if any(fnmatchcase(n, p) for p in where)}
    if not chosen:
        raise ValueError(
            f"no module of {type(model).__name__} matches {list(where)}; it offers"
            f" {', '.join(hosts) or 'nothing: expected a ViT, Swin, ConvNeXt or ResNet'}"
        )
    for name, host in chosen.items():
        if hasattr(host.module, "gate"):
            raise ValueError(f"{name} has a gate already; fold it first by fold_gates")
    gates = {}
    for name, host in chosen.items():
        weight = next(host.module.parameters())
        gates[name] = gate(
            host.dim, feature_dim=host.feature_dim, device=weight.device, dtype=weight.dtype
        )
        gates[name].train(host.module.training)
        host.module.add_module("gate", gates[name])  # the last step of a stage, which is a sequence
        if not isinstance(host.module, nn.Sequential):
            host.module.register_forward_hook(_apply_gate)
    return gates


def gate_hosts(model: nn.Module) -> dict[str, GateHost]:
    """Return the modules of a model that `inject_gates` can gate, by name."""
    return dict(_hosts(model))


def fold_gates(model: nn.Module, *, where: Sequence[str] = ("*",)) -> nn.Module:
    """Multiply injected gates into the weights and remove them, in place.

    A gate of a branch folds into the module that it follows; the gate of a ResNet stage into the
    convolutions of the next stage, or into the classifier; not those of a ResNetV2, whose stages
    are followed by a normalization. Scores are those of evaluation. The result computes what
    ``model.eval()`` did, up to rounding, with the modules of the plain model.

    Args:
        model: A model with gates of `inject_gates`.
        where: Patterns of the names of the gated modules to fold.

    Returns:
        The same model.

    Raises:
        ValueError: A stage is followed by nothing that can absorb its gate; nothing is changed.
    """
    gated = {
        name: module
        for name, module in model.named_modules()
        if _is_gated(module) and any(fnmatchcase(name, pattern) for pattern in where)
    }
    consumers = {
        name: _consumers(model, name, module)
        for name, module in gated.items()
        if isinstance(module, nn.Sequential)
    }
    for name, module in gated.items():
        gate = module.gate
        assert isinstance(gate, FeatureSelectionGate)
        if name in consumers:
            for consumer in consumers[name]:
                scale_inputs(consumer, gate.scores())
        else:
            gate.fold_into(module, "output")
            for key, hook in list(module._forward_hooks.items()):
                if hook is _apply_gate:
                    del module._forward_hooks[key]
        del module.gate
    return model


def prune_gates(model: nn.Module, *, threshold: float = 0.0) -> dict[str, int]:
    """Close for good every feature whose score is at most ``threshold``, in place.

    With the threshold 0 only exact zeros are closed and the output stays the same. Folding then
    leaves exact zeros in the weights. Every module that offers ``prune_(threshold) -> int`` takes
    part.

    Args:
        model: Any module that holds gates.
        threshold: Largest score that is closed.

    Returns:
        Name of each gate -> number of features that remain.
    """
    return {
        name: int(module.prune_(threshold))
        for name, module in model.named_modules()
        if callable(getattr(module, "prune_", None))
    }


def _apply_gate(module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    # A function of the module, not a closure: copies and pickles of a model apply their own gate.
    gate = module.gate
    assert isinstance(gate, FeatureSelectionGate)
    return gate(output)  # type: ignore[no-any-return]


def _is_gated(module: nn.Module) -> bool:
    if not isinstance(getattr(module, "gate", None), FeatureSelectionGate):
        return False
    return isinstance(module, nn.Sequential) or _apply_gate in module._forward_hooks.values()


def _hosts(model: nn.Module) -> Iterator[tuple[str, GateHost]]:
    modules = dict(model.named_modules())
    for name, module in modules.items():
        prefix = f"{name}." if name else ""

        def has(*children: str, prefix: str = prefix) -> bool:
            return all(prefix + child in modules for child in children)

        if isinstance(module, nn.Sequential) and _RESNET_STAGE.fullmatch(name):
            yield from _stage_hosts(name, module)
        elif type(module).__name__ == _PRE_ACTIVATION_STAGE and has("blocks"):
            yield from _stage_hosts(f"{prefix}blocks", modules[f"{prefix}blocks"])
        elif has("attn.proj", "mlp.fc2", "norm1", "norm2"):
            post_norm = type(module).__name__ in _POST_NORM_BLOCKS
            for child in ("norm1", "norm2") if post_norm else ("attn.proj", "mlp.fc2"):
                yield prefix + child, _host(modules[prefix + child])
        elif isinstance(module, nn.Sequential) and has("norm", "attn.proj"):
            yield f"{prefix}attn.proj", _host(modules[f"{prefix}attn.proj"])
        elif has("conv_dw", "mlp.fc2") or (
            isinstance(module, nn.Sequential) and has("norm", "mlp.fc2")
        ):
            yield f"{prefix}mlp.fc2", _host(modules[f"{prefix}mlp.fc2"])
        elif has("in_norm", "in_proj"):
            for child in ("attn_out_proj", "mlp_out_proj", "out_proj"):
                if has(child):
                    yield prefix + child, _host(modules[prefix + child])


def _host(module: nn.Module) -> GateHost:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return GateHost(module, weight.shape[0], 1 if isinstance(module, nn.Conv2d) else -1)


def _stage_hosts(name: str, stage: nn.Module) -> Iterator[tuple[str, GateHost]]:
    """Yield a ResNet stage, if it ends with a convolution, whose channels are its output."""
    assert isinstance(stage, nn.Sequential)
    blocks = [block for block in stage if not isinstance(block, FeatureSelectionGate)]
    for child in ("conv3", "conv2"):
        conv = getattr(blocks[-1], child, None) if blocks else None
        conv = getattr(conv, "conv", conv)  # inside the ConvNormAct of selective kernels
        if isinstance(conv, nn.Conv2d):
            yield name, GateHost(stage, conv.out_channels, 1)
            return


def _consumers(model: nn.Module, name: str, stage: nn.Sequential) -> list[nn.Module]:
    """Return the modules that read the output of a ResNet stage."""
    assert isinstance(stage.gate, FeatureSelectionGate)
    match = _RESNET_STAGE.fullmatch(name)
    following = f"{match[1]}layer{int(match[2]) + 1}" if match else "the next stage"
    if following in dict(model.named_modules()):
        block = model.get_submodule(following)[0]  # type: ignore[index]
        shortcut = block.downsample
        convs = [m for m in shortcut.modules() if isinstance(m, nn.Conv2d)] if shortcut else []
        first = getattr(block.conv1, "conv", block.conv1)
        if convs and isinstance(first, nn.Conv2d):
            return [first, *convs[:1]]
    elif match:
        classifier = getattr(model.get_submodule(name.rpartition(".")[0]), "fc", None)
        if isinstance(classifier, nn.Linear) and classifier.in_features == stage.gate.dim:
            return [classifier]
    raise ValueError(
        f"the gate of {name} cannot be folded: expected convolutions on both paths of {following},"
        f" or a linear layer 'fc' of {stage.gate.dim} inputs after the last stage"
    )
