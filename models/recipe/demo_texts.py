#!/usr/bin/env python3
"""The held-out texts of `occult demo`: python3 demo_texts.py CORPUS OUT

Of every domain but the encyclopedia (share-alike licence), some 8 KB of short validation documents to profile
(`OUT/profile/DOMAIN.txt`) and as much of others to measure (`OUT/measure/DOMAIN.txt`).
"""
import json
import pathlib
import sys

BYTES = 8192
corpus, out = map(pathlib.Path, sys.argv[1:])
for path in sorted(corpus.glob("*.val.jsonl")):
    domain = path.name.split(".")[0]
    if domain == "encyclopedia":
        continue
    texts = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
    short = [text for text in texts if len(text) < BYTES // 2]
    # Speeches and chapters are long: pieces of different ones.
    texts = short if len(short) >= 8 else [text[: BYTES // 2].rsplit(" ", 1)[0] for text in texts]
    for part, chosen in (("profile", texts[0::2]), ("measure", texts[1::2])):
        text = ""
        for document in chosen:
            if len(text) + len(document) <= BYTES:
                text += document.rstrip() + "\n\n"
        file = out / part / f"{domain}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        print(file, len(text.encode()))
