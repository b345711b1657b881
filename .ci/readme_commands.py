"""Prints the README's commands: the n-th fenced `sh` block, as a user would paste it. The README is the only copy."""

import pathlib
import re
import sys

readme = (pathlib.Path(__file__).resolve().parent.parent / "README.md").read_text()
blocks = re.findall(r"^```sh\n(.*?)^```", readme, re.M | re.S)
print(blocks[int(sys.argv[1])])
