"""How plots look, and plots as PNG files, by matplotlib (extra ``report``), without pyplot and without a trace in its settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_chatgpt.errors import ConfigError, SaveError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#3b82c4", "#d97b29", "#3f9f6b", "#9b6fc0", "#b8a02c")
LIMIT_COLOUR = "#d1495b"

_SIZE = (6.4, 3.6)  # inches
_DOTS = 120  # an inch


def check_matplotlib(purpose: str, *, extra: str = "report") -> None:
    """Make sure that plots can be drawn, before the work that they are to show.

    Args:
        purpose: What needs them, for the error.
        extra: What installs matplotlib.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{purpose} needs matplotlib for its plot, which cannot be imported ({error}): pip install 'lightning-chatgpt[{extra}]'"
        ) from None


def styled(settings: Mapping[str, Any] | None = None) -> AbstractContextManager[None]:
    """How all plots look, whatever the user's own matplotlib is set to; and settings of one's own."""
    from matplotlib import style

    own: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, **(settings or {})}
    return style.context(own, after_reset=True)


@contextmanager
def plot(path: Path, *, title: str) -> Iterator[Axes]:
    """Axes to draw on, which are written to a file at the end.

    Args:
        path: The PNG file; its folder is made if it is not there.
        title: Stands above.

    Raises:
        SaveError: The file could not be written.
    """
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=_SIZE, dpi=_DOTS, layout="constrained")
        axes = figure.add_subplot(title=title)
        yield axes
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
        except OSError as error:
            raise SaveError(f"{path}: could not be written ({error.strerror or error}); mend that, and try again") from None
