"""Run the benchmarks and print their ratios: python -m tests.benchmarks [names]."""

import argparse

from . import (
    bench_engines,
    bench_gpu,
    bench_import,
    bench_kernels,
    bench_limit,
    bench_probe,
    bench_reads,
)

BENCHMARKS = {
    "engines": bench_engines.main,
    "reads": bench_reads.main,
    "probe": bench_probe.main,
    "limit": bench_limit.main,
    "import": bench_import.main,
    "kernels": bench_kernels.main,
    "gpu": bench_gpu.main,
}


def main() -> None:
    """Run the named benchmarks, or all."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__
    )
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(BENCHMARKS))
    names = parser.parse_args().names or list(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are: {', '.join(BENCHMARKS)}")
    for name in names:
        print(f"== {name}")
        BENCHMARKS[name]()
        print()


main()
