"""Copies per token on held-out halves of real routing, load cap 1.25: three splits (and seeds), and their mean.

    python3 benches/heldout.py
"""
import tempfile
from pathlib import Path
from statistics import mean

from common import build, import_traces, occult

SEEDS = (0, 1, 2)


def row(name, profile, ranks, method):
    args = ["place", profile, "--ranks", ranks, "--method", method, "--holdout", 0.5, "--json"]
    if method == "search":
        args += ["--load-cap", 1.25]
    runs = [occult(*args, "--seed", seed) for seed in SEEDS]
    layers = range(len(runs[0]["layers"]))
    figures = lambda key: [mean(r["layers"][l][key] for r in runs) for l in layers]
    copies, load = figures("copies_per_token"), figures("load_max_over_mean")
    each = " / ".join(f"{c:.3f}" for c in copies) if len(copies) <= 3 else ""
    by_seed = " ".join(f"{r['mean']['copies_per_token']:.3f}" for r in runs)
    print(f"{name:8} {ranks:5} {method:10} {mean(copies):8.3f} {mean(load):8.3f}   {each:24} seeds: {by_seed}", flush=True)


def main():
    build()
    with tempfile.TemporaryDirectory() as folder:
        profiles = import_traces(Path(folder))
        print(f"{'profile':8} {'ranks':>5} {'method':10} {'C_T':>8} {'max/mean':>8}   {'per layer':24}")
        for name, ranks in [("olmoe", 4), ("gpt-oss", 4), ("gpt-oss", 8)]:
            for method in ("contiguous", "greedy", "eplb", "search"):
                row(name, profiles[name], ranks, method)


if __name__ == "__main__":
    main()
