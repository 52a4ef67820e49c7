"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def show(title: str, rows: Sequence[Sequence[str]], note: str = "") -> None:
    """Print a table whose first row is the header, with rich where it is installed."""
    header, *body = rows
    print()
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        print(title)
        for first, *others in (header, ["-" * width for width in widths], *body):
            cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
            print("  ".join([first.ljust(widths[0]), *cells]).rstrip())
        if note:
            print(note)
        return
    drawn = Table(title=title, title_justify="left", caption=note or None, caption_justify="left")
    for index, column in enumerate(header):
        drawn.add_column(column, justify="right" if index else "left")
    for row in body:
        drawn.add_row(*row)
    Console().print(drawn)


def size(count: int | None) -> str:
    """Bytes as text; nothing where there are none to tell."""
    if count is None:
        return ""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    value, unit = (count / 1e6, "MB") if count >= 1e6 else (count / 1e3, "kB")
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def times(before: int | None, after: int | None) -> str:
    """How often `after` fits into `before`."""
    if not before or not after:
        return ""
    return f"{before / after:.0f}x" if before >= 10 * after else f"{before / after:.2f}x"
