"""Draws the pictures of docs/concepts.md.

    python docs/draw_concepts.py            # into docs/pictures/

Each function returns one picture, as SVG.
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "pictures"
INK, GREY, PALE = "#1f2933", "#7b8794", "#e4e7eb"
TEAL, ORANGE, BLUE, GREEN = "#0b8a83", "#d9730d", "#2f6fb7", "#3f9142"


def text(x, y, words, size=13, color=INK, anchor="middle", weight="normal"):
    """Words at a place."""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" '
        f'text-anchor="{anchor}" font-weight="{weight}">{words}</text>'
    )


def box(x, y, width, height, fill="white", stroke=INK, radius=3):
    """A rectangle."""
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" '
        f'fill="{fill}" stroke="{stroke}"/>'
    )


def line(x1, y1, x2, y2, color=INK, width=1.5, arrow=False, dashed=False):
    """A straight line, with a head if asked for."""
    head = ' marker-end="url(#head)"' if arrow else ""
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    return (
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{color}" '
        f'stroke-width="{width}"{dash}{head}/>'
    )


def picture(width, height, title, parts):
    """A whole SVG file, on white: pages may be dark."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'font-family="sans-serif" role="img">',
            f"<title>{title}</title>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" '
            'markerWidth="10" markerHeight="10" markerUnits="userSpaceOnUse" '
            'orient="auto">'
            f'<path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *parts,
            "</svg>\n",
        ]
    )


def blocks():
    """A document of 20 tokens, with three blocks of two rollouts each."""
    cell, left, top = 32, 30, 62
    length, context, stride, generated = 20, 4, 6, 4
    parts = [text(left, 30, "one document, read once", 15, anchor="start")]
    for token in range(length):
        parts.append(box(left + token * cell, top, cell - 4, 28, PALE, GREY))
        parts.append(text(left + token * cell + 14, top + 19, token, 12, GREY))
    for block in range(3):
        anchor = context + block * stride
        x, y = left + anchor * cell, top + 60 + block * 88
        parts.append(line(x - 2, top - 10, x - 2, y + 56, TEAL, 1.5, dashed=True))
        parts.append(text(x - 2, top - 16, f"anchor {anchor}", 12, TEAL))
        seen = f"block {block} sees tokens 0 to {anchor - 1}"
        parts.append(text(x, y + 74, seen, 12, GREY, anchor="start"))
        for sample in range(2):
            for step in range(generated):
                place = x + step * cell
                parts.append(box(place, y + 30 * sample, cell - 4, 24, "white", ORANGE))
        for step in range(generated):
            place = left + (anchor + step) * cell
            parts.append(box(place, top, cell - 4, 28, "none", BLUE))
    legend = 398
    parts += [
        box(left, legend, 20, 16, "white", BLUE),
        text(left + 28, legend + 13, "true continuation", 13, anchor="start"),
        box(left + 180, legend, 20, 16, "white", ORANGE),
        text(left + 208, legend + 13, "rollouts, n for each block", 13, anchor="start"),
    ]
    return picture(760, 428, "Blocks of a document", parts)


def step():
    """What happens in one step, and where the gradient goes."""

    def stage(x, y, head, below, color):
        return [
            box(x, y, 150, 62, "white", color, 8),
            text(x + 75, y + 26, head, 14, color, weight="bold"),
            text(x + 75, y + 46, below, 12, GREY),
        ]

    parts = [
        *stage(20, 30, "documents", "[B, T]", INK),
        *stage(210, 30, "policy reads", "keys and values", TEAL),
        *stage(400, 30, "rollouts", "[B, n, K, G]", ORANGE),
        *stage(210, 150, "frozen network", "hidden states", BLUE),
        *stage(400, 150, "features", "rollouts and truth", BLUE),
        *stage(590, 150, "rewards", "alignment, diversity", GREEN),
        *stage(590, 270, "advantages", "less a baseline", GREEN),
        *stage(210, 270, "policy scores", "log-probabilities", TEAL),
        *stage(400, 270, "loss", "and its gradient", TEAL),
        line(170, 61, 206, 61, arrow=True),
        line(360, 61, 396, 61, arrow=True),
        line(95, 92, 95, 181),
        line(95, 181, 206, 181, arrow=True),
        line(475, 92, 475, 121),
        line(475, 121, 285, 121),
        line(285, 121, 285, 146, arrow=True),
        line(360, 181, 396, 181, arrow=True),
        line(550, 181, 586, 181, arrow=True),
        line(665, 212, 665, 266, arrow=True),
        line(590, 301, 554, 301, arrow=True),
        line(360, 301, 396, 301, arrow=True),
        line(210, 310, 190, 310, TEAL),
        line(190, 310, 190, 75, TEAL),
        line(190, 75, 206, 75, TEAL, arrow=True),
        text(182, 250, "the same reading", 12, TEAL, "end"),
        text(475, 356, "the gradient reaches the policy alone", 12, GREY),
    ]
    return picture(760, 372, "One training step", parts)


def rewards():
    """Features of a block, as they are and whitened."""

    def panel(x, head, arrows, words):
        found = [text(x + 150, 30, head, 15)]
        found.append(
            f'<circle cx="{x + 150}" cy="170" r="110" fill="none" stroke="{PALE}"/>'
        )
        for dx, dy, color, name in arrows:
            end = x + 150 + 110 * dx, 170 - 110 * dy
            found.append(line(x + 150, 170, *end, color, 2.5, arrow=True))
            tip = x + 150 + 132 * dx, 174 - 126 * dy
            found.append(text(*tip, name, 13, color, weight="bold"))
        for number, row in enumerate(words):
            found.append(text(x + 150, 316 + 19 * number, row, 13, GREY))
        return found

    near = [
        (0.5, 0.866, BLUE, "φ*"),
        (0.643, 0.766, ORANGE, "φ1"),
        (0.766, 0.643, ORANGE, "φ2"),
    ]
    apart = [(0.5, 0.866, BLUE, "φ*"), (0, 1, ORANGE, "φ1"), (1, 0, ORANGE, "φ2")]
    parts = [
        *panel(
            20,
            "without whitening",
            near,
            ("alignments 1.97 and 1.88,", "diversity 1.97"),
        ),
        *panel(
            360,
            "whitened by the block's rollouts",
            apart,
            ("alignments 1.73 and 1.00,", "diversity 0"),
        ),
    ]
    return picture(700, 350, "Features of rollouts and of the truth", parts)


PICTURES = {"blocks.svg": blocks, "step.svg": step, "rewards.svg": rewards}


def main(folder=FOLDER):
    """Writes all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        (folder / name).write_text(draw(), "utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
