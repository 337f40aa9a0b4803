"""What torch.compile of the loss module costs and saves, in-place operators included.

python -m benchmarks.compiled [NETWORK ...] [--dirty | --smoke]

Seconds of the first step, with an empty cache, and times over an eager step of order one, eager
and compiled in turns in one process. Into results/compiled.json. It takes ten minutes a network.
"""

from tempfile import TemporaryDirectory

from benchmarks import results
from benchmarks.experiment import alone, begin, keep, parser
from benchmarks.speed import measure
from benchmarks.steps import BASE, COMPILED, MAIN, NETWORKS, VARIANTS

FILE = results.DIRECTORY / "compiled.json"


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("networks", nargs="*", default=["dit", "ncsnpp"])
    options, where = begin(arguments)
    variants, rounds = {key: VARIANTS[key] for key in MAIN} | COMPILED, 10
    if options.smoke:
        variants, rounds = {BASE: VARIANTS[BASE]}, 1
    for name in options.networks[: 1 if options.smoke else None]:
        with TemporaryDirectory() as cache:
            fresh = {**results.ONE_THREAD, "TORCHINDUCTOR_CACHE_DIR": cache}
            batch = NETWORKS[name][1][0]
            found = alone(measure, name, variants, rounds, batch, (), variables=fresh)
        results.show(name, found["variants"])
        keep(options, FILE, {name: found | {"environment": where}})


if __name__ == "__main__":
    main()
