#!/usr/bin/env python3
"""Training beside transformers + torch: the same model, data, order, precision (f32) and threads.

    PYTHON_WITH_TRANSFORMERS benches/training.py OCCULT MODEL_DIR DATA.jsonl [--ranks 4] [--steps 50] [--threads 2]

MODEL_DIR is any MoE model directory with a tokenizer that transformers knows. Both sides take AdamW steps on the same
sequences: the texts' tokens, cut into runs of `length`, in the files' order. Ours runs over `ranks` rank threads that share
`threads` workers; torch is one process with as many threads and `grouped_mm` experts (the script fails without it). They run
in turns, a round of each after the other, each in a process of its own whose peak resident memory the system reports. The
first round takes `steps` steps and gives the losses, the others `round-steps`; speed is the median of the rounds' medians.
Gradients of the first step are those that AdamW keeps (its first moment), compared per tensor; so are the weights after it.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from token_store import write_store

LR, BETA1 = 1e-3, 0.9


def peer(args):
    """The torch side."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    offsets = torch.tensor([2, 4], dtype=torch.int32)
    torch.nn.functional.grouped_mm(torch.ones(4, 16), torch.ones(2, 16, 16), offs=offsets)
    imported = peak_so_far()
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="grouped_mm"
    )
    if model.config._experts_implementation != "grouped_mm":
        sys.exit(f"the experts of {args.model} run as {model.config._experts_implementation}, not grouped_mm")
    model.train()
    decay = [p for n, p in model.named_parameters() if p.dim() > 1]
    plain = [p for n, p in model.named_parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=LR, betas=(BETA1, 0.95), eps=1e-8)
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
        if args.first_step:
            first = {}
            for name, p in model.named_parameters():
                first[name] = p.detach().clone()
                first[f"{name}.exp_avg"] = optimiser.state[p]["exp_avg"].clone()
            save_file(first, args.first_step)
            break
    print(json.dumps({"losses": losses, "seconds": seconds, "imported_bytes": imported}))


def peak_so_far():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024


def run(command, env=None):
    """Standard output and peak resident memory of a process."""
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, env=env)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command[0]}: exit code {process.returncode}")
    return output, usage.ru_maxrss * 1024


def median(values):
    return sorted(values)[len(values) // 2]


class Sides:
    def __init__(self, args, folder):
        self.args, self.folder, self.runs = args, folder, 0

    def ours(self, steps, *more):
        """Log and directory of a run, and its peak memory."""
        args, self.runs = self.args, self.runs + 1
        out = self.folder / f"out{self.runs}"
        command = [args.occult, "tune", args.model, "--data", self.folder / "rows.store", "-o", out, "--in-order"]
        command += ["--steps", steps, "--length", args.length, "--batch-tokens", args.length * args.sequences]
        command += ["--micro-batch", args.sequences, "--lr", LR, "--schedule", "constant", "--warm-up", "0"]
        command += ["--aux-loss", "0", "--ranks", args.ranks, "--threads", args.threads, "--dtype", "f32"]
        _, peak = run(command + ["--checkpoint-every", "1000000", *more])
        return [json.loads(line) for line in (out / "training/log.jsonl").read_text().splitlines()], out, peak

    def theirs(self, steps, *more):
        args = self.args
        command = [sys.executable, __file__, args.occult, args.model, "--rows", self.folder / "rows.json", "--steps", steps]
        for name in ("length", "sequences", "threads"):
            command += [f"--{name}", getattr(args, name)]
        output, peak = run(command + list(more))
        return json.loads(output), peak


def first_step(sides):
    """Largest relative error per tensor: gradients, and weights after the step."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file

    _, out, _ = sides.ours(sides.args.steps, "--stop-after", "1")
    sides.theirs(1, "--first-step", sides.folder / "first.safetensors")
    theirs, ours, parts = load_file(sides.folder / "first.safetensors"), {}, {}
    for path in sorted((out / "training/step-00000001").glob("*.safetensors")):
        with safe_open(path, "pt") as shard:
            experts = json.loads(shard.metadata()["experts"])
            for key in shard.keys():
                name = key.removesuffix("_sq").removesuffix(".exp_avg")
                if key.endswith("_sq"):
                    continue
                if name not in experts:
                    ours[key] = shard.get_tensor(key)
                    continue
                for expert, values in zip(experts[name], shard.get_tensor(key)):
                    parts.setdefault(key, {})[expert] = values
    ours |= {key: torch.stack([values[e] for e in sorted(values)]) for key, values in parts.items()}
    if set(ours) != set(theirs):
        sys.exit(f"other parameters: {sorted(set(ours) ^ set(theirs))[:4]}")
    off = {key: float((ours[key] - theirs[key]).abs().max() / theirs[key].abs().max()) for key in theirs}
    gradients = {key.removesuffix(".exp_avg"): v for key, v in off.items() if key.endswith(".exp_avg")}
    worst = max(gradients, key=gradients.get)
    weights = [key for key in theirs if not key.endswith(".exp_avg")]
    # Adam's first step is the sign of a gradient: where that is zero but for rounding the weights differ by two rates.
    apart = sum(int(((ours[k] - theirs[k]).abs() > LR / 10).sum()) for k in weights)
    return {
        "gradients": {"tensors": len(gradients), "largest_relative_error": gradients[worst], "of": worst,
                      "median": median(list(gradients.values()))},
        "weights_after_one_step": {"largest_relative_error": max(off[k] for k in weights),
                                   "share_apart_by_a_tenth_of_the_rate": apart / sum(theirs[k].numel() for k in weights)},
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("occult")
    parser.add_argument("model")
    parser.add_argument("data", nargs="?")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--round-steps", type=int, default=15)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    parser.add_argument("--first-step", help=argparse.SUPPRESS)
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
    tokens, speeds, peaks, losses, imported = args.length * args.sequences, ([], []), ([], []), None, []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_store(folder / "rows.store", rows)
        (folder / "rows.json").write_text(json.dumps(rows))
        sides = Sides(args, folder)
        parity = first_step(sides)
        for number in range(args.rounds):
            steps = args.steps if number == 0 else min(args.round_steps, args.steps)
            log, _, our_peak = sides.ours(steps)
            theirs, their_peak = sides.theirs(steps)
            losses = losses or ([entry["loss"] for entry in log], theirs["losses"])
            speeds[0].append(median([entry["tokens_per_s"] for entry in log]))
            speeds[1].append(tokens / median(theirs["seconds"]))
            peaks[0].append(our_peak)
            peaks[1].append(their_peak)
            imported.append(theirs["imported_bytes"])
    (ours, torch_s), (our_peak, their_peak) = map(median, speeds), map(median, peaks)
    print(json.dumps({
        "parity_of_the_first_step": parity,
        "losses": {"occult": losses[0], "torch": losses[1]},
        "largest_difference_of_losses": max(abs(a - b) for a, b in zip(*losses)),
        "tokens_per_s": {"occult": ours, "torch": torch_s, "ratio": ours / torch_s, "rounds": speeds},
        "peak_bytes": {"occult": our_peak, "torch": their_peak, "ratio": our_peak / their_peak,
                       "torch_before_the_model": median(imported)},
    }, indent=1))


if __name__ == "__main__":
    main()
