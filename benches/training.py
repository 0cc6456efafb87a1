#!/usr/bin/env python3
"""Training beside transformers + torch: the same model, data, order, precision (f32) and threads, one process each.

    benches/training.py OCCULT MODEL_DIR DATA.jsonl [--steps 50] [--length 256] [--sequences 8] [--threads 2]

MODEL_DIR is any MoE model directory with a tokenizer that transformers knows. Both sides take AdamW steps on the same
sequences: the texts' tokens, cut into runs of `length`, in the files' order. Prints losses, their largest difference,
tokens/s (median step) and peak memory of each side as JSON. Weights after the run are compared too.
"""
import argparse, json, resource, subprocess, sys, tempfile, time
from pathlib import Path


def peer(args):
    """The torch side, in a process of its own so that its peak memory is its own."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("grouped_mm")
    model.train()
    decay = [p for n, p in model.named_parameters() if p.dim() > 1]
    plain = [p for n, p in model.named_parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), eps=1e-8)
    rows = json.loads(Path(args.rows).read_text())
    losses, seconds = [], []
    for step in range(args.steps):
        batch = torch.tensor(rows[step * args.sequences : (step + 1) * args.sequences])
        begun = time.perf_counter()
        optimiser.zero_grad(set_to_none=True)
        logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"losses": losses, "seconds": seconds, "peak_bytes": peak}))


def write_store(path, rows):
    """A token store with one document per row, as `occult` reads it: rows keep their order when it is not shuffled."""
    import struct

    path.mkdir()
    tokens, documents, end = bytearray(), bytearray(), 0
    for i, row in enumerate(rows):
        tokens += struct.pack(f"<{len(row)}I", *row)
        end += len(row)
        documents += struct.pack("<QII", end, 0, i)
    (path / "tokens.bin").write_bytes(tokens)
    (path / "documents.bin").write_bytes(documents)
    head = {"version": 1, "tokens": end, "documents": len(rows), "description": "benches/training.py"}
    (path / "store.json").write_text(json.dumps(head))


def median(values):
    return sorted(values)[len(values) // 2]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("occult")
    parser.add_argument("model")
    parser.add_argument("data", nargs="?")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rows")
    args = parser.parse_args()
    if args.rows:
        return peer(args)

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(args.model) / "tokenizer.json"))
    ids, need = [], args.steps * args.sequences * (args.length + 1)
    for line in open(args.data, encoding="utf-8"):
        ids += tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
        if len(ids) >= need:
            break
    width = args.length + 1
    rows = [ids[i : i + width] for i in range(0, need, width)]
    if len(rows[-1]) != width:
        sys.exit(f"{args.data}: {len(ids)} tokens, {need} are needed")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_store(folder / "rows.store", rows)
        (folder / "rows.json").write_text(json.dumps(rows))
        command = [args.occult, "tune", args.model, "--data", str(folder / "rows.store"), "-o", str(folder / "out")]
        command += ["--in-order", "--steps", str(args.steps), "--length", str(args.length), "--lr", str(args.lr)]
        command += ["--batch-tokens", str(args.length * args.sequences), "--micro-batch", str(args.sequences)]
        command += ["--schedule", "constant", "--warm-up", "0", "--aux-loss", "0", "--ranks", str(args.ranks)]
        command += ["--threads", str(args.threads), "--checkpoint-every", "1000000", "--dtype", "f32"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        ours_peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        log = [json.loads(line) for line in (folder / "out/training/log.jsonl").read_text().splitlines()]
        again = [sys.executable, __file__, args.occult, args.model, "--rows", str(folder / "rows.json")]
        for name in ("steps", "length", "sequences", "threads", "lr"):
            again += [f"--{name}", str(getattr(args, name))]
        theirs = json.loads(subprocess.run(again, check=True, capture_output=True, text=True).stdout)
    ours = [entry["loss"] for entry in log]
    tokens = args.length * args.sequences
    speed = median([entry["tokens_per_s"] for entry in log]), tokens / median(theirs["seconds"])
    print(json.dumps({
        "losses": {"occult": ours, "torch": theirs["losses"]},
        "largest_difference": max(abs(a - b) for a, b in zip(ours, theirs["losses"])),
        "tokens_per_s": {"occult": speed[0], "torch": speed[1], "ratio": speed[0] / speed[1]},
        "peak_bytes": {"occult": ours_peak, "torch": theirs["peak_bytes"], "ratio": ours_peak / theirs["peak_bytes"]},
    }, indent=1))


if __name__ == "__main__":
    main()
