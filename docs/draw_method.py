"""Draws the picture of the method: `python docs/draw_method.py` writes docs/images/method.svg and method.png."""

from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

FOLDER = Path(__file__).parent / "images"
WIDTH, HEIGHT = 1080, 560  # of the drawing's coordinates; y points down

INK, SOFT, PAGE = "#1f2937", "#566072", "#ffffff"
TRAINED, TRAINED_FILL = "#c2510a", "#fde5d2"
FROZEN, FROZEN_FILL = "#0b5c94", "#dcebf7"
MADE, MADE_FILL = "#566072", "#eef1f5"
PASSED_BY = "#c5ccd6"  # the way of an expert that the gate leaves out
Style = tuple[str, str]
TRAINED_STYLE, FROZEN_STYLE, MADE_STYLE = (TRAINED, TRAINED_FILL), (FROZEN, FROZEN_FILL), (MADE, MADE_FILL)


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, style: Style, size: float = 11) -> None:
    """A rounded box from its upper left corner, its text in the middle."""
    edge, fill = style
    shape = FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=8", edgecolor=edge, facecolor=fill, lw=1.6)
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=INK, linespacing=1.45)


def arrow(axes: Axes, *points: tuple[float, float], color: str = SOFT) -> None:
    """A line through points that ends in a head."""
    for start, end in pairwise(points[:-1]):
        axes.plot(*zip(start, end, strict=True), color=color, lw=1.6, solid_capstyle="round")
    axes.add_patch(
        FancyArrowPatch(
            points[-2], points[-1], arrowstyle="-|>", mutation_scale=13, color=color, lw=1.6, shrinkA=0, shrinkB=0
        )
    )


def cells(axes: Axes, x: float, y: float, count: int, style: Style, width: float = 22, height: float = 40) -> float:
    """A row of vectors, each a cell; returns where it ends."""
    edge, fill = style
    for index in range(count):
        axes.add_patch(Rectangle((x + index * width, y), width - 4, height, edgecolor=edge, facecolor=fill, lw=1.4))
    return x + count * width - 4


def note(axes: Axes, x: float, y: float, text: str, size: float = 10.5, color: str = SOFT, ha: str = "center") -> None:
    axes.text(x, y, text, ha=ha, va="center", fontsize=size, color=color, linespacing=1.4)


def draw() -> Figure:
    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), facecolor=PAGE)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    axes.axis("off")

    # The router's way, along the top.
    box(axes, 30, 96, 150, 62, "mean embedding\n" r"$\bar{x}$  $(H)$", MADE_STYLE)
    arrow(axes, (180, 127), (222, 127))
    box(axes, 222, 96, 150, 62, "router\n" r"$\mathrm{softmax}(W\bar{x}+b)$", TRAINED_STYLE)
    arrow(axes, (372, 127), (414, 127))
    box(axes, 414, 96, 150, 62, "gate  $g$  $(N)$\nkeeps the largest", MADE_STYLE)

    # The expert factors, each by its part of the gate, and the shared one.
    note(axes, 717, 28, "expert factors", color=INK)
    for name, y, weight in (("1", 46, "0"), ("2", 108, "0.9"), ("N", 182, "0")):
        kept, middle = weight != "0", y + 19.0
        arrow(axes, (564, 127), (664, middle), color=TRAINED if kept else PASSED_BY)
        value = axes.text(616, (127 + middle) / 2, f"$g_{{{name}}} = {weight}$", ha="center", va="center", fontsize=10)
        value.set(color=INK if kept else SOFT, bbox={"facecolor": PAGE, "edgecolor": "none", "pad": 1.5})
        box(axes, 664, y, 106, 38, f"$A_{{{name}}}$  $(T \\times R)$", TRAINED_STYLE)
        arrow(axes, (770, middle), (824, 127), color=TRAINED if kept else PASSED_BY)
    note(axes, 717, 164, "⋮", 15, INK)
    note(axes, 837, 127, "Σ", 17, INK)
    arrow(axes, (850, 127), (878, 127))
    note(axes, 890, 127, "×", 17, INK)
    arrow(axes, (930, 127), (902, 127))
    box(axes, 930, 96, 120, 62, "shared  $B$\n" r"$(R \times H)$", TRAINED_STYLE)

    # Down to the soft prompt, which stands before the input's embeddings.
    arrow(axes, (890, 140), (890, 252), (328, 252), (328, 291))
    note(axes, 609, 238, r"soft prompt  $P$  $(T \times H)$, composed for this input", 12, INK)
    end = cells(axes, 222.0, 300, 10, MADE_STYLE)
    note(axes, (222 + end) / 2, 366, r"$P_1$ … $P_T$,  $T$ virtual tokens")
    begin = end + 8
    end = cells(axes, begin, 300, 8, FROZEN_STYLE)
    note(axes, (begin + end) / 2, 366, "$E(x_1)$ … $E(x_L)$")
    frame = FancyBboxPatch((214, 292), end - 206, 56, "round,pad=0,rounding_size=6", edgecolor=SOFT, facecolor="none")
    frame.set(linewidth=1, linestyle="--")
    axes.add_patch(frame)

    # The input, which goes to the router and to the model.
    box(axes, 30, 289, 150, 62, "input tokens\n$x_1$ … $x_L$", MADE_STYLE)
    arrow(axes, (105, 289), (105, 158))
    note(axes, 116, 222, "frozen\nembedding $E$", color=FROZEN, ha="left")
    middle = (begin + end) / 2
    arrow(axes, (105, 351), (105, 408), (middle, 408), (middle, 382))
    note(axes, (105 + middle) / 2, 396, "frozen embedding $E$", color=FROZEN)

    # The frozen model reads prompt and input, and answers.
    arrow(axes, (end + 8, 320), (688, 320))
    box(axes, 688, 276, 198, 88, "frozen language model\nreads  $[\\,P\\,;\\,E(x)\\,]$", FROZEN_STYLE)
    arrow(axes, (886, 320), (930, 320))
    box(axes, 930, 289, 120, 62, "answer", MADE_STYLE)

    # Formula and legend.
    axes.plot([30, 1050], [446, 446], color="#d9dee6", lw=1)
    note(axes, 30, 500, r"$P = \left(\Sigma_i\; g_i A_i\right) B$", 21, INK, "left")
    for x, style, text in (
        (330, TRAINED_STYLE, "trained: $A_1$ … $A_N$, $B$, router"),
        (612, FROZEN_STYLE, "frozen: the base model"),
        (868, MADE_STYLE, "given or computed"),
    ):
        axes.add_patch(Rectangle((x, 490), 22, 20, edgecolor=style[0], facecolor=style[1], lw=1.4))
        note(axes, x + 32, 500, text, 11, INK, "left")
    return figure


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    figure = draw()
    figure.savefig(FOLDER / "method.svg", metadata={"Date": None})
    figure.savefig(FOLDER / "method.png", dpi=200)


if __name__ == "__main__":
    main()
