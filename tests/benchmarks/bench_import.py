"""How long `import flashmoe_ref` takes, and that it pulls in nothing heavy."""

import statistics
import subprocess
import sys

CODE = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"


def seconds(statement: str) -> float:
    """Median of several fresh interpreters."""
    command = [sys.executable, "-c", CODE.format(statement)]
    runs = [
        float(subprocess.run(command, capture_output=True, check=True).stdout)
        for _ in range(7)
    ]
    return statistics.median(runs)


def main() -> None:
    """Print the import times."""
    for statement in ("import flashmoe_ref", "from flashmoe_ref import load"):
        print(f"{statement:32} {seconds(statement) * 1e3:6.0f} ms   (bar: 300 ms)")
