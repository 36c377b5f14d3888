"""EntropySGD in a training loop of one's own: live weights in training, the anchor in evaluation."""

import torch
from torch import nn

import deeprelax_cuda as dr


def main() -> float:
    """Fit a noisy sine; return the mean squared error of the anchor."""
    torch.manual_seed(0)
    x = torch.linspace(-3, 3, 512)[:, None]
    y = torch.sin(2 * x) + 0.1 * torch.randn_like(x)
    model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = dr.EntropySGD(model.parameters(), lr=0.1, inner_lr=0.02, inner_steps=20, seed=0)
    print(optimizer.explain())

    for step in range(3000):
        batch = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[batch]), y[batch]).backward()
        optimizer.step()
        if (step + 1) % 1000 == 0:
            optimizer.eval()  # the parameters become the anchor, the answer
            with torch.no_grad():
                error = nn.functional.mse_loss(model(x), y).item()
            optimizer.train()  # and the live weights again, bit for bit
            print(f"step {step + 1}: mean squared error {error:.4f}")
    return error


if __name__ == "__main__":
    main()
