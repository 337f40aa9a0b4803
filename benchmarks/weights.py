"""Which importance weights have an interval of log Z that holds?

    python -m benchmarks.weights [--dirty | --smoke]

Draws of N(0, I) for targets with log Z = 0: products over elements of normal densities that are
shifted, narrower or wider, or of Student's, whose weights have no variance; and two modes, one of
which the draws miss. For each problem, over all of its runs: the share of 95 % intervals that hold
log Z, and of those within 1.96 standard errors, beside the mean effective size as a share of the
samples, by which problems are grouped; and how wide the intervals are, as a multiple of those. It
takes three minutes of one core.
"""

import math
from itertools import product

import torch
from torch.distributions import Normal, StudentT
from torch.nn.functional import softplus

import hosm_losses as hosm
from benchmarks import results
from benchmarks.experiment import Row, begin, keep, parser

FILE = results.DIRECTORY / "weights.json"
COUNTS, DIMENSIONS, REPETITIONS = (100, 256, 1600), (8, 32), 2000
TARGETS = {f"shifted by {mean}": Normal(mean, 1.0) for mean in (0.1, 0.2, 0.3, 0.4)}
TARGETS |= {f"narrower, {std}": Normal(0.0, std) for std in (0.6, 0.75, 0.9)}
TARGETS |= {f"wider, {std}": Normal(0.0, std) for std in (1.05, 1.1, 1.2, 1.3)}
TARGETS |= {f"Student's, {freedom}": StudentT(freedom) for freedom in (5.0, 10.0, 30.0)}
# And as much eight deviations along the first element.
TARGETS["one of two modes"] = Normal(0.1, 1.0)
GROUPS = {"at least 50 %": 0.5, "25 to 50 %": 0.25, "less than 25 %": 0.0}


def main() -> None:
    options, where = begin(parser(__doc__))
    found: Row = {group: {} for group in GROUPS}
    repetitions = 20 if options.smoke else REPETITIONS
    torch.manual_seed(0)
    for (target, density), d, count in product(TARGETS.items(), DIMENSIONS, COUNTS):
        rows = []
        for _ in range(repetitions):
            x, zero = torch.randn(count, d, dtype=torch.float64), torch.zeros(count)
            logs = (density.log_prob(x) - Normal(0.0, 1.0).log_prob(x)).sum(1)
            if target == "one of two modes":
                logs = logs + softplus(8 * x[:, 0] - 32.8) - math.log(2)
            w = hosm.Weights(x, logs, zero, zero, torch.ones_like)
            (lower, upper), two_sided = w.log_z_interval, 1.96 * w.log_z_error
            width = (upper - lower) / (2 * two_sided)
            holds = lower <= 0 <= upper
            rows.append([w.effective_sample_size / count, holds, abs(w.log_z) <= two_sided, width])
        numbers = torch.tensor(rows, dtype=torch.float64).T
        size, covered, normal = numbers[:3].mean(1).tolist()
        row = {"size": size, "covered": covered, "1.96 errors": normal}
        row["width"] = float(numbers[3].nanmedian())
        group = next(group for group, least in GROUPS.items() if size >= least)
        found[group][f"{target}, d = {d}, {count} samples"] = row
    for group, problems in found.items():
        results.show(f"mean effective size {group}", problems)
    keep(options, FILE, {"environment": where, "found": found})


if __name__ == "__main__":
    main()
