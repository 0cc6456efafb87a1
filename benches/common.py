"""What the benchmark scripts share: running the binary, reading traces."""
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
OCCULT = TARGET / "release" / "occult"
# The routing of released models; set TRACES where it lies elsewhere.
TRACES = Path(os.environ.get("TRACES", ROOT.parent / "shared" / "traces"))


def build():
    subprocess.run(["cargo", "build", "--release", "-q", "-p", "occult-cli"], cwd=ROOT, check=True)


def occult(*args, **kwargs):
    """Runs the binary; its JSON when --json was asked for."""
    done = subprocess.run([OCCULT, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)
    if done.returncode != 0:
        sys.exit(done.stderr)
    return json.loads(done.stdout) if "--json" in args else done.stdout


def import_traces(folder):
    """Profiles of both traces, made in `folder`."""
    profiles = {"olmoe": folder / "olmoe.safetensors", "gpt-oss": folder / "gpt-oss.safetensors"}
    occult("import", TRACES / "olmoe" / "exact_top8_sets.csv", "-o", profiles["olmoe"])
    occult("import", TRACES / "gptoss20b", "-o", profiles["gpt-oss"])
    return profiles


def olmoe_sets(layer):
    """Rows of expert ids and their occurrences, all domains."""
    with open(TRACES / "olmoe" / "exact_top8_sets.csv", newline="") as file:
        rows = [r for r in csv.DictReader(file) if int(r["layer"]) == layer]
    return [[int(r[f"e{i}"]) for i in range(8)] for r in rows], [int(r["occurrences"]) for r in rows]


def gpt_oss_sets(layer):
    data = (TRACES / "gptoss20b" / "routes_u8.bin").read_bytes()
    rows = [list(data[t + 4 * layer:t + 4 * layer + 4]) for t in range(0, len(data), 96)]
    return rows, [1] * len(rows)
