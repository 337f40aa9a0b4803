"""Which importance weights have an interval of log Z that holds?

    python -m benchmarks.weights [--dirty | --smoke]

Draws of N(0, I) for targets with log Z = 0: products over elements of normal densities that are
shifted, narrower or wider, or of Student's, whose weights have no variance; and two modes, one of
which the draws miss. The share of 95 % intervals that hold the truth: of all, of those that
Pareto's k chooses, and of those whose effective sample size is so large, or half of the samples;
beside the share that is chosen. It takes five minutes of one core.
"""

import math

import torch
from torch.distributions import Normal, StudentT
from torch.nn.functional import softplus

import hosm_losses as hosm
from benchmarks import results
from benchmarks.experiment import environment, parser

COUNTS, DIMENSIONS, REPETITIONS = (100, 400, 1600), (8, 32), 2000
TARGETS = {
    "shifted": [Normal(mean, 1.0) for mean in (0.1, 0.2, 0.3, 0.4)],
    "narrower": [Normal(0.0, std) for std in (0.6, 0.75, 0.9)],
    "wider": [Normal(0.0, std) for std in (1.1, 1.2, 1.3)],
    "Student's": [StudentT(freedom) for freedom in (5.0, 10.0, 30.0)],
    "one of two modes": [Normal(0.1, 1.0)],  # and as much eight deviations along the first element
}


def main() -> None:
    options, found = parser(__doc__).parse_args(), {}
    where, repetitions = environment(options), 20 if options.smoke else REPETITIONS
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for target, d in ((target, d) for target in TARGETS for d in DIMENSIONS):
        name, rows = f"{target}, d = {d}", []
        for density in TARGETS[target]:
            for count in COUNTS * repetitions:
                x, zero = torch.randn(count, d, dtype=torch.float64), torch.zeros(count)
                logs = (density.log_prob(x) - Normal(0.0, 1.0).log_prob(x)).sum(1)
                if target == "one of two modes":
                    logs = logs + softplus(8 * x[:, 0] - 32.8) - math.log(2)
                w = hosm.Weights(x, logs, zero, zero, torch.ones_like)
                error = abs(w.log_z) / w.log_z_error
                rows.append([error <= 1.96, w.pareto_k, w.effective_sample_size, count])
        covered, k, size, count = torch.tensor(rows, dtype=torch.float64).T
        chosen = {"all": size > 0, "k below 0.5": k < 0.5, "k below 0.7": k < 0.7}
        chosen |= {f"size {n}": (size >= n) | (size >= count / 2) for n in (50, 100, 200)}
        shares = {rule: float(which.double().mean()) for rule, which in chosen.items()}
        means = {rule: float(covered[which].mean()) for rule, which in chosen.items()}
        found[name] = {r: {"covered": means[r], "share": shares[r]} for r in chosen if shares[r]}
        results.show(name, found[name])
    if not options.smoke:
        results.write(results.DIRECTORY / "weights.json", {"environment": where, "found": found})


if __name__ == "__main__":
    main()
