"""Parle, a replica on each rank: torchrun --standalone --nproc-per-node 3 --max-restarts 3 THIS FOLDER

Started again after a failure, it goes on from the last epoch that all ranks have saved in FOLDER.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import deeprelax_cuda as dr

SEED, EPOCHS = 0, 20


def main(folder: Path) -> None:
    """Learn which points lie under a sine; print the error of the consensus on other points."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(SEED)  # all replicas have the same data, and begin with the same weights
    points = 2 * torch.randn(4096, 2)
    (x, others), (y, theirs) = points.split(2048), (torch.sin(2 * points[:, 0]) > points[:, 1]).long().split(2048)
    hidden = [nn.Linear(2, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()]
    model = nn.Sequential(*hidden, nn.Linear(64, 2))
    optimizer = dr.Parle(model.parameters(), group=dist.group.WORLD, seed=SEED)
    parts = {"model": model, "optimizer": optimizer}

    files = [folder / f"rank{rank}-{i}.pt" for i in range(2)]  # by turns, as the others may be an epoch behind
    saved = {state["epochs"]: state for state in (torch.load(file) for file in files if file.exists())}
    done = torch.tensor(max(saved, default=0))
    dist.all_reduce(done, dist.ReduceOp.MIN)
    for name, part in parts.items() if done else ():
        part.load_state_dict(saved[int(done)][name])

    for epoch in range(int(done), EPOCHS):
        own = torch.Generator().manual_seed(dr.derive_seed(dr.derive_seed(SEED, rank), epoch))
        for batch in torch.randperm(len(x), generator=own).split(64):  # each replica in an order of its own
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()  # every 25th waits for the others
        temporary = folder / f"rank{rank}.tmp"
        torch.save({"epochs": epoch + 1, **{name: part.state_dict() for name, part in parts.items()}}, temporary)
        temporary.replace(files[epoch % 2])

    optimizer.eval()  # the parameters become the consensus, with the same bits on every rank
    with dr.recalibrate_batch_norm(model, x.split(256)), torch.no_grad():
        model.eval()
        wrong = int((model(others).argmax(dim=1) != theirs).sum())
    if rank == 0:
        print(f"{dist.get_world_size()} replicas, {EPOCHS - int(done)} epochs: {wrong} of {len(others)} points are wrong")
    dist.destroy_process_group()


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    main(Path(sys.argv[1]))
