#!/usr/bin/env python3
"""Quality against traffic: what a limit on the ranks a token visits costs, with and without tuning under it.

    benches/quality.py OCCULT MODEL CORPUS OUT [--ranks 4 8] [--limits 1 2 3] [--rules ...] [--keep-mass 0.8] [--seeds 3]

CORPUS is what models/recipe/build_corpus.py writes, with its tokens in CORPUS/train.store. A profile of pieces of its
training part gives the placement (search, as many experts on every rank). Every run tunes MODEL for --steps steps on the
training part with its limit active - or does not tune - and is measured on pieces of the validation part: perplexity per
domain, and the share of --questions questions per domain answered rightly. A question is a piece of text with four
continuations: its own, and those of three other texts of the domain.

Appends a line of JSON per run to OUT/runs.jsonl and leaves out runs that are there: it can be stopped and given again.
`--table` only prints the table of OUT/runs.jsonl.
"""
import argparse, json, random, shutil, statistics, subprocess
from pathlib import Path

BYTES = 50_000


def documents(path):
    return [json.loads(line)["text"] for line in path.open(encoding="utf-8")]


def piece(path, seed):
    """About BYTES of text from places all over a file."""
    texts, taken = documents(path), ""
    random.Random(seed).shuffle(texts)
    for text in texts:
        if len(taken) >= BYTES:
            break
        taken += text[:8000] + "\n\n"
    return taken[:BYTES]


def questions(path, count):
    """Four continuations of a text each, of which one is its own."""
    dice = random.Random(path.name)
    texts = [text for text in documents(path) if len(text) > 400]
    made = []
    for i in range(min(count, len(texts))):
        others = dice.sample(texts[:i] + texts[i + 1 :], 3) if len(texts) > 3 else []
        if len(others) < 3:
            break
        choices = [texts[i][240:340]] + [other[240:340] for other in others]
        order = dice.sample(range(4), 4)
        made.append({"context": texts[i][:240], "choices": [choices[o] for o in order], "answer": order.index(0)})
    return made


def prepare(args):
    for part, kind, seed in (("profile", "train", 1), ("measure", "val", 2)):
        folder = args.out / part
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(args.corpus.glob(f"*.{kind}.jsonl")):
            (folder / f"{path.name.split('.')[0]}.txt").write_text(piece(path, seed), encoding="utf-8")
    asked = [q for path in sorted(args.corpus.glob("*.val.jsonl")) for q in questions(path, args.questions)]
    (args.out / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in asked))
    profile = args.out / "profile.safetensors"
    if not profile.exists():
        occult(args, "profile", args.model, "--text", *sorted((args.out / "profile").iterdir()), "-o", profile)
    for ranks in args.ranks:
        placement = args.out / f"placement-{ranks}.json"
        if not placement.exists():
            occult(args, "place", profile, "--ranks", ranks, "--equal", "-o", placement)


def occult(args, *words):
    done = subprocess.run([args.occult, *map(str, words)], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"occult {' '.join(map(str, words))}: exit status {done.returncode}")
    return done.stdout


def limit_options(args, run):
    """The limit of a run, as `tune` and `eval` take it."""
    if run["limit"] is None:
        return []
    options = ["--max-ranks", run["limit"], "--rule", run["rule"]]
    if run["rule"] == "similarity":
        options += ["--similar-by", args.out / "profile.safetensors"]
    return options + (["--keep-mass", run["keep_mass"]] if run["keep_mass"] else [])


def carry_out(args, run):
    model, placed = args.model, ["--placement", args.out / f"placement-{run['ranks']}.json"]
    run = dict(run)
    if run["tuned"]:
        model = args.out / "tuned"
        shutil.rmtree(model, ignore_errors=True)
        occult(
            args, "tune", args.model, "--data", args.corpus / "train.store", "--steps", args.steps, "--batch-tokens", 8192,
            "--lr", args.lr, "--seed", run["seed"], "--checkpoint-every", 10 * args.steps, "--aux-loss", 0.02,
            "--aux-loss-over", "layers", *placed, *limit_options(args, run), "-o", model,
        )  # fmt: skip
        log = [json.loads(line) for line in (model / "training/log.jsonl").open()]
        for key in ("C_T", "rank_load"):
            if key in log[0]["figures"]:
                run[key] = statistics.fmean(step["figures"][key] for step in log)
        run["tokens_per_s"] = statistics.median(step["tokens_per_s"] for step in log)
    texts = sorted((args.out / "measure").iterdir())
    found = json.loads(
        occult(
            args, "eval", model, "--context", 512, "--ranks", run["ranks"], *placed, *limit_options(args, run),
            "--text", *texts, "--tasks", args.out / "questions.jsonl", "--json",
        )  # fmt: skip
    )
    run["perplexity"] = found["total"]["perplexity"]
    run["domains"] = {Path(text["file"]).stem: text["perplexity"] for text in found["texts"]}
    run["accuracy"] = found["tasks"][0]["acc"]
    run["rows_per_token"] = found["sent_rows_per_token"]
    return run


def grid(args):
    """Every run, those with the first seed first."""
    for seed in range(args.seeds):
        for ranks in args.ranks:
            ways = [("none", None, None)]
            ways += [(rule, limit, None) for limit in args.limits for rule in args.rules]
            ways += [("best-mass", max(args.limits), mass) for mass in args.keep_mass]
            for rule, limit, keep_mass in ways:
                for tuned in [False, True] if seed == 0 else [True]:
                    yield {"ranks": ranks, "rule": rule, "limit": limit, "keep_mass": keep_mass, "tuned": tuned, "seed": seed}


KEYS = ("ranks", "rule", "limit", "keep_mass", "tuned")


def table(runs):
    def shown(values, form):
        spread = f" ± {format(statistics.stdev(values), form)}" if len(values) > 1 else ""
        return format(statistics.fmean(values), form) + spread

    print("| ranks | limit | rule | tuned | C_T | rows sent per token | busiest rank | perplexity | over no limit | questions |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run[key] for key in KEYS), []).append(run)
    order = lambda key: (key[0], key[4], -(key[2] or 99), key[3] or 0, key[1])
    for key in sorted(groups, key=order):
        ranks, rule, limit, keep_mass, tuned = key
        of = lambda name: [run[name] for run in groups[key] if name in run]
        base = {run["seed"]: run["perplexity"] for run in groups.get((ranks, "none", None, None, tuned), [])}
        over = [100 * (run["perplexity"] / base[run["seed"]] - 1) for run in groups[key] if run["seed"] in base]
        print(
            f"| {ranks} | {limit or 'none'} | {rule}{f', {keep_mass} of the mass' if keep_mass else ''} | {'yes' if tuned else 'no'} "
            f"| {shown(of('C_T'), '.2f') if of('C_T') else ''} | {shown(of('rows_per_token'), '.2f')} "
            f"| {shown(of('rank_load'), '.2f') if of('rank_load') else ''} | {shown(of('perplexity'), '.3f')} "
            f"| {shown(over, '+.2f') + ' %' if over else ''} | {shown([100 * a for a in of('accuracy')], '.1f')} % |"
        )
    domains = sorted(runs[0]["domains"])
    print("\n| ranks | limit | rule | tuned | " + " | ".join(domains) + " |")
    print("|---|---|---|---|" + "---|" * len(domains))
    for key in sorted(groups, key=order):
        ranks, rule, limit, keep_mass, tuned = key
        mean = lambda d: statistics.fmean(run["domains"][d] for run in groups[key])
        print(
            f"| {ranks} | {limit or 'none'} | {rule}{f', {keep_mass}' if keep_mass else ''} | {'yes' if tuned else 'no'} | "
            + " | ".join(f"{mean(d):.2f}" for d in domains) + " |"
        )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind in (("occult", str), ("model", Path), ("corpus", Path), ("out", Path)):
        parser.add_argument(name, type=kind)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--limits", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rules", nargs="+", default=["router-score", "similarity", "best-mass"])
    parser.add_argument("--keep-mass", type=float, nargs="*", default=[0.8])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--questions", type=int, default=25)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    record = args.out / "runs.jsonl"
    if not args.table:
        prepare(args)
    runs = [json.loads(line) for line in record.open()] if record.exists() else []
    done = {tuple(run[key] for key in (*KEYS, "seed")) for run in runs}
    for run in [] if args.table else grid(args):
        if tuple(run[key] for key in (*KEYS, "seed")) not in done:
            runs.append(carry_out(args, run))
            with record.open("a") as file:
                file.write(json.dumps(runs[-1]) + "\n")
    table(runs)


main()
