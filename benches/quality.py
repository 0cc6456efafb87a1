#!/usr/bin/env python3
"""Quality against traffic: what a limit on the ranks a token visits costs, with and without tuning under it.

    benches/quality.py OCCULT MODEL CORPUS OUT [--ranks 4 8] [--limits 1 2 3] [--rules ...] [--keep-mass ...]
                          [--max-error ...] [--seeds 3]
    benches/quality.py OCCULT MODEL CORPUS OUT --table --plot docs/quality/NAME.svg

CORPUS is what models/recipe/build_corpus.py writes, with its tokens in CORPUS/train.store. A profile of pieces of its
training part gives the placement (search, as many experts on every rank) and the table of similar experts. Every run tunes
MODEL for --steps steps on the training part with its limit active - or does not tune - and is measured on pieces of the
validation part: perplexity per domain, copies per token, load, and the share of --questions questions per domain answered
rightly. A question is a piece of text with four continuations: its own, and those of three other texts of the domain.
The seed decides the order of the training data and which pieces are measured, with and without tuning alike. Without a
limit the placement changes nothing but rounding: that tuning is done once per seed, and measured over every number of ranks.

Appends a line of JSON per run to OUT/runs.jsonl and leaves out runs that are there: it can be stopped and given again.
`--table` only prints the table of OUT/runs.jsonl. `--time` measures a training step of every way with a thread per rank, after
the runs; nothing else should run then.
"""
import argparse, json, math, random, shutil, statistics, subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PROFILE_BYTES, MEASURE_BYTES = 50_000, 8_000


def documents(path):
    return [json.loads(line)["text"] for line in path.open(encoding="utf-8")]


def piece(path, seed, size):
    """So much text from places all over a file."""
    texts, taken = documents(path), ""
    random.Random(seed).shuffle(texts)
    for text in texts:
        if len(taken) >= size:
            break
        taken += text[: min(8000, size // 2)] + "\n\n"
    return taken[:size]


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
    parts = [("profile", "train", 1, PROFILE_BYTES)]
    parts += [(f"measure-{seed}", "val", 2 + seed, MEASURE_BYTES) for seed in range(args.seeds)]
    for part, kind, seed, size in parts:
        folder = args.out / part
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(args.corpus.glob(f"*.{kind}.jsonl")):
            (folder / f"{path.name.split('.')[0]}.txt").write_text(piece(path, seed, size), encoding="utf-8")
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
    for option in ("keep_mass", "max_error"):
        options += ["--" + option.replace("_", "-"), run[option]] if run[option] else []
    return options


def placed(args, run):
    return ["--placement", args.out / f"placement-{run['ranks']}.json"]


def tune(args, run, steps, computed_by, to):
    occult(
        args, "tune", args.model, "--data", args.corpus / "train.store", "--steps", steps, "--batch-tokens", args.batch_tokens,
        "--micro-batch", 4, "--lr", args.lr, "--warm-up", args.steps // 6, "--seed", run["seed"], "--checkpoint-every", 10 * args.steps,
        "--aux-loss", 0.02, "--aux-loss-over", "layers", *computed_by, *placed(args, run), *limit_options(args, run), "-o", to,
    )  # fmt: skip


def step_seconds(args, run):
    """A step's time with a thread for every rank, nothing else running: the median of five after the first."""
    to = args.out / "timed"
    shutil.rmtree(to, ignore_errors=True)
    tune(args, run, 6, ["--ranks", run["ranks"]], to)
    log = [json.loads(line) for line in (to / "training/log.jsonl").open()]
    return statistics.median(step["tokens"] / step["tokens_per_s"] for step in log[1:])


def carry_out(args, run):
    run, model = dict(run), args.model
    if run["tuned"]:
        # Without a limit every number of ranks learns the same.
        way = "-".join(str(run[key]) for key in (*WAY, "seed"))
        model = args.out / (f"tuned-{run['seed']}" if run["limit"] is None else f"tuned-{way}")
        if run["limit"] is not None or not (model / "model.safetensors").exists():
            shutil.rmtree(model, ignore_errors=True)
            # What is learned does not depend on how many ranks compute.
            tune(args, run, args.steps, ["--ranks", 1, "--threads", 1], model)
    texts = sorted((args.out / f"measure-{run['seed']}").iterdir())
    found = json.loads(
        occult(
            args, "eval", model, "--context", 512, "--ranks", run["ranks"], *placed(args, run), *limit_options(args, run),
            "--text", *texts, "--tasks", args.out / "questions.jsonl", "--json",
        )  # fmt: skip
    )
    if run["tuned"] and run["limit"] is not None:
        shutil.rmtree(model)
    run["perplexity"] = found["total"]["perplexity"]
    run["domains"] = {Path(text["file"]).stem: text["perplexity"] for text in found["texts"]}
    run["accuracy"] = found["tasks"][0]["acc"]
    run["C_T"] = found["copies_per_token"]
    run["load"] = found["load_max_over_mean"]
    run["rows_per_token"] = found["sent_rows_per_token"]
    return run


def grid(args):
    """Every run, those with the first seed first."""
    for seed in range(args.seeds):
        for ranks in args.ranks:
            ways = [("none", None, None, None)]
            ways += [(rule, limit, None, None) for limit in args.limits for rule in args.rules]
            ways += [("best-mass", ranks, mass, None) for mass in args.keep_mass]
            ways += [("least-error", ranks, None, error) for error in args.max_error]
            for way in ways:
                for tuned in (False, True):
                    yield {**dict(zip(WAY, (ranks, *way))), "tuned": tuned, "seed": seed}


WAY = ("ranks", "rule", "limit", "keep_mass", "max_error")
KEYS = (*WAY, "tuned")


def adaptive(way):
    """What an adaptive budget keeps, in words; nothing of a fixed one."""
    _, _, _, keep_mass, max_error, *_ = way
    if keep_mass:
        return f", {keep_mass} of the mass"
    return f", error {max_error}" if max_error else ""


def table(runs, times):
    def shown(values, form):
        spread = f" ± {format(statistics.stdev(values), form.lstrip('+'))}" if len(values) > 1 else ""
        return format(statistics.fmean(values), form) + spread

    print("| ranks | limit | rule | tuned | C_T | rows sent per token | busiest rank | perplexity | over no limit | questions | step, s |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run[key] for key in KEYS), []).append(run)
    order = lambda key: (key[0], key[5], -(key[2] or 99), key[3] or 0, -(key[4] or 0), key[1])
    for key in sorted(groups, key=order):
        ranks, rule, limit, _, _, tuned = key
        of = lambda name: [run[name] for run in groups[key] if name in run]
        base = {run["seed"]: run["perplexity"] for run in groups.get((ranks, "none", None, None, None, tuned), [])}
        # The base over itself says nothing.
        over = [] if limit is None else [100 * (run["perplexity"] / base[run["seed"]] - 1) for run in groups[key] if run["seed"] in base]
        print(
            f"| {ranks} | {limit or 'none'} | {rule}{adaptive(key)} | {'yes' if tuned else 'no'} "
            f"| {shown(of('C_T'), '.2f')} | {shown(of('rows_per_token'), '.2f')} | {shown(of('load'), '.2f')} "
            f"| {shown(of('perplexity'), '.2f')} | {shown(over, '+.2f') + ' %' if over else ''} "
            f"| {shown([100 * a for a in of('accuracy')], '.1f')} % "
            f"| {format(times[key[:-1]], '.2f') if tuned and key[:-1] in times else ''} |"
        )
    domains = sorted(runs[0]["domains"])
    print("\n| ranks | limit | rule | tuned | " + " | ".join(domains) + " |")
    print("|---|---|---|---|" + "---|" * len(domains))
    for key in sorted(groups, key=order):
        ranks, rule, limit, _, _, tuned = key
        mean = lambda d: statistics.fmean(run["domains"][d] for run in groups[key])
        print(
            f"| {ranks} | {limit or 'none'} | {rule}{adaptive(key)} | {'yes' if tuned else 'no'} | "
            + " | ".join(f"{mean(d):.2f}" for d in domains) + " |"
        )  # fmt: skip


COLOURS = {
    "router-score": "#c94a0a", "similarity": "#a87a12", "best-mass": "#0b5fa5", "least-error": "#7a3fb0",
    "adaptive, mass": "#58a6d8", "adaptive, error": "#0a8f6a",
}  # fmt: skip


def over_tuned(runs):
    """Per way and whether tuned: copies per token, and perplexity over ordinary tuning, in %, by seed."""
    base = {(r["ranks"], r["seed"]): r["perplexity"] for r in runs if r["limit"] is None and r["tuned"]}
    points = {}
    for run in runs:
        key, own = tuple(run[k] for k in KEYS), base.get((run["ranks"], run["seed"]))
        if run["limit"] is not None and own:
            points.setdefault(key, []).append((run["C_T"], 100 * (run["perplexity"] / own - 1)))
    return points


LEAST = 0.05


def plot(runs, path):
    """Perplexity over ordinary tuning, on a logarithmic scale that ends at LEAST, against copies per token: hollow without tuning
    under the limit, filled with it."""
    points = over_tuned(runs)
    panels, width, height, left, top, bottom = sorted({key[0] for key in points}), 420, 400, 50, 30, 40
    highest = max(statistics.fmean(y for _, y in values) for values in points.values())
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width * len(panels) + 110} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width * len(panels) + 110}" height="{height}" fill="#ffffff"/>',
    ]
    for panel, ranks in enumerate(panels):
        most = max(x for key, values in points.items() if key[0] == ranks for x, _ in values)
        px = lambda c: panel * width + left + (width - left - 20) * (c - 1) / (most - 1)
        py = lambda v: top + (height - top - bottom) * math.log(highest / max(v, LEAST)) / math.log(highest / LEAST)
        for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100):
            if LEAST <= tick <= highest:
                svg.append(f'<path d="M{px(1):.1f} {py(tick):.1f}H{px(most):.1f}" stroke="#e4e4e0"/>')
                svg.append(f'<text x="{px(1) - 8:.1f}" y="{py(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
        for copies in range(1, int(most) + 1):
            svg.append(f'<text x="{px(copies):.1f}" y="{height - 22}" text-anchor="middle">{copies}</text>')
        svg.append(f'<text x="{px((1 + most) / 2):.1f}" y="{height - 6}" text-anchor="middle">copies per token</text>')
        svg.append(f'<text x="{px(1):.1f}" y="18">{ranks} ranks: perplexity over ordinary tuning, %</text>')
        lines = {}
        for (of, rule, _, keep_mass, max_error, tuned), values in points.items():
            if of == ranks:
                name = "adaptive, mass" if keep_mass else "adaptive, error" if max_error else rule
                x, y = (statistics.fmean(v[i] for v in values) for i in (0, 1))
                spread = statistics.stdev(v[1] for v in values) if len(values) > 1 else 0.0
                lines.setdefault((name, tuned), []).append((x, y, spread))
        for (name, tuned), line in lines.items():
            colour = COLOURS[name]
            joined = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y, _ in sorted(line))
            dash = "" if tuned else ' stroke-dasharray="3 4"'
            svg.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>')
            for x, y, spread in line:
                svg.append(f'<path d="M{px(x):.1f} {py(y - spread):.1f}V{py(y + spread):.1f}" stroke="{colour}"/>')
                fill = colour if tuned else "#ffffff"
                svg.append(f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="3.5" fill="{fill}" stroke="{colour}"/>')
    for i, (name, colour) in enumerate(COLOURS.items()):
        svg.append(f'<text x="{width * len(panels)}" y="{top + 14 + 18 * i}" fill="{colour}">{name}</text>')
    svg.append("</svg>\n")
    path.write_text("\n".join(svg))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind in (("occult", str), ("model", Path), ("corpus", Path), ("out", Path)):
        parser.add_argument(name, type=kind)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--limits", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rules", nargs="+", default=["router-score", "similarity", "best-mass", "least-error"])
    parser.add_argument("--keep-mass", type=float, nargs="*", default=[0.79])
    parser.add_argument("--max-error", type=float, nargs="*", default=[0.063, 0.085])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    record = args.out / "runs.jsonl"
    if not args.table:
        prepare(args)
    runs = [{"max_error": None, **json.loads(line)} for line in record.open()] if record.exists() else []
    done = {tuple(run[key] for key in (*KEYS, "seed")) for run in runs}
    missing = [] if args.table else [run for run in grid(args) if tuple(run[key] for key in (*KEYS, "seed")) not in done]
    # Ordinary tuning is one run for every number of ranks: not two at a time.
    for at_once, part in ((1, [r for r in missing if r["limit"] is None]), (args.jobs, [r for r in missing if r["limit"] is not None])):
        with ThreadPoolExecutor(at_once) as pool:
            for run in pool.map(lambda run: carry_out(args, run), part):
                runs.append(run)
                with record.open("a") as file:
                    file.write(json.dumps(run) + "\n")
    timed = args.out / "times.jsonl"
    times = [json.loads(line) for line in timed.open()] if timed.exists() else []
    for way in grid(args) if args.time else []:
        known = [time for time in times if all(time[key] == way[key] for key in WAY)]
        if way["tuned"] and not known:
            times.append({**{key: way[key] for key in WAY}, "step_seconds": step_seconds(args, way)})
            with timed.open("a") as file:
                file.write(json.dumps(times[-1]) + "\n")
    table(runs, {tuple(time[key] for key in WAY): time["step_seconds"] for time in times})
    if args.plot:
        plot(runs, args.plot)


main()
