#!/usr/bin/env python3
"""The MoE layer of OLMoE (D 2048, F 1024, 64 experts, top-8): ours beside torch on the same threads, in turns.

    python3 benches/moe_layer.py --torch VENV/bin/python [--rounds 3] [--tokens 1024,4096]
    python3 benches/moe_layer.py --torch VENV/bin/python --memory

The Python given must have torch and transformers. Figures are medians over the rounds, in GFLOP/s and as shares of the
multiply-add peak that the benchmark measures in each round. "others" is the share of all cores that other processes
used meanwhile: figures with more than a few per cent there do not count.

--memory: instead, the peak memory of forward + backward at 4,096 tokens in f32, each in a process of its own. "before" is
what is resident before there are weights (torch: after its imports; what its libraries load later counts as the rest).
"""
import argparse
import os
import re
import statistics
import subprocess
import time

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--torch", required=True, help="Python with torch and transformers")
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--tokens", default="1024,4096")
parser.add_argument("--stored", default="f32,bf16", help="how weights are stored")
parser.add_argument("--bench", help="the built benchmark, instead of building it")
parser.add_argument("--memory", action="store_true", help="peak memory instead of times")
args = parser.parse_args()
tokens = args.tokens.split(",")
here = os.path.dirname(os.path.abspath(__file__))
TICK = os.sysconf("SC_CLK_TCK")


def built():
    out = subprocess.run(
        ["cargo", "bench", "-p", "occult-kernels", "--no-default-features", "--bench", "kernels", "--no-run"],
        cwd=here, stderr=subprocess.PIPE, text=True, check=True,
    ).stderr
    return re.search(r"\((.*?kernels-[0-9a-f]+)\)", out).group(1)


def busy():
    values = list(map(int, open("/proc/stat").readline().split()[1:9]))
    return (sum(values) - values[3] - values[4]) / TICK


def own(pid):
    fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


bench = args.bench or built()
torch = subprocess.Popen(
    [args.torch, os.path.join(here, "moe_layer_torch.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
)


def answer(line):
    torch.stdin.write(line + "\n")
    torch.stdin.flush()
    return [float(value) for value in torch.stdout.readline().split()]


def ask(line):
    return answer(line)[0]


if args.memory:
    out = subprocess.run([bench, "--bench", "--threads", "2", "--seconds", "0", "memory"], stdout=subprocess.PIPE, text=True, check=True).stdout
    figures = {"ours": map(float, re.search(r"peak memory (\S+) GB: program (\S+) GB, weights and gradients (\S+) GB", out).groups())}
    ask("float32 grouped_mm both 4096")
    figures["torch grouped_mm"] = answer("memory")
    print(f"{'GB':18} {'peak':>6} {'before':>6} {'weights and gradients':>22} {'rest':>6}")
    for who, (peak, before, held) in figures.items():
        print(f"{who:18} {peak:6.2f} {before:6.2f} {held:22.2f} {peak - before - held:6.2f}")
    raise SystemExit

rates, peaks, bands = {}, [], []
flop = lambda n, what: (3 if what == "both" else 1) * 6 * int(n) * 8 * 2048 * 1024
cases = [("float32", "grouped_mm", what) for what in ("forward", "both")]
cases += [("bfloat16", "grouped_mm", what) for what in ("forward", "both")] + [("float32", "eager", "forward")]
for stored in args.stored.split(","):
    ask({"f32": "float32", "bf16": "bfloat16"}[stored] + " grouped_mm forward 16")
begin, own_0, busy_0 = time.time(), os.times(), busy()
torch_0 = own(torch.pid)
for stored in args.stored.split(","):
    parts = [f"layer{n}-{stored}" if n != "4096" else f"layer-{stored}" for n in tokens]
    for _ in range(args.rounds):
        out = subprocess.run([bench, "--bench", "--threads", "2", "--seconds", "0", *parts], stdout=subprocess.PIPE, text=True, check=True).stdout
        peak, band = map(float, re.search(r"peak ([\d.]+) GFLOP/s, memory ([\d.]+)", out).groups())
        peaks.append(peak)
        bands.append(band)
        for n, what, rate in re.findall(r"layer (\d+) tokens \w+ (\S+) +[\d.]+ ms +([\d.]+) GFLOP", out):
            rates.setdefault(("ours " + stored, what, n), []).append(float(rate))
        for dtype, impl, what in cases:
            if (dtype == "float32") == (stored == "f32"):
                for n in tokens:
                    seconds = ask(f"{dtype} {impl} {what} {n}")
                    name = f"torch {stored} {impl}"
                    label = "forward+backward" if what == "both" else "forward"
                    rates.setdefault((name, label, n), []).append(flop(n, what) / seconds / 1e9)
wall, times = time.time() - begin, os.times()
ours = times.user + times.system + times.children_user + times.children_system
ours -= own_0.user + own_0.system + own_0.children_user + own_0.children_system
ours += own(torch.pid) - torch_0
others = 100 * max(0.0, busy() - busy_0 - ours) / wall / os.cpu_count()
peak = statistics.median(peaks)
print(f"2 threads: peak {peak:.0f} GFLOP/s ({min(peaks):.0f} to {max(peaks):.0f}), memory {statistics.median(bands):.1f} GB/s; others {others:.0f} %")
print(f"{'':24} {'':18} {'tokens':>6} {'GFLOP/s':>8} {'of peak':>8}   rounds")
for (who, what, n), values in rates.items():
    rate = statistics.median(values)
    print(f"{who:24} {what:18} {n:>6} {rate:8.1f} {100 * rate / peak:6.1f} %   {' '.join(f'{v:.0f}' for v in values)}")
