"""Our search beside Mt-KaHyPar (connectivity objective, expert load as vertex weight, the same load cap).

    python3 -m venv /tmp/bench && /tmp/bench/bin/pip install mtkahypar==1.7.post1
    /tmp/bench/bin/python benches/against_mtkahypar.py

For each layer Mt-KaHyPar partitions the distinct expert sets with ten seeds and its default preset on two threads; its time
is the partitioning call alone. Ours runs on one thread; its time is the whole method, merging the sets included. "to its
mean" is the time of the least number of our restarts whose result is at most Mt-KaHyPar's mean over seeds, beside the time
of one of its runs; "to its best" likewise for the best of ten, beside all ten runs.
"""
import tempfile
from collections import Counter
from pathlib import Path
from statistics import geometric_mean, mean
from time import perf_counter

import mtkahypar
from common import build, gpt_oss_sets, import_traces, occult, olmoe_sets

CAP = 1.25
SEEDS = range(10)
THREADS = 2


def run_peer(engine, sets, num_experts, ranks):
    load = [0] * num_experts
    for members, weight in sets.items():
        for e in members:
            load[e] += weight
    edges, weights = [list(s) for s in sets], list(sets.values())
    copies, seconds = [], []
    for seed in SEEDS:
        mtkahypar.set_seed(seed)
        context = engine.context_from_preset(mtkahypar.PresetType.DEFAULT)
        context.set_partitioning_parameters(ranks, CAP - 1, mtkahypar.Objective.KM1)
        context.logging = False
        graph = engine.create_hypergraph(context, num_experts, len(edges), edges, load, weights)
        start = perf_counter()
        partition = graph.partition(context)
        seconds.append(perf_counter() - start)
        part = [partition.block_id(e) for e in range(num_experts)]
        rank_load = [0] * ranks
        for e, r in enumerate(part):
            rank_load[r] += load[e]
        if max(rank_load) <= CAP * sum(load) / ranks + 1e-6:
            total = sum(w * len({part[e] for e in s}) for s, w in sets.items())
            copies.append(total / sum(weights))
    return copies, seconds


def ours(profile, ranks, restarts=None):
    args = ["place", profile, "--ranks", ranks, "--load-cap", CAP, "--threads", 1, "--json"]
    layers = occult(*args, *(["--restarts", restarts] if restarts else []))["layers"]
    return {l["layer"]: (l["search"]["copies_per_token"], l["seconds"]) for l in layers}


def main():
    build()
    engine = mtkahypar.initialize(THREADS)
    cases = [("olmoe", 64, l, olmoe_sets) for l in (0, 7, 15)] + [("gpt-oss", 32, l, gpt_oss_sets) for l in (0, 6, 12, 18, 23)]
    speed_mean, speed_best, quality = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        profiles = import_traces(Path(folder))
        print("profile layer ranks |  peer best    mean  s/run |  ours     s   vs best | to its mean s  x faster | to its best s  x faster")
        for ranks in (4, 8):
            counts = (1, 2, 4, 8, 24, 64)
            sweeps = {name: {r: ours(p, ranks, r) for r in counts} for name, p in profiles.items()}
            default = {name: ours(p, ranks) for name, p in profiles.items()}
            for name, num_experts, layer, read in cases:
                rows, occurrences = read(layer)
                sets = Counter()
                for ids, n in zip(rows, occurrences):
                    sets[tuple(sorted(ids))] += n
                copies, seconds = run_peer(engine, sets, num_experts, ranks)
                best, average, run_seconds = min(copies), mean(copies), mean(seconds)
                found, took = default[name][layer]
                reach = lambda target: next((sweeps[name][r][layer][1] for r in counts if sweeps[name][r][layer][0] <= target + 1e-9), None)
                to_mean, to_best = reach(average), reach(best)
                faster = lambda peer, own: f"{own:12.3f} {peer / own:9.1f}" if own else f"{'-':>12} {'-':>9}"
                print(f"{name:8} {layer:4} {ranks:4}  | {best:9.4f} {average:8.4f} {run_seconds:5.2f} | {found:.4f} {took:5.2f} {100 * (found / best - 1):+7.2f} % |"
                      f" {faster(run_seconds, to_mean)} | {faster(sum(seconds), to_best)}", flush=True)
                quality.append(found / best)
                speed_mean += [run_seconds / to_mean] if to_mean else []
                speed_best += [sum(seconds) / to_best] if to_best else []
    print(f"\nours against its best of ten: worst {100 * (max(quality) - 1):+.2f} %, geometric mean {100 * (geometric_mean(quality) - 1):+.2f} %")
    print(f"times faster at equal quality: mean quality of one run {geometric_mean(speed_mean):.1f}x (least {min(speed_mean):.1f}x, {len(speed_mean)} of {len(quality)} reached); "
          f"best of ten {geometric_mean(speed_best):.1f}x (least {min(speed_best):.1f}x, {len(speed_best)} of {len(quality)} reached)")


if __name__ == "__main__":
    main()
