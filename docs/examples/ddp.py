"""Plain DistributedDataParallel around the loss module instead of the network.

torchrun --nproc-per-node 2 docs/examples/ddp.py
"""

import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hosm_losses import AdaptiveTimes, AveragedTargets, FirstOrderDSM, ScoreModel, VPSchedule


class Network(nn.Module):
    """A network that predicts the noise in points of the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return ε̂(x, t)."""
        return self.layers(torch.cat([x, t[:, None]], 1))


def main() -> None:
    """Train on a ring, and check that all processes have the same weights."""
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    torch.manual_seed(0)
    network = Network().to(device)
    # - model = DistributedDataParallel(network)
    times, scored = AdaptiveTimes(), ScoreModel(network, VPSchedule())  # +
    objective = FirstOrderDSM(scored, antithetic=True, time_sampler=times)  # +
    model = DistributedDataParallel(objective, device_ids=[rank] if cuda else None)  # +
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    torch.manual_seed(1 + rank)  # own data, times, noise and probes in every process
    for step in range(100):
        angle = 6.2832 * torch.rand(64, device=device)
        x = torch.stack([angle.cos(), angle.sin()], 1)
        batch = {"x0": x[:32], "targets": AveragedTargets(x, own=False)}  # +
        optimizer.zero_grad()
        model(**batch).backward()
        optimizer.step()
        if step % 50 == 49:
            times.learn(model, optimizer=optimizer, **batch)  # + in every process
    weight = network.layers[0].weight.detach()
    weights = [torch.empty_like(weight) for _ in range(dist.get_world_size())]
    dist.all_gather(weights, weight)
    if rank == 0:
        same = all(torch.equal(weight, other) for other in weights)
        print(f"{len(weights)} processes, the same weights: {same}")
    del model  # DDP holds the group in a cycle, and all processes must leave together
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
