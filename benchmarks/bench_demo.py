"""The demos' held-out measures, recorded with machine and commit for the README.

python benchmarks/bench_demo.py --out benchmarks/results/demo_digits.json
python benchmarks/bench_demo.py --task diffusion --out benchmarks/results/demo_diffusion.json \
    --picture docs/demo_diffusion.png
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import parser, save

# Of each task: what it calls its picture and its report.
FILES = {
    "digits": ("demo.png", "demo.json"),
    "diffusion": ("demo_diffusion.png", "report.json"),
    "latent": ("demo_latent.png", "report.json"),
}


def main() -> None:
    options = parser(__doc__.splitlines()[0], devices=("cpu",))
    options.add_argument("--task", choices=FILES, default="digits")
    options.add_argument("--picture", type=Path, help="keep the picture")
    arguments = options.parse_args()
    picture, report = FILES[arguments.task]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "refine_ext", "demo", "--task", arguments.task, "--out", folder]
        started = time.perf_counter()
        subprocess.run([*command, "--quick"] if arguments.quick else command, check=True)
        wall = time.perf_counter() - started
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = json.loads((Path(folder) / report).read_text())
        if arguments.picture:
            shutil.copyfile(Path(folder) / picture, arguments.picture)
    rows, improved = result.pop("seeds"), result.pop("seeds_improved")
    seconds = {"wall": wall, "cpu": used.ru_utime + used.ru_stime}
    save(arguments.out, f"demo_{arguments.task}", rows, improved=improved, seconds=seconds, **result)


if __name__ == "__main__":
    main()
