"""Where the ODE's score goes wrong, at orders one and three, on the 1-D mixture of mixture_1d.py.

One network is trained with each order. `likelihood_gap` compares its score, and the score of its
ODE's own density, with the truth: the synthetic experiment of Lu et al. (ICML 2022, 2206.08265).

    python docs/examples/gap_1d.py [--schedule ve] [--steps 2000] [--nodes 24] [--out DIR]
"""

import argparse
from pathlib import Path

import mixture_1d as mixture
import torch
from torch import Tensor

import hosm_losses as hosm

CURVES = {"first": ("the network", "j_sm"), "fisher": ("its ODE's density", "j_fisher")}


def truth(schedule: hosm.Schedule) -> hosm.ScoreModel:
    """The mixture's own score at every noise level, in closed form."""

    def noise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (part[:, None] for part in schedule(t))
        variances = alpha**2 * mixture.VARIANCES + sigma**2
        offsets = x - alpha * mixture.MEANS
        logits = mixture.FRACTIONS.log() - 0.5 * (offsets**2 / variances + variances.log())
        return sigma * (logits.softmax(1) * offsets / variances).sum(1, keepdim=True)

    return hosm.ScoreModel(noise, schedule)


def draw(one: hosm.GapReport, three: hosm.GapReport, path: Path) -> None:
    """Draw the errors of both scores, at order one and at order three."""
    figure, panels = mixture.panels(1, 2, height=3.9, sharey=True)
    times = []
    for axes, (curve, (name, number)) in zip(panels, CURVES.items(), strict=True):
        for order, report, dashes in (("one", one, "--"), ("three", three, "-")):
            values = [each.value for each in report.curves[curve]]
            (line,) = axes.plot(report.log_sigma_hat, values, dashes)
            place = report.log_sigma_hat[len(values) // 2], values[len(values) // 2]
            # Both lines fall to the right, so these two places are free.
            side, up = ("left", 14) if report is one else ("right", -14)
            look = {"color": line.get_color(), "textcoords": "offset points", "va": "center"}
            axes.annotate(f"order {order}", place, (0, up), ha=side, **look)
        axes.margins(y=0.15)
        axes.set(yscale="log", xlabel="log σ̂", title=f"score of {name}")
        times.append(one.numbers[number].value / three.numbers[number].value)
    panels[0].set(ylabel="mean squared error of σ · score")
    own, density = times
    verdict = f"Order three cuts the error of the ODE's score {density:.0f}-fold"
    mixture.save(figure, f"{verdict}, that of the network's {own:.1f}-fold", path)


def main() -> None:
    """Train with both orders, print both reports and draw their curves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--schedule", choices=mixture.SCHEDULES, default="ve")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--nodes", type=int, default=24, help="noise levels of each curve")
    parser.add_argument("--out", type=Path, default=Path("gap_1d_out"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    schedule = mixture.SCHEDULES[options.schedule]
    x0 = mixture.draw_data(torch.Generator().manual_seed(1))[:128].double()
    reports = []
    for order in (1, 3):
        job = mixture.Job(options.schedule, str(order), options.steps, seed=0)
        model = mixture.new_model(job)
        for _ in mixture.training(model, job, 1e-3):
            pass
        model.double()
        given = {"reference": truth(schedule), "generator": torch.Generator().manual_seed(2)}
        report = hosm.likelihood_gap(model, x0, nodes=options.nodes, progress=True, **given)
        print(f"\norder {order}\n{report}")
        reports.append(report)
    draw(*reports, options.out / f"gap_1d_{options.schedule}.svg")


if __name__ == "__main__":
    main()
