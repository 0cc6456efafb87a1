#!/usr/bin/env python3
"""The curve of a training run as a picture: python3 loss_curve.py DIR/training/log.jsonl curve.svg

Grey: training loss (mean of ten steps); colours: loss on held-out text of every domain.
"""
import json
import pathlib
import sys

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 380, 46, 14, 110, 34
COLOURS = ["#0b5fa5", "#c94a0a", "#0a8f6a", "#a87a12", "#7b4fb0", "#b0305c", "#4a7a1a", "#555555"]

# A run that was resumed wrote some steps twice: the later one is part of it.
steps = {row["step"]: row for row in map(json.loads, open(sys.argv[1]))}
last = max(steps)
held_out = {}
for step, row in sorted(steps.items()):
    for name, loss in row["figures"].items():
        if name.startswith("val_loss/"):
            held_out.setdefault(name.split("/")[1], []).append((step, loss))
losses = [(step, sum(steps[s]["loss"] for s in range(step - 9, step + 1)) / 10) for step in range(10, last + 1, 10)]
top = max(loss for _, loss in losses)


def x(step):
    return LEFT + (WIDTH - LEFT - RIGHT) * step / last


def y(loss):
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (loss - 1.5) / (top - 1.5))


def line(points, colour, width):
    path = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


svg = [
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
    f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
]
for loss in range(2, int(top) + 1):
    svg.append(f'<path d="M{LEFT} {y(loss):.1f}H{WIDTH - RIGHT}" stroke="#e4e4e0"/>')
    svg.append(f'<text x="{LEFT - 8}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss}</text>')
for step in range(0, last + 1, 200):
    svg.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 14}" text-anchor="middle">{step}</text>')
svg.append(line(losses, "#aaaaaa", 1.5))
below = 0.0
for (name, points), colour in zip(sorted(held_out.items(), key=lambda d: -d[1][-1][1]), COLOURS):
    svg.append(line(points, colour, 2))
    # Names keep a line's distance.
    below = max(y(points[-1][1]) + 4, below + 13)
    svg.append(f'<text x="{WIDTH - RIGHT + 6}" y="{below:.1f}" fill="{colour}">{name} {points[-1][1]:.2f}</text>')
svg.append("</svg>\n")
pathlib.Path(sys.argv[2]).write_text("\n".join(svg))
