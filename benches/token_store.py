"""A token store as `occult pretrain` and `occult tune` read it, written from token ids."""
import json
import struct


def write_store(path, rows):
    """One document per row: without shuffling rows keep their order."""
    path.mkdir()
    tokens, documents, end = bytearray(), bytearray(), 0
    for i, row in enumerate(rows):
        tokens += struct.pack(f"<{len(row)}I", *row)
        end += len(row)
        documents += struct.pack("<QII", end, 0, i)
    (path / "tokens.bin").write_bytes(tokens)
    (path / "documents.bin").write_bytes(documents)
    head = {"version": 1, "tokens": end, "documents": len(rows), "description": "benches/token_store.py"}
    (path / "store.json").write_text(json.dumps(head))
