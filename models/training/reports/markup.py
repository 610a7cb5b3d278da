"""HTML and SVG by function calls. Text is escaped unless it is `Markup` already, so that a file's or class's name cannot become markup."""

import html
from collections.abc import Iterable

VOID = frozenset({"img", "meta"})


class Markup(str):
    """Text that is markup."""

    __slots__ = ()


Child = str | int | float | None


def element(tag: str, *children: Child, **attributes: Child) -> Markup:
    """`element("td", "a < b", class_="num")`. Children and attributes that are None are left out; `_` in a name becomes `-`."""
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{given}>" if tag in VOID else f"<{tag}{given}>{join(children)}</{tag}>")


def join(children: Iterable[Child]) -> Markup:
    return Markup("".join(c if isinstance(c, Markup) else html.escape(str(c)) for c in children if c is not None))


def table(head: Iterable[Child], rows: Iterable[Iterable[Child]]) -> Markup:
    """Cells that begin with a digit are set as numbers."""
    body = (element("tr", *(_cell(value) for value in row)) for row in rows)
    return element(
        "div",
        element(
            "table",
            element("thead", element("tr", *(element("th", h) for h in head))),
            element("tbody", *body),
        ),
        class_="scroll",
    )


def _cell(value: Child) -> Markup:
    number = not isinstance(value, Markup) and str(value)[:1].isdigit()
    return element("td", value, class_="number" if number else None)
