#!/usr/bin/env python3
"""Trains the byte-level BPE tokenizer of the bundled model on the training part of the corpus.

    train_tokenizer.py CORPUS OUT/tokenizer.json [--vocab 8192]

Needs the package tokenizers==0.23.3. The same bytes out for the same corpus. Prints how many tokens each file has with it.
"""
import argparse
import glob
import json
import os

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|pad|>"]


def texts(path):
    with open(path, encoding="utf8") as f:
        for line in f:
            yield json.loads(line)["text"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus")
    parser.add_argument("out")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--sample-bytes", type=int, default=3_000_000, help="most bytes that one domain gives to the training")
    args = parser.parse_args()
    tokenizer = Tokenizer(models.BPE())
    # Digits one by one, then GPT-2's splitting: numbers of any length share ten tokens.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=args.vocab, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), max_token_length=24)

    def sample():
        for path in sorted(glob.glob(f"{args.corpus}/*.train.jsonl")):
            left = args.sample_bytes
            for text in texts(path):
                if left <= 0:
                    break
                left -= len(text.encode())
                yield text

    tokenizer.train_from_iterator(sample(), trainer)
    # Compact, with one spelling: keys as the library orders them.
    data = json.loads(tokenizer.to_str())
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    with open(args.out, "w", encoding="utf8") as f:
        json.dump(data, f, ensure_ascii=False, separators=(",", ":"))
    tokenizer = Tokenizer.from_file(args.out)
    for path in sorted(glob.glob(f"{args.corpus}/*.jsonl")):
        tokens = bytes_ = documents = 0
        for text in texts(path):
            encoded = tokenizer.encode(text)
            if documents == 0 and tokenizer.decode(encoded.ids) != text:
                raise SystemExit(f"{path}: the first document does not survive encoding and decoding")
            tokens, bytes_, documents = tokens + len(encoded.ids), bytes_ + len(text.encode()), documents + 1
        print(f"{os.path.basename(path):28s} {documents:7d} documents {bytes_:9d} bytes {tokens:9d} tokens {bytes_ / tokens:.2f} bytes/token")


if __name__ == "__main__":
    main()
