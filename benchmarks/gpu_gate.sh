#!/usr/bin/env bash
# One command on a machine with a GPU: build, tests, sanitizers, benchmarks, one JSON file (gpu_gate.py --help).
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_gate.py" "$@"
