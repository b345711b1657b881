"""The demo's held-out measures, recorded with machine and commit for the README.

python benchmarks/bench_demo.py --out benchmarks/results/demo_digits.json
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import parser, save


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], devices=("cpu",)).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "refine_ext", "demo", "--out", folder]
        subprocess.run([*command, "--quick"] if arguments.quick else command, check=True)
        result = json.loads((Path(folder) / "demo.json").read_text())
    save(arguments.out, "demo_digits", result["seeds"], summary=result["summary"], improved=result["seeds_improved"])


if __name__ == "__main__":
    main()
