# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Draws docs/figures/architecture.svg, the rooms of the package and the imports between them, from the source.

``python docs/draw_architecture.py`` writes the picture; with ``--check`` it fails if the picture is not up to date.
Rooms are ordered by the number of rooms that they import, directly or not. An arrow leads from a room to one that it
imports.
"""

import argparse
import pathlib
import sys
import textwrap

import grimp

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = "numpyro_natgrad"
PICTURE = ROOT / "docs" / "figures" / "architecture.svg"
#: Okabe and Ito's palette, which is safe for colour blindness, and wine from Tol's.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#666666", "#000000", "#882255")
LEFT, WIDTH, GAP, LINE, TOP, ARC = 12, 430, 20, 17, 14, 30
CHARACTERS = 62

Imports = set[tuple[str, str]]


def rooms() -> tuple[dict[str, list[str]], Imports]:
    """The rooms from the highest to the lowest, each with its modules, and the pairs (room, imported room)."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    modules: dict[str, list[str]] = {}
    imports: Imports = set()
    for module in sorted(graph.modules):
        room, *inside = module.split(".")[1:] or [""]
        if room:
            leaf = inside and not graph.find_children(module)
            modules.setdefault(room, []).extend(["/".join(inside)] if leaf else [])
            for imported in graph.find_modules_directly_imported_by(module):
                other = (imported.split(".")[1:] or [""])[0]
                imports |= {(room, other)} if other not in ("", room) else set()
    return {room: modules[room] for room in sorted(modules, key=lambda r: (-len(_below(r, imports)), r))}, imports


def _below(room: str, imports: Imports) -> set[str]:
    direct = {other for upper, other in imports if upper == room}
    return direct.union(*(_below(other, imports) for other in direct))


def picture() -> str:
    """The picture, as SVG."""
    modules, imports = rooms()
    boxes, y = {}, TOP
    for room, names in modules.items():
        lines = textwrap.wrap(", ".join(names), CHARACTERS)
        height = 30 + LINE * len(lines)
        boxes[room] = (y, height, lines)
        y += height + GAP
    order = list(boxes)
    reach = LEFT + WIDTH + ARC * len(order) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{reach}" height="{y - GAP + TOP}" font-family="sans-serif">',
        "<title>The rooms of numpyro_natgrad and the imports between them</title>",
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for room in reversed(order):
        lower = sorted((other for upper, other in imports if upper == room), key=order.index)
        parts += [_arrow(room, other, order, boxes) for other in lower]
    for room, (top, height, lines) in boxes.items():
        parts.append(
            f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{height}" rx="6" fill="#f6f6f6" '
            f'stroke="{COLOURS[order.index(room)]}" stroke-width="1.5"/>'
        )
        parts.append(f'<text x="{LEFT + 12}" y="{top + 20}" font-size="15" font-weight="bold">{room}</text>')
        parts += [
            f'<text x="{LEFT + 12}" y="{top + 22 + LINE * (i + 1)}" font-size="12" fill="#444">{line}</text>'
            for i, line in enumerate(lines)
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _arrow(room: str, other: str, order: list[str], boxes: dict[str, tuple[int, int, list[str]]]) -> str:
    """An arc at the right of the boxes: it starts in the lower half of one and ends in the upper half of the other."""
    upper, lower = order.index(room), order.index(other)
    x, reach = LEFT + WIDTH, 8 + ARC * (lower - upper)
    start = boxes[room][0] + boxes[room][1] * (0.95 - 0.4 * (lower - upper) / len(order))
    end = boxes[other][0] + boxes[other][1] * (0.08 + 0.95 * (lower - upper - 1) / len(order))
    colour = COLOURS[upper]
    bend = f"C {x + 1.33 * reach:.0f} {start:.0f}, {x + 1.33 * reach:.0f} {end:.0f}, {x + 9} {end:.0f}"
    return (
        f'<path d="M {x} {start:.0f} {bend}" fill="none" stroke="{colour}" stroke-width="1.8"/>'
        f'<path d="M {x + 1} {end:.0f} l 10 -5 l 0 10 z" fill="{colour}"/>'
    )


def main() -> None:
    """Write or check the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the picture is not up to date")
    drawn = picture()
    if not parser.parse_args().check:
        PICTURE.write_text(drawn)
    elif not PICTURE.exists() or PICTURE.read_text() != drawn:
        sys.exit(f"`{PICTURE.relative_to(ROOT)}` is not up to date. Run `python docs/draw_architecture.py`.")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
