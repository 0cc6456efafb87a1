#!/usr/bin/env python3
"""What recording the routing costs: `occult profile` with and without it, in turns, medians of the seconds between loading
and the finished file. On a machine that others use, the share of the time that the command spends in recording (appending
rows, and finishing the file) is the steadier figure; both are printed.

    recording.py MODEL [--tokens 2048] [--repeats 5] [--threads N]

MODEL is a model directory (its weights may be random: the work is the same). Made-up token ids in windows of 1,024.
"""
import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

from common import build, occult

parser = argparse.ArgumentParser()
parser.add_argument("model", type=Path)
parser.add_argument("--tokens", type=int, default=2048)
parser.add_argument("--repeats", type=int, default=5)
parser.add_argument("--threads", type=int, default=os.cpu_count())
args = parser.parse_args()

build()
vocab = json.loads((args.model / "config.json").read_text())["vocab_size"]
with tempfile.TemporaryDirectory() as folder:
    ids = [(i * 2_654_435_761 + 12_345) % vocab for i in range(args.tokens)]
    file, profile = Path(folder) / "ids.json", Path(folder) / "profile.safetensors"
    file.write_text(json.dumps([ids]))
    seconds = {"with": [], "without": []}
    shares = []

    def run(kind):
        more = ["--no-record"] if kind == "without" else []
        out = occult("profile", args.model, "--ids", file, "-o", profile, "--context", 1024,
                     "--threads", args.threads, "--json", *more)
        if kind == "with":
            shares.append(out["recording_seconds"] / (out["seconds"] - out["recording_seconds"]))
        return out["seconds"]

    run("without")  # fills the page cache
    for i in range(args.repeats):
        # Neither side is always the first.
        for kind in ["with", "without"][::1 if i % 2 else -1]:
            seconds[kind].append(run(kind))
    size = profile.stat().st_size
middle = {kind: statistics.median(s) for kind, s in seconds.items()}
for kind, s in seconds.items():
    print(f"{kind:8} recording: median {middle[kind]:.3f} s of {', '.join(f'{x:.3f}' for x in s)}; "
          f"{args.tokens / middle[kind]:.0f} tokens/s")
print(f"with against without: {100 * (middle['with'] / middle['without'] - 1):+.2f} %")
print(f"time in recording over all other time: median {100 * statistics.median(shares):.2f} %, "
      f"largest {100 * max(shares):.2f} % ({size / args.tokens:.0f} bytes per token)")
