"""Time and memory of placing whole models: real routing of 24 layers x 32 experts, and a made-up 61 layers x 256 experts.

    python3 -m venv /tmp/bench && /tmp/bench/bin/pip install numpy
    /tmp/bench/bin/python benches/scale.py

The made-up routing has topics: a token draws one of 40, each topic prefers some experts, experts differ in popularity.
"""
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from common import OCCULT, build, import_traces, occult


def timed(label, *args):
    start = time.perf_counter()
    result = occult(*args, "--json")
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    mean = result["mean"]
    print(f"{label}: {seconds:.2f} s, peak {peak:.0f} MiB (largest so far), C_T {mean['copies_per_token']:.3f}, "
          f"node copies {mean['node_copies_per_token']:.3f}, load {mean['load_max_over_mean']:.3f}", flush=True)


def make_routing(path, tokens=100_000, layers=61, experts=256, top_k=8, topics=40):
    rng = np.random.default_rng(1)
    ids = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint16, shape=(tokens, layers, top_k))
    for layer in range(layers):
        taste = (1.2 * rng.gumbel(size=(topics, experts)) + 0.3 * rng.normal(size=experts)).astype(np.float32)
        for start in range(0, tokens, 10_000):
            n = min(10_000, tokens - start)
            topic = (rng.random(n) * rng.random(n) * topics).astype(int)
            score = taste[topic] + rng.gumbel(size=(n, experts)).astype(np.float32)
            ids[start:start + n, layer] = np.argpartition(-score, top_k, axis=1)[:, :top_k]
    ids.flush()


def main():
    build()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        profile = import_traces(folder)["gpt-oss"]
        timed("24 layers x 32 experts x 32k tokens, 8 ranks", "place", profile, "--ranks", 8)
        make_routing(folder / "ids.npy")
        start = time.perf_counter()
        big = folder / "big.safetensors"
        occult("import", folder / "ids.npy", "--format", "vllm", "--experts", 256, "-o", big)
        print(f"import of 61 x 100k x 8: {time.perf_counter() - start:.2f} s")
        (folder / "ids.npy").unlink()
        timed("61 layers x 256 experts x 100k tokens, 64 ranks on 8 nodes", "place", big, "--ranks", 64, "--nodes", 8)
        timed("the same, contiguous", "place", big, "--ranks", 64, "--nodes", 8, "--method", "contiguous")


if __name__ == "__main__":
    main()
