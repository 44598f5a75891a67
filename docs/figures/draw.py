"""Draws the figures of the pages about kernels, as SVG, beside this file.

    python docs/figures/draw.py

Needs nothing but Python. A test compares what it draws with what is committed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

BLUE, GREEN, ORANGE, GREY, WHITE = "#cfe2f7", "#d2ecd0", "#fbe0bf", "#ececec", "#ffffff"
_STROKE = "#333333"


class Drawing:
    """Shapes on a white sheet, in pixels from the upper left corner."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="sans-serif" role="img">\n'
            f"<title>{escape(title)}</title>\n"
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{_STROKE}"/>'
            "</marker></defs>\n"
            f'<rect width="{width}" height="{height}" fill="{WHITE}"/>'
        )
        self._shapes: list[str] = []

    def text(self, x: float, y: float, *lines: str, size: int = 12, anchor: str = "middle") -> None:
        """Lines of text below one another, the first one's baseline at `y`."""
        for i, line in enumerate(lines):
            self._shapes.append(
                f'<text x="{x:g}" y="{y + 15 * i:g}" font-size="{size}" fill="#111111" '
                f'text-anchor="{anchor}">{escape(line)}</text>'
            )

    def box(self, x: float, y: float, w: float, h: float, fill: str, *lines: str) -> None:
        """A rectangle with lines of text in its middle."""
        self._shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}" '
            f'stroke="{_STROKE}"/>'
        )
        self.text(x + w / 2, y + h / 2 + 4 - 7.5 * (len(lines) - 1), *lines)

    def grid(self, x: float, y: float, cell: float, rows: int, columns: int, fill: str) -> None:
        """Cells of a matrix."""
        for row in range(rows):
            for column in range(columns):
                self.box(x + column * cell, y + row * cell, cell, cell, fill)

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        """A line through the points, with a tip at the last one."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self._shapes.append(
            f'<polyline points="{path}" fill="none" stroke="{_STROKE}" stroke-width="1.4"{dash} '
            'marker-end="url(#tip)"/>'
        )

    def __str__(self) -> str:
        return "\n".join([self._head, *self._shapes, "</svg>\n"])


def implicit_gemm() -> Drawing:
    """A convolution as a product of matrices of which the left one is never stored."""
    d = Drawing(760, 330, "A convolution as a product of matrices, tile by tile")
    d.text(100, 24, "x, channels last", size=14)
    d.grid(25, 40, 19, 8, 8, GREY)
    d.grid(63, 78, 19, 3, 3, BLUE)
    d.text(100, 212, "the 3×3 window of", "one output pixel")
    d.arrow((182, 106), (236, 106))
    d.text(209, 98, "gather", size=11)

    d.text(320, 24, "rows: output pixels", size=14)
    d.box(240, 40, 170, 200, GREY)
    d.box(240, 90, 170, 60, BLUE)
    d.box(285, 90, 45, 60, ORANGE, "step")
    d.text(325, 258, "columns: taps × channels,", "read where they lie in x")

    d.text(500, 24, "weights", size=14)
    d.box(445, 40, 110, 170, GREY)
    d.box(480, 40, 40, 170, BLUE)
    d.box(480, 85, 40, 45, ORANGE, "step")
    d.text(500, 228, "taps × channels", "to output channels")
    d.text(427, 126, "×", size=20)

    d.text(660, 24, "result", size=14)
    d.box(600, 40, 120, 200, GREY)
    d.box(636, 90, 44, 60, GREEN, "tile")
    d.text(577, 126, "=", size=20)
    d.text(648, 262, "summed in registers, fp32", anchor="end")
    d.box(290, 290, 450, 32, ORANGE, "(sum − mean) · scale + shift, + residual, ReLU, one rounding")
    d.arrow((658, 150), (658, 290))
    return d


def persistent_block() -> Drawing:
    """What the warps of a block for sm_90a do at one time."""
    d = Drawing(
        800, 330, "A persistent block: copies run ahead of products, results are stored behind"
    )
    rows = {
        "warp 0: copies x and weights": 40,
        "warp 1: scale and shift": 88,
        "consumers: products": 136,
        "consumers: epilogue": 184,
        "warp 2: residual in, result out": 232,
    }
    for name, y in rows.items():
        d.text(205, y + 22, name, anchor="end")
    left, step = 220, 44
    names = ["a0", "a1", "a2", "a3", "b0", "b1", "b2", "b3", "c0", "c1"]
    for i, name in enumerate(names):
        d.box(left + step * i, 40, step, 34, BLUE if name[0] != "b" else GREEN, name)
    for i, name in enumerate(names[:8]):
        shift = 2 if name[0] == "a" else 3
        fill = BLUE if name[0] == "a" else GREEN
        d.box(left + step * (i + shift), 136, step, 34, fill, name)
    d.box(left, 88, 70, 34, BLUE, "tile a")
    d.box(left + step * 4, 88, 70, 34, GREEN, "tile b")
    d.box(left + step * 6, 184, step, 34, BLUE, "a")
    d.box(left + step * 11, 184, step, 34, GREEN, "b")
    d.box(left + step * 2, 232, step * 2, 34, BLUE, "residual a")
    d.box(left + step * 7, 232, step * 2, 34, BLUE, "result a")
    d.arrow((left + step / 2, 74), (left + step * 2.5, 136), dashed=True)
    d.arrow((left + step * 6, 170), (left + step * 6.5, 184))
    d.arrow((left + step * 6.9, 218), (left + step * 7.4, 232))
    d.arrow((left, 290), (left + step * 12, 290))
    d.text(
        left + step * 6, 308, "time; a0: step 0 of the K loop of tile a, one stage of the pipeline"
    )
    d.text(left + step * 6, 24, "copies of tile b begin while tile a is multiplied", size=14)
    return d


def winograd() -> Drawing:
    """F(2×2, 3×3): 16 products for a tile that takes 36."""
    d = Drawing(800, 300, "Winograd's F(2×2, 3×3)")
    d.text(70, 24, "x: 4×4 pixels", size=14)
    d.grid(30, 40, 20, 4, 4, BLUE)
    d.arrow((115, 80), (190, 80))
    d.text(152, 70, "Bᵀ d B")
    d.text(152, 98, "additions", size=11)
    d.text(235, 24, "V", size=14)
    d.grid(195, 40, 20, 4, 4, BLUE)

    d.text(70, 168, "weight: 3×3", size=14)
    d.grid(40, 182, 20, 3, 3, ORANGE)
    d.arrow((105, 212), (190, 212))
    d.text(148, 202, "G g Gᵀ")
    d.text(148, 230, "once", size=11)
    d.text(235, 158, "U", size=14)
    d.grid(195, 172, 20, 4, 4, ORANGE)

    d.arrow((280, 80), (350, 130))
    d.arrow((280, 212), (350, 160))
    d.box(
        350,
        105,
        170,
        80,
        GREEN,
        "16 matrix products,",
        "one a place of the 4×4:",
        "tiles × channels × out",
    )
    d.arrow((520, 145), (570, 145))
    d.text(615, 92, "M", size=14)
    d.grid(575, 105, 20, 4, 4, GREEN)
    d.arrow((660, 145), (722, 145))
    d.text(691, 135, "Aᵀ M A")
    d.text(745, 112, "y: 2×2", size=14)
    d.grid(725, 125, 20, 2, 2, GREEN)
    d.text(
        400, 284, "16 products for four results and one input channel, where the direct sum has 36"
    )
    return d


def block() -> Drawing:
    """Where the results of a bottleneck's layers lie."""
    d = Drawing(800, 400, "Data flow of a bottleneck: module by module, layer by layer, whole")
    d.text(
        20, 24, "every module by itself: each arrow is a tensor in memory", size=14, anchor="start"
    )
    names = ["conv/1×1", "BN", "ReLU", "conv/3×3", "BN", "ReLU", "conv/1×1", "BN", "add", "ReLU"]
    for i, name in enumerate(names):
        d.box(35 + 75 * i, 48, 58, 36, BLUE if "/" in name else GREY, *name.split("/"))
        d.arrow((18 + 75 * i, 66), (35 + 75 * i, 66))
    d.arrow((768, 66), (790, 66))
    d.arrow((26, 66), (26, 104), (664, 104), (664, 84), dashed=True)

    d.text(
        20,
        150,
        "an op for each layer: statistics, residual and ReLU are applied to sums in registers",
        size=14,
        anchor="start",
    )
    layers = ["conv 1×1, BN, ReLU", "conv 3×3, BN, ReLU", "conv 1×1, BN, + x, ReLU"]
    for i, name in enumerate(layers):
        d.box(60 + 235 * i, 172, 190, 40, GREEN, name)
        d.arrow((20 if i == 0 else 15 + 235 * i, 192), (60 + 235 * i, 192))
    d.arrow((720, 192), (770, 192))
    d.arrow((36, 192), (36, 236), (625, 236), (625, 212), dashed=True)

    d.text(
        20,
        282,
        "one kernel, for few inner channels on a GPU: both intermediates lie in shared memory",
        size=14,
        anchor="start",
    )
    d.box(60, 300, 660, 74, ORANGE)
    for i, name in enumerate(
        ("conv 1×1, BN, ReLU", "conv 3×3, BN, ReLU", "conv 1×1, BN, + x, ReLU")
    ):
        d.box(75 + 220 * i, 317, 180, 40, GREEN, name)
        if i:
            d.arrow((35 + 220 * i, 337), (75 + 220 * i, 337))
    d.arrow((20, 337), (75, 337))
    d.arrow((695, 337), (770, 337))
    d.arrow((36, 337), (36, 390), (600, 390), (600, 357), dashed=True)
    return d


FIGURES: dict[str, Callable[[], Drawing]] = {
    "implicit_gemm": implicit_gemm,
    "persistent_block": persistent_block,
    "winograd": winograd,
    "block": block,
}


def main() -> None:
    """Writes every figure."""
    for name, draw in FIGURES.items():
        Path(__file__).with_name(f"{name}.svg").write_text(str(draw()), encoding="utf-8")


if __name__ == "__main__":
    main()
