from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from core_gates import FeatureSelectionGate, inject_gates

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="session")
def vectors():
    """``vectors("endoscopy/NAME")``: the arrays of a file of golden vectors; text stays text."""

    def load(name):
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            text = {k: v.tolist() for k, v in arrays.items() if v.dtype.kind == "U"}
            return text | {k: torch.from_numpy(arrays[k]) for k in arrays if k not in text}

    return load


class Attention(nn.Module):
    def __init__(self, dim, num_heads, bias):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    def __init__(self, dim, hidden_dim, dropout):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return self.drop(self.fc2(F.gelu(self.fc1(x))))


class Block(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio=4.0, bias=True, eps=1e-6, dropout=0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, num_heads, bias)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dropout)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).mT


class Vit(nn.Module):
    """A pre-norm vision transformer with the module names of timm."""

    def __init__(self, image, patch, dim, depth, num_heads, num_classes, dropout=0.0):
        super().__init__()
        self.patch_embed = PatchEmbed(patch, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image // patch) ** 2 + 1, dim))
        self.blocks = nn.Sequential(*(Block(dim, num_heads, dropout=dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, 1e-6)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x):
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class BasicBlock(nn.Module):
    def __init__(self, in_dim, dim, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, dim, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)
        self.downsample = None
        if stride > 1 or in_dim != dim:
            conv = nn.Conv2d(in_dim, dim, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(dim))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet(nn.Module):
    """A ResNet of two basic blocks a stage with the module names of torchvision and timm."""

    def __init__(self, in_dim=3, dims=(64, 128, 256, 512), num_classes=0):
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, dims[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(dims[0])
        previous = dims[0]
        for k, dim in enumerate(dims, 1):
            blocks = BasicBlock(previous, dim, 1 + (k > 1)), BasicBlock(dim, dim, 1)
            self.add_module(f"layer{k}", nn.Sequential(*blocks))
            previous = dim
        self.fc = nn.Linear(previous, num_classes) if num_classes else nn.Identity()

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class MultiStream(nn.Module):
    """Gated trunks, one a stream, and a gated head (arXiv 2407.04400)."""

    def __init__(self, channels, hidden_dim):
        super().__init__()
        self.branches = nn.ModuleDict({name: ResNet(n) for name, n in channels.items()})
        width = 512 * len(channels)
        self.gate1, self.gate2 = FeatureSelectionGate(width), FeatureSelectionGate(hidden_dim)
        self.fc2, self.fc3 = nn.Linear(width, hidden_dim), nn.Linear(hidden_dim, 1)
        inject_gates(self.branches)

    def forward(self, streams):
        pooled = torch.cat([trunk(streams[name]) for name, trunk in self.branches.items()], 1)
        return self.fc3(self.gate2(F.relu(self.fc2(self.gate1(pooled)))))


@pytest.fixture(scope="session")
def models():
    """The networks of the golden vectors, without gates but for the last."""
    return {"block": Block, "vit": Vit, "resnet": ResNet, "multi_stream": MultiStream}


@pytest.fixture(scope="session")
def gate_names():
    """Renames the gates of published weights to where `inject_gates` puts them."""

    def rename(name):
        name = name.replace("fsag_rgb_ls1", "attn.proj.gate.logits")
        name = name.replace("fsag_rgb_ls2", "mlp.fc2.gate.logits")
        for stream in ("rgb", "mask", "depth"):
            for k in range(1, 5):
                name = name.replace(
                    f"fsag_{stream}_layer{k}", f"branches.{stream}.layer{k}.gate.logits"
                )
        return name.replace("fsag_L1", "gate1.logits").replace("fsag_L2", "gate2.logits")

    return rename
