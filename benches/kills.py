#!/usr/bin/env python3
"""Kills training at random moments and compares what comes of it with a run that nobody killed.

    benches/kills.py OCCULT [--kills 20] [--seed N] [--json]

A small model is pretrained (one rank, four threads), then tuned over four rank threads with a limit on ranks that falls, and
over two MPI processes where OCCULT is built with MPI. In each setting a run is killed with SIGKILL after a random time,
again and again, each time going on with --resume (or anew, where no checkpoint was complete), until it is done; then another
begins, until the setting has had its share of kills. Moments are clock times drawn from a printed seed: from the start of
the program, encoding of the data included, to its end. A kill counts when it hit a running program. The bytes of
model.safetensors and of the last checkpoint must be those of the run that was not killed, and so must the logged losses.
"""
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "vocab_size": 8192, "hidden_size": 32,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "max_position_embeddings": 128, "tie_word_embeddings": True, "intermediate_size": 32,
    "num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": False, "eos_token_id": 0, "initializer_range": 0.02,
}


def descendants(pid):
    """A process and all below it."""
    below, found = {}, [pid]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            below.setdefault(int(fields[1]), []).append(int(entry.name))
    for process in found:
        found += below.get(process, [])
    return found


def kill(process):
    """SIGKILL to the program, or to mpirun and all its processes; whether it was still running."""
    pids = descendants(process.pid)
    running = process.poll() is None
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()
    while any(is_running(pid) for pid in pids):
        time.sleep(0.01)
    return running


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def result(out):
    """Everything that must be the same."""
    training = out / "training"
    last = training / (training / "latest").read_text().strip()
    files = {"model.safetensors": (out / "model.safetensors").read_bytes()}
    files |= {f"{last.name}/{p.name}": p.read_bytes() for p in sorted(last.iterdir())}
    lines = [json.loads(line) for line in (training / "log.jsonl").read_text().splitlines()]
    return files, [(line["step"], line["loss"]) for line in lines]


class Setting:
    def __init__(self, name, command, folder):
        self.name, self.command, self.folder = name, command, folder

    def start(self, out, resume):
        command = self.command + ["-o", str(out)] + (["--resume"] if resume else [])
        env = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)

    def finish(self, process):
        error = process.communicate()[1]
        if process.returncode:
            sys.exit(f"{self.name}: exit code {process.returncode}: {error}")

    def run(self, kills, rng):
        """(kills that hit, runs that were killed, seconds of the whole run)"""
        whole = self.folder / f"{self.name}-whole"
        begun = time.monotonic()
        self.finish(self.start(whole, False))
        seconds = time.monotonic() - begun
        expected, hit, runs = result(whole), 0, 0
        while hit < kills:
            out, runs, done = self.folder / f"{self.name}-{runs}", runs + 1, False
            while not done:
                process = self.start(out, (out / "training/latest").exists())
                if hit < kills:
                    try:
                        process.wait(rng.uniform(0.0, 0.7 * seconds))
                    except subprocess.TimeoutExpired:
                        hit += kill(process)
                        process.stderr.close()
                        continue
                self.finish(process)
                done = True
            found = result(out)
            for name in sorted(set(expected[0]) | set(found[0])):
                if expected[0].get(name) != found[0].get(name):
                    sys.exit(f"{self.name}, run {runs}: {name} differs from that of the run that was not killed")
            if expected[1] != found[1]:
                sys.exit(f"{self.name}, run {runs}: the logged losses differ")
            left = [p.name for p in out.rglob("*") if "partial" in p.name or p.name.endswith(".old")]
            if left:
                sys.exit(f"{self.name}, run {runs}: {left} are left")
            shutil.rmtree(out)
        return hit, runs, seconds


def has_mpi(program):
    error = subprocess.run([program, "logits", "x", "--ids", "x", "--out", "x", "--comm", "mpi"], capture_output=True, text=True)
    return "built without MPI" not in error.stderr and shutil.which("mpirun") is not None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("occult")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    program, rng, begun = str(Path(args.occult).resolve()), random.Random(args.seed), time.monotonic()
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "config").mkdir()
        (folder / "config/config.json").write_text(json.dumps(CONFIG))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ROOT / "models/recipe" / name, folder / "config")
        # Real text: the repository's own.
        text = [p.read_text() for p in sorted(ROOT.glob("crates/occult-plan/src/**/*.rs")) + sorted(ROOT.glob("*.md"))]
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in text))
        common = ["--data", str(folder / "text.jsonl"), "--length", "64", "--batch-tokens", "512", "--micro-batch", "2"]
        common += ["--steps", "60", "--checkpoint-every", "4", "--threads", "4"]
        base = folder / "pretrain-whole"
        limit = ["--max-ranks", "2", "--anneal", "0.5"]
        settings = [Setting("pretrain", [program, "pretrain", str(folder / "config"), *common], folder)]
        settings += [Setting("tune-4-ranks", [program, "tune", str(base), *common, "--ranks", "4", *limit], folder)]
        if has_mpi(program):
            version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout
            launch = ["mpirun", *(["--oversubscribe"] if "Open MPI" in version else []), "-n", "2"]
            tune = [program, "tune", str(base), *common, "--comm", "mpi", "--max-ranks", "1", "--anneal", "0.5"]
            settings.append(Setting("tune-2-mpi", launch + tune, folder))
        else:
            print("without MPI: OCCULT is built without it, or there is no mpirun")
        share, rows = args.kills // len(settings), []
        for i, setting in enumerate(settings):
            kills = share + (i < args.kills % len(settings))
            hit, runs, seconds = setting.run(kills, rng)
            rows.append({"setting": setting.name, "kills": hit, "runs": runs, "seconds_of_a_run": round(seconds, 2)})
            print(f"{setting.name}: {hit} kills in {runs} runs of {seconds:.1f} s, all to the bit", flush=True)
    survived, took = sum(row["kills"] for row in rows), time.monotonic() - begun
    if args.json:
        print(json.dumps({"seed": args.seed, "settings": rows, "seconds": round(took, 1)}))
    print(f"{survived} of {args.kills} kills resumed to the bit, {took:.0f} s")


if __name__ == "__main__":
    main()
