"""The command line of train.py."""

import argparse
from pathlib import Path

from networks import LOSSES, SIZES, TIMES, WEIGHTS

HELD_OUT = 50  # with --validate, one training image in 50 is held out


def read(argv: list[str] | None) -> argparse.Namespace:
    """Return the options, including values that follow from other options."""
    parser = argparse.ArgumentParser(
        description="Train an image model with a loss of any order.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    switch = argparse.BooleanOptionalAction
    add("--data", type=Path, help="folder of CIFAR-10's binary version")
    add("--make-stand-in", type=Path, help="write generated pictures there instead of training")
    add("--out", type=Path, default=Path("run"), help="folder of checkpoint.pt and log.jsonl")
    add("--init-from", type=Path, help="continue the averaged weights of this checkpoint")
    add("--sde", choices=("ve", "vp"), default="ve", help="noise schedule")
    add("--size", choices=SIZES, default="paper", help="network")
    add("--dropout", type=float, default=0.1, help="inside residual blocks")
    add("--score-sde-checkpoint", type=Path, help="continue one of score_sde_pytorch's")
    add("--score-sde-code", type=Path, help="checkout of its code, whose network is trained")
    add("--score-sde-config", help="of its network, such as vp/cifar10_ddpmpp_deep_continuous")
    add("--loss", choices=LOSSES, default="first", help="order, and estimator")
    add("--weights", nargs="+", default=None, help="one for each term")
    add("--probes", type=int, default=None, help="random probes a sample; the loss's own if None")
    add("--fraction", type=float, default=1.0, help="part of a batch with higher terms")
    add("--parts", type=int, default=1, help="of a batch, one after the other, to save memory")
    add("--times", choices=TIMES, default="log_sigma_hat", help="what is uniform")
    add("--steps", type=int, default=500_000, help="of the whole run")
    add("--batch", type=int, default=128, help="images a step, of all processes together")
    add("--lr", type=float, default=2e-4, help="of Adam")
    add("--warmup", type=int, default=5000, help="steps in which the rate rises to --lr")
    add("--cosine", action=switch, help="let the rate fall to 0; None: if weights are continued")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--ema", type=float, help="decay of the averaged weights; None: 0.9999, or over a tenth "
        "of --steps if weights are continued; the paper's code has 0.999")  # fmt: skip
    add("--flip", action=switch, default=True, help="mirror half of all")
    add("--dequantize", action=switch, default=True, help="uniform noise on the levels; score_sde "
        "trained its networks without")  # fmt: skip
    add("--bf16", action="store_true", help="autocast to bfloat16, in channels-last layout")
    add("--seed", type=int, default=0, help="of everything random")
    add("--log-every", type=int, default=100, help="steps")
    add("--shares-every", type=int, default=1000, help="steps, for the gradients of single terms")
    add("--validate", type=int, default=0, help=f"steps; one training image in {HELD_OUT} is "
        "held out for it; 0 for none")  # fmt: skip
    add("--save-every", type=int, default=5000, help="steps")
    add("--keep-every", type=int, default=0, help="steps between checkpoints kept by number")
    args = parser.parse_args(argv)
    if args.make_stand_in is None and args.data is None:
        parser.error("expected --data FOLDER, or --make-stand-in FOLDER to make one")
    least = dict.fromkeys(("batch", "parts", "log_every", "shares_every", "save_every"), 1)
    least |= dict.fromkeys(("steps", "warmup", "validate", "keep_every"), 0)
    for name, smallest in least.items():
        if getattr(args, name) < smallest:
            shown = name.replace("_", "-")
            parser.error(f"--{shown}: expected {smallest} or more; got {getattr(args, name)}")
    _check_start(parser, args)
    args.weights = _weights(parser, args)
    continues = (args.init_from or args.score_sde_checkpoint) is not None
    if args.cosine is None:
        args.cosine = continues
    if args.ema is None:
        args.ema = max(0.0, 1 - 10 / max(1, args.steps)) if continues else 0.9999
    return args


def _check_start(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse options for the network and for the start that contradict each other."""
    if (args.score_sde_code is None) != (args.score_sde_config is None):
        parser.error("expected --score-sde-code and --score-sde-config together; got one of them")
    if args.score_sde_code is None and args.score_sde_checkpoint is not None:
        parser.error("--score-sde-checkpoint: expected --score-sde-code and --score-sde-config")
    if args.score_sde_checkpoint is not None:
        if args.init_from is not None:
            parser.error("--init-from: expected none with --score-sde-checkpoint as the start")
        if args.validate:
            parser.error("--validate: expected 0, as the network has seen all training images")
    if args.score_sde_code is not None:
        for name in ("sde", "size", "dropout"):
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name}: expected none with --score-sde-config, which has its own")
            setattr(args, name, None)


def _weights(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[float] | None:
    """Return the weight of each term, or None for order one, which has one term."""
    if args.loss == "first":
        for name, default in (("weights", None), ("probes", None), ("fraction", 1)):
            if getattr(args, name) != default:
                parser.error(f"--{name}: expected none with --loss first, which has one term")
        return None
    usual = WEIGHTS[args.loss]
    try:
        numbers = usual if args.weights is None else [float(word) for word in args.weights]
    except ValueError:
        parser.error(f"--weights: expected numbers; got {' '.join(args.weights)}")
    if len(numbers) != len(usual):
        parser.error(
            f"--weights: expected {len(usual)} with --loss {args.loss}; got {len(numbers)}"
        )
    return numbers
