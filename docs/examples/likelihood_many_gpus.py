"""Bits per dimension of a test set, on any number of processes, with accelerate.

accelerate launch docs/examples/likelihood_many_gpus.py      (any number of GPUs, or --cpu)

The network is not trained, so accelerate does not prepare it: every process has the whole network.
"""

import argparse
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hosm_losses import Hutchinson, NLLResult, ScoreModel, VPSchedule, ode_nll


def gather(accelerator: Accelerator, result: NLLResult) -> NLLResult:
    """Gather the result of a batch from all processes, without the padding of the last batch."""
    tensors = {name: value for name, value in vars(result).items() if torch.is_tensor(value)}
    return replace(result, **{n: accelerator.gather_for_metrics(v) for n, v in tensors.items()})


def main() -> None:
    """Evaluate, and print the summary once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--exact", action="store_true", help="divergence, without probes")
    args = parser.parse_args()
    accelerator = Accelerator(cpu=args.cpu)

    torch.manual_seed(0)  # the same network and images in every process
    network = nn.Sequential(nn.Linear(16, 16), nn.Tanh()).to(accelerator.device).eval()
    levels = torch.randint(0, 256, (37, 16))
    images = -1 + 2 * (levels + torch.rand(levels.shape)) / 256
    model = ScoreModel(network, VPSchedule(), call=lambda network, x, _t: network(x))
    loader = accelerator.prepare(DataLoader(TensorDataset(images), batch_size=8))

    # Every process has its own generator, so that the probes differ between processes.
    generator = torch.Generator(accelerator.device).manual_seed(accelerator.process_index)
    divergence = "exact" if args.exact else Hutchinson(2)
    results = []
    for (x,) in loader:
        result = ode_nll(model, x, divergence=divergence, generator=generator)
        results.append(gather(accelerator, result))
    accelerator.print(NLLResult.cat(results).summary(levels=256))
    accelerator.end_training()


if __name__ == "__main__":
    main()
