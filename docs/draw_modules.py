"""Draw images/modules.svg: the modules of the package, level by level, and their imports.

Run it when a module or an import changes: python docs/draw_modules.py
"""

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).parent
CHARACTER, HEIGHT, GAP, BETWEEN_LEVELS = 7.3, 24, 14, 32  # in pixels, with a font of 12
BLUE, GRAY = "#41689c", "#8a8a8a"  # readable on white and on black

# A node is a module, or the point at which the line from one module to another crosses a level: (from, to, level).
Node = str | tuple[str, str, int]


def reachable(module: str, imports: Mapping[str, Collection[str]]) -> set[str]:
    """All that a module imports, itself or through others."""
    return set(imports[module]).union(*(reachable(other, imports) for other in imports[module]))


def without_shortcuts(imports: Mapping[str, Collection[str]]) -> dict[str, list[str]]:
    """The imports that no chain of other imports implies."""
    return {
        module: sorted(set(direct).difference(*(reachable(other, imports) for other in direct)))
        for module, direct in imports.items()
    }


def width(node: Node) -> float:
    return len(node) * CHARACTER + 12 if isinstance(node, str) else 0


def spread(row: Sequence[Node], wanted: Mapping[Node, float]) -> dict[Node, float]:
    """The positions in a row that are nearest to the wanted ones, in this order and without overlap."""
    # Neighbours that would overlap form a block, which stands where its nodes want to be on average.
    offset, offsets = 0.0, {}
    blocks: list[tuple[float, int]] = []  # of each, where it starts and how many nodes it has
    for before, node in zip([None, *row], row, strict=False):
        offset += 0 if before is None else (width(before) + width(node)) / 2 + GAP
        offsets[node] = offset
        blocks.append((wanted[node] - offset, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (left, many), (right, more) = blocks[-2:]
            blocks[-2:] = [((left * many + right * more) / (many + more), many + more)]
    starts = [start for start, many in blocks for _ in range(many)]
    return {node: start + offsets[node] for node, start in zip(row, starts, strict=True)}


def crossings(rows: Sequence[Sequence[Node]], links: Iterable[tuple[Node, Node]]) -> int:
    """How many pairs of lines cross."""
    position = {node: (level, index) for level, row in enumerate(rows) for index, node in enumerate(row)}
    lines = [(*position[upper], position[lower][1]) for upper, lower in links]
    return sum(a[0] == b[0] and a[1] < b[1] and a[2] > b[2] for a in lines for b in lines)


def arrange(rows: list[list[Node]], links: Sequence[tuple[Node, Node]]) -> dict[Node, float]:
    """The horizontal centre of every node, so that few lines cross and most are short (Sugiyama's method)."""
    neighbors: dict[Node, list[Node]] = {node: [] for row in rows for node in row}
    for upper, lower in links:
        neighbors[upper].append(lower)
        neighbors[lower].append(upper)

    def mean(node: Node, of: Mapping[Node, float]) -> float:
        return sum(of[other] for other in neighbors[node]) / len(neighbors[node]) if neighbors[node] else of[node]

    best: tuple[tuple[int, float], dict[Node, float]] | None = None
    centers = dict.fromkeys(neighbors, 0.0)
    for row in rows:
        centers |= spread(row, centers)
    for sweep in range(60):
        for level in range(len(rows))[:: 1 if sweep % 2 else -1]:  # up and down in turn
            wanted = {node: mean(node, centers) for node in rows[level]}
            rows[level].sort(key=wanted.__getitem__)
            centers |= spread(rows[level], wanted)
        count = crossings(rows, links)
        length = sum(abs(centers[upper] - centers[lower]) for upper, lower in links)
        if best is None or (count, length) < best[0]:
            best = (count, length), dict(centers)
    assert best is not None
    return best[1]


def draw(levels: Sequence[Collection[str]], imports: Mapping[str, Collection[str]]) -> str:
    """An SVG image of modules on their levels, the lowest first, with a line from each to those that it imports."""
    level_of = {module: level for level, modules in enumerate(levels) for module in sorted(modules)}
    rows: list[list[Node]] = [sorted(modules) for modules in levels]
    paths: list[tuple[str, list[Node]]] = []
    for module, others in sorted(without_shortcuts(imports).items()):
        for other in others:
            between = range(level_of[module] - 1, level_of[other], -1)
            bends = [(module, other, level) for level in between]
            for bend in bends:
                rows[bend[2]].append(bend)
            paths.append((module, [*bends, other]))
    centers = arrange(rows, [link for module, nodes in paths for link in pairwise([module, *nodes])])

    left = min(center - width(node) / 2 for node, center in centers.items()) - 1
    total = max(center + width(node) / 2 for node, center in centers.items()) + 1 - left
    top = {module: (len(levels) - 1 - level) * (HEIGHT + BETWEEN_LEVELS) + 1 for module, level in level_of.items()}
    height = (len(levels) - 1) * (HEIGHT + BETWEEN_LEVELS) + HEIGHT + 2
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total:.0f}" height="{height}" viewBox="0 0 {total:.0f} '
        f'{height}" font-family="ui-monospace, Menlo, Consolas, monospace" font-size="12">'
    ]
    for module, nodes in paths:
        x, y = centers[module] - left, top[module] + HEIGHT
        commands = f"M{x:.0f} {y}"
        for node in nodes:
            to = centers[node] - left
            half = y + BETWEEN_LEVELS / 2
            commands += f"C{x:.0f} {half:.0f} {to:.0f} {half:.0f} {to:.0f} {y + BETWEEN_LEVELS}"
            x, y = to, y + BETWEEN_LEVELS
            if node != nodes[-1]:
                commands += f"v{HEIGHT}"
                y += HEIGHT
        lines.append(f'<path d="{commands}" stroke="{GRAY}" stroke-width="1.5" fill="none"/>')
    for module, y in top.items():
        x, w = centers[module] - left, width(module)
        lines.append(f'<rect x="{x - w / 2:.1f}" y="{y}" width="{w:.1f}" height="{HEIGHT}" rx="4" fill="{BLUE}"/>')
        lines.append(f'<text x="{x:.1f}" y="{y + 16}" text-anchor="middle" fill="#ffffff">{module}</text>')
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    sys.path.insert(0, str(HERE.parent / "tests"))
    from test_architecture import LAYERS, imports_of_modules

    (HERE / "images" / "modules.svg").write_text(draw(LAYERS[:-1], imports_of_modules()), encoding="utf-8")


if __name__ == "__main__":
    main()
