# %% [markdown]
# # Four experts share a plane
# A switch gate learns which of four small networks answers where. The control is one network
# with as many weights, all of which every point uses.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn

from core_gates import MoELayer, StackedExperts, SwitchGate, balance_loss, collect_routing

torch.manual_seed(0)
points = torch.rand(2048, 2) * 2 - 1
x, y = points.unbind(1)
target = torch.where(x > 0, (6 * y).sin(), (6 * x).cos()) * torch.where(y > 0, 1.0, -1.0)

mixture = MoELayer(SwitchGate(32, 4), StackedExperts(4, 32, hidden_dim=32), return_routing=False)
wide = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))

# %%
for name, middle in {"one network": wide, "four experts": mixture}.items():
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), middle, nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(400):
        with collect_routing(model) as routings:
            loss = (model(points)[:, 0] - target).square().mean()
        balance = sum(balance_loss(one) for found in routings.values() for one in found)
        optimizer.zero_grad()
        (loss + 0.01 * balance).backward()
        optimizer.step()
    print(f"{name}: mean squared error {loss:.4f}")

# %%
(routing,) = routings["2.gate"]
plt.scatter(x, y, c=routing.indices[:, 0], cmap="tab10", s=4)
plt.title("Which expert answers where")
plt.savefig("core_mixture.png")
