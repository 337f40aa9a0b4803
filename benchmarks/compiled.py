"""What torch.compile of the loss module costs and saves, in-place operators included.

python -m benchmarks.compiled [NETWORK ...] [--smoke]

Seconds of the first step, with an empty cache, and times over an eager step of order one, eager
and compiled in turns in one process. Into results/compiled.json. It takes ten minutes a network.
"""

import tempfile

from benchmarks import results
from benchmarks.environment import ONE_THREAD, environment
from benchmarks.experiment import alone, parser, show
from benchmarks.speed import measure
from benchmarks.steps import BASE, COMPILED, MAIN, NETWORKS, VARIANTS

FILE = results.DIRECTORY / "compiled.json"


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("networks", nargs="*", default=["dit", "ncsnpp"])
    options = arguments.parse_args()
    variants, rounds = {key: VARIANTS[key] for key in MAIN} | COMPILED, 10
    if options.smoke:
        variants, rounds = {BASE: VARIANTS[BASE]}, 1
    for name in options.networks[: 1 if options.smoke else None]:
        with tempfile.TemporaryDirectory() as cache:
            fresh = {**ONE_THREAD, "TORCHINDUCTOR_CACHE_DIR": cache}
            batch = NETWORKS[name][1][0]
            found = alone(measure, name, variants, rounds, batch, (), environment=fresh)
        rows = found["variants"]
        show(
            name,
            ("variant", "seconds to compile", "time over order one"),
            ((key, row.get("compile_seconds"), row["time_ratio"][0]) for key, row in rows.items()),
        )
        if not options.smoke:
            results.keep(FILE, {name: {**found, "environment": environment()}})


if __name__ == "__main__":
    main()
