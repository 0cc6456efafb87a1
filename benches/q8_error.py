#!/usr/bin/env python3
"""What quantised weights cost: logits of a checkpoint converted to q8 (or q4) against logits of the checkpoint itself.

    PYTHON benches/q8_error.py MODEL [--quantize q4] [--gguf FILE.gguf] [--prompts 8] [--tokens 64] [--seed 0]

MODEL is a directory with f32 or bf16 weights; arithmetic on them is f32. Prompts are random token ids. Printed, for each prompt and
for all together, is the relative root mean square of the difference: |quantised - reference| / |reference|, over the logits of all
positions. With --gguf the same prompts go through llama.cpp with that file (q8_0, made from the same checkpoint) and are compared
with the same reference. The Python needs numpy and safetensors, for --gguf llama-cpp-python.
"""
import argparse
import json
import random
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from common import build, occult


def logits(model, folder):
    """[prompts, tokens, vocabulary] of `folder`'s prompts."""
    occult("logits", model, "--ids", folder / "ids.json", "--out", folder / "logits")
    return load_file(folder / "logits")["logits"]


def llama_logits(gguf, prompts):
    from llama_cpp import Llama

    model = Llama(gguf, n_ctx=len(prompts[0]), n_batch=len(prompts[0]), logits_all=True, verbose=False)
    rows = []
    for ids in prompts:
        model.reset()
        model.eval(ids)
        rows.append(np.array(model.scores[: len(ids)]))
    return np.stack(rows)


def relative_rms(ours, reference):
    ours, reference = ours.astype(np.float64), reference.astype(np.float64)
    return np.sqrt(((ours - reference) ** 2).sum() / (reference**2).sum())


def show(name, ours, reference):
    if ours.shape != reference.shape:
        raise SystemExit(f"{name}: logits {ours.shape}, of the reference {reference.shape}")
    each = " ".join(f"{100 * relative_rms(a, b):.3f}" for a, b in zip(ours, reference))
    print(f"{name:16} {100 * relative_rms(ours, reference):.3f} %   prompts: {each}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--quantize", default="q8", choices=["q8", "q4"])
    parser.add_argument("--gguf", help="the same checkpoint in 8 bits for llama.cpp")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.prompts < 1 or args.tokens < 1:
        parser.error("--prompts and --tokens must be at least 1")
    build()
    vocab, rng = json.loads((args.model / "config.json").read_text())["vocab_size"], random.Random(args.seed)
    prompts = [[rng.randrange(vocab) for _ in range(args.tokens)] for _ in range(args.prompts)]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "ids.json").write_text(json.dumps(prompts))
        occult("convert", args.model, "--quantize", args.quantize, "-o", folder / "quantised")
        reference = logits(args.model, folder)
        print(f"relative rms of logits, {args.prompts} prompts of {args.tokens} random tokens, against {args.model}")
        show(f"ours {args.quantize}", logits(folder / "quantised", folder), reference)
    if args.gguf:
        show("llama.cpp", llama_logits(args.gguf, prompts), reference)


if __name__ == "__main__":
    main()
