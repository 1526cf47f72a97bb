"""The API reference: a page per public package, from what it offers and the docstrings of that."""

import inspect
import sys
from collections.abc import Iterator
from enum import Enum
from functools import cache
from importlib import import_module
from typing import Any, get_args, get_type_hints

from sphinx.pycode import ModuleAnalyzer

import tokenconv as tc

PACKAGES = {
    "surgery": "Insert, train, save",
    "blocks": "Blocks",
    "layers": "Layers",
    "ops.depthwise_conv": "The operator",
    "grid": "Grids",
    "costs": "Costs",
    "costs.formulas": "Costs of kinds of convolution",
    "profiling": "Measuring",
    "analysis": "Analysis",
    "deploy": "Exporting",
    "models": "Hybrids as timm architectures",
    "reports": "Reports",
    "errors": "Errors",
}
"""Public packages, and what is in them."""


def pages() -> dict[str, str]:
    """All pages by name, without the end of it."""
    return {"api/index": _index(), **{f"api/{package}": _page(package) for package in PACKAGES}}


@cache
def offered(package: str) -> dict[str, Any]:
    """What a package offers: its ``__all__``, or the public classes and functions it defines."""
    module = import_module(f"tokenconv.{package}")
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]
    values = {name: getattr(module, name) for name in names}
    if package == "models":  # an entrypoint per hybrid is what HYBRIDS says
        return {name: v for name, v in values.items() if name not in module.HYBRIDS}
    return values


def _index() -> str:
    top = {id(getattr(tc, name)) for name in tc.__all__}
    parts = [
        f"# API reference\n\nMade from docstrings. `import tokenconv as tc` gives the "
        f"{len(tc.__all__)} names of this page; what a package offers besides is on its own page.",
        "\n".join(
            [
                "```{toctree}",
                ":hidden:",
                "",
                *(f"{title} <{name}>" for name, title in PACKAGES.items()),
                "```",
            ]
        ),
    ]
    for package, title in PACKAGES.items():
        names = {name: value for name, value in offered(package).items() if id(value) in top}
        if names:
            parts.append(f"## {title}\n\n{_table(package, names)}")
    return "\n\n".join(parts) + "\n"


def _page(package: str) -> str:
    values = offered(package)
    parts = [
        f"# tokenconv.{package}",
        f"```{{eval-rst}}\n.. automodule:: tokenconv.{package}\n   :no-members:\n```",
        _table(package, values),
    ]
    parts += [
        _entry(value, _full_name(package, name, value), _about(package, name, value))
        for name, value in values.items()
        if not inspect.ismodule(value)
    ]
    if types := [kind for kind, home in _types().items() if home == package]:
        parts.append("## Types of arguments and results")
        parts += [_entry(kind, f"{kind.__module__}.{kind.__qualname__}") for kind in types]
    return "\n\n".join(parts) + "\n"


@cache
def _types() -> dict[type, str]:
    """Classes of ours that signatures name and no package offers, by the first that needs them."""
    known = {value for p in PACKAGES for value in offered(p).values() if inspect.isclass(value)}
    found: dict[type, str] = {}
    for package in PACKAGES:
        todo = [*offered(package).values()]
        while todo:
            for kind in _named(todo.pop()):
                if kind not in known and kind not in found:
                    found[kind] = package
                    todo.append(kind)
    return found


def _named(value: Any) -> Iterator[type]:
    """Classes of ours in the annotations of a function, or of a class and its public methods."""
    owners = [value] if inspect.isroutine(value) or inspect.isclass(value) else []
    if inspect.isclass(value):
        methods = {k: v for k, v in vars(value).items() if not k.startswith("_")}
        functions = [getattr(v, "fget", v) for v in methods.values()]
        owners += [f for f in [value.__init__, *functions] if inspect.isfunction(f)]
    todo = [hint for owner in owners for hint in get_type_hints(owner).values()]
    while todo:
        hint = todo.pop()
        todo += get_args(hint)
        if inspect.isclass(hint) and hint.__module__.startswith("tokenconv."):
            yield hint


def _table(package: str, values: dict[str, Any]) -> str:
    """Names with links, and the first sentence about each."""
    rows = ["| | |", "| --- | --- |"]
    for name, value in sorted(values.items()):
        target = _full_name(package, name, value)
        about = _about(package, name, value).partition("\n\n")[0].replace("|", "\\|")
        shown = " ".join(about.split()).replace("``", "`")
        rows.append(f"| {{py:obj}}`{name} <{target}>` | {shown} |")
    return "\n".join(rows)


def _entry(value: Any, name: str, about: str = "") -> str:
    """A directive that documents something; ``about`` is only needed where it is data."""
    if inspect.isroutine(value):
        directive = f".. autofunction:: {name}"
    elif inspect.isclass(value):
        kind = "exception" if issubclass(value, Exception) else "class"
        bases = "" if issubclass(value, Enum) else "\n   :show-inheritance:"
        directive = f".. auto{kind}:: {name}\n   :members:{bases}"
    else:
        module, _, last = name.rpartition(".")
        about = about.replace("\n", "\n   ")
        directive = f".. py:currentmodule:: {module}\n\n.. py:data:: {last}\n\n   {about}"
    return f"```{{eval-rst}}\n{directive}\n```"


def _full_name(package: str, name: str, value: Any) -> str:
    """The shortest name by which it can be imported."""
    if inspect.ismodule(value):
        return value.__name__
    return (
        f"tokenconv.{name}" if getattr(tc, name, None) is value else f"tokenconv.{package}.{name}"
    )


def _about(package: str, name: str, value: Any) -> str:
    """A docstring; that of data stands below it, in the module that defines it."""
    if inspect.isroutine(value) or inspect.isclass(value) or inspect.ismodule(value):
        return inspect.getdoc(value) or ""
    for module in [key for key in sys.modules if key.startswith(f"tokenconv.{package}")]:
        found = ModuleAnalyzer.for_module(module).find_attr_docs().get(("", name))
        if found and getattr(sys.modules[module], name) is value:
            return "\n".join(found).strip()
    raise LookupError(f"tokenconv.{package}.{name} has no docstring")
