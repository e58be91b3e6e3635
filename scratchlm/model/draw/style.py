"""What all pictures share: colours for light and dark pages, words for lists of layers, small PNG files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Theme = Literal["light", "dark"]

COLOURS: dict[Theme, dict[str, str]] = {
    "light": {"back": "#ffffff", "ink": "#1f2328", "faint": "#8b929a", "tint": "#f6d3b8", "line": "#dde1e5"},
    "dark": {"back": "#14181d", "ink": "#e4e7ea", "faint": "#808892", "tint": "#5d4530", "line": "#2b323a"},
}
HUES: dict[Theme, tuple[str, ...]] = {
    # Neighbours differ in lightness as well, for grey prints and colour-blind eyes.
    "light": ("#2f6fb4", "#e58a3c", "#3f9b6b", "#b9559b", "#7d6bd0", "#9a8c2f", "#5fa8c9", "#a34b3f"),
    "dark": ("#6cb0f5", "#ffa04d", "#64c291", "#df86c5", "#a796f2", "#cdbf58", "#8fd3ef", "#d9796b"),
}
DPI = 100
PNG_COLOURS = 256
"""A palette makes files less than half as large, and the eye sees no difference in flat drawings."""

MAX_ITEMS = 6


@dataclass(frozen=True)
class Picture:
    """One drawing.

    Attributes:
        name: its file's name without ``.png``.
        heading: what it shows, in a few words.
        caption: how to read it, a sentence or two.
        paint: the figure in the colours of a theme.
    """

    name: str
    heading: str
    caption: str
    paint: Callable[[Theme], Figure]

    def png(self, theme: Theme = "light") -> bytes:
        """The PNG file's content."""
        from PIL import Image  # matplotlib's own dependency

        from scratchlm.evaluate.plots import png_bytes

        with Image.open(BytesIO(png_bytes(self.paint(theme), dpi=DPI))) as image:
            flat = image.convert("RGB").quantize(PNG_COLOURS, dither=Image.Dither.NONE)
        buffer = BytesIO()
        flat.save(buffer, format="PNG", optimize=True)
        return buffer.getvalue()


def new_figure(theme: Theme, width: float, height: float) -> Figure:
    """An empty figure, in inches. Of its own, not pyplot's: no global state, no display, safe in threads."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor=COLOURS[theme]["back"])


def dress(axes: Axes, theme: Theme, title: str = "", *, x: str = "", y: str = "", grid: bool = False) -> None:
    """Give axes the theme's colours, a title at the left and labels."""
    colours = COLOURS[theme]
    axes.set_facecolor(colours["back"])
    axes.set_title(title, fontsize=10, loc="left", color=colours["ink"])
    axes.set_xlabel(x, color=colours["ink"], fontsize=9)
    axes.set_ylabel(y, color=colours["ink"], fontsize=9)
    axes.tick_params(colors=colours["ink"], labelsize=8, which="both")
    for side, spine in axes.spines.items():
        spine.set_color(colours["faint"])
        spine.set_visible(not grid or side in ("left", "bottom"))
    if grid:
        axes.grid(color=colours["faint"], alpha=0.25, linewidth=0.6)


def legend(axes: Axes, theme: Theme, **options: Any) -> None:
    """A legend without a frame, on the page's colour."""
    frame = axes.legend(fontsize=8, labelcolor=COLOURS[theme]["ink"], **options).get_frame()
    frame.set(facecolor=COLOURS[theme]["back"], edgecolor="none", alpha=0.85)


def colour_bar(figure: Figure, image: Any, axes: Any, theme: Theme, label: str) -> None:
    """The scale of a heat map."""
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label(label, color=COLOURS[theme]["ink"], fontsize=8)
    bar.ax.tick_params(colors=COLOURS[theme]["ink"], labelsize=8)
    bar.outline.set_edgecolor(COLOURS[theme]["faint"])


def layers_in_words(layers: Sequence[int]) -> str:
    """``layers 0–2, 5``; of a long list the beginning."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    words = [f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    if len(words) > MAX_ITEMS:
        return f"layers {', '.join(words[: MAX_ITEMS - 2])}, … ({len(layers)} in all)"
    return f"layer{'' if len(layers) == 1 else 's'} {', '.join(words)}"
