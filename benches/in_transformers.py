#!/usr/bin/env python3
"""What `occult tune` writes, loaded by transformers as it is: logits of both, for every tiny checkpoint of the tests.

    PYTHON_WITH_TRANSFORMERS benches/in_transformers.py OCCULT

Every checkpoint is tuned for three steps, once without and once with a limit on ranks; both programs then compute the logits
of the same ids in f32 (without the limit, which transformers does not know). DeepSeek-MoE v1 has no class in transformers:
its reference is composed as in the fixtures' make.py. Fails where logits differ by more than 2e-4 of their range.
"""
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from token_store import write_store

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "crates/occult-model/tests/fixtures"
sys.path.insert(0, str(FIXTURES))
import make  # noqa: E402

LIMIT = 2e-4


def occult(program, *args):
    done = subprocess.run([program, *map(str, args)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"occult {args[0]}: {done.stderr}")


def compare(program, case, folder, limit):
    config, rng = json.loads((FIXTURES / case / "config.json").read_text()), random.Random(case)
    rows = [[rng.randrange(3, config["vocab_size"]) for _ in range(25)] for _ in range(26)]
    write_store(folder / "rows.store", rows[:24])
    (folder / "ids.json").write_text(json.dumps([row[:24] for row in rows[24:]]))
    out = folder / "out"
    tune = ["tune", FIXTURES / case, "--data", folder / "rows.store", "-o", out, "--steps", "3", "--length", "24"]
    tune += ["--batch-tokens", "192", "--lr", "1e-3", "--warm-up", "0", "--threads", "2"]
    # Not below the routing groups of a token, where the router has groups.
    most = config["topk_group"] if config.get("topk_method") == "group_limited_greedy" else 1
    occult(program, *tune, *(["--ranks", 2 * most, "--max-ranks", most] if limit else []))
    ids = torch.tensor(json.loads((folder / "ids.json").read_text()))
    occult(program, "logits", out, "--ids", folder / "ids.json", "--out", folder / "logits", "--ranks", "1")
    ours = load_file(folder / "logits")["logits"]
    assert (out / "occult.json").exists() == limit
    weights = load_file(out / "model.safetensors")
    written = json.loads((out / "config.json").read_text())
    with torch.no_grad():
        theirs = make.reference_model(written, weights, str(out)).eval()(ids).logits
        before = make.reference_model(config, load_all(FIXTURES / case), str(FIXTURES / case)).eval()(ids).logits
    spread = float(theirs.max() - theirs.min())
    return float((ours - theirs).abs().max()) / spread, float((before - theirs).abs().max()) / spread


def load_all(folder):
    tensors = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def main():
    program, worst = sys.argv[1], 0.0
    for case in make.CASES:
        for limit in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                off, changed = compare(program, case, Path(folder), limit)
            worst = max(worst, off)
            print(f"{case}{', limited' if limit else ''}: logits differ by {off:.1e} of their range; tuning changed them by {changed:.1e}")
            if changed < 10 * LIMIT:
                sys.exit(f"{case}: tuning changed too little to tell the models apart")
    print(f"{len(make.CASES)} checkpoints, largest difference {worst:.1e} (limit {LIMIT:.0e})")
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
