"""`make bench`: all benchmarks, at sizes that take a few minutes on two cores."""

import subprocess
import sys

BENCHMARKS = [
    ["benchmarks.decoding", "--model", "alitok-b", "--batch-size", "4", "16"],
    ["benchmarks.decoding", "--model", "rar-b", "--batch-size", "4", "16"],
    ["benchmarks.evaluation"],
]

for module, *arguments in BENCHMARKS:
    print(f"\n## python -m {module} {' '.join(arguments)}\n", flush=True)
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)
