"""What is done to graphs of ONNX files."""

import re
from typing import Any

_SYMBOL = re.compile(r"\bs\d+\b")


def nodes_of(graph: Any) -> list[Any]:
    """All nodes of an ONNX graph, those of branches and loops included."""
    found = []
    for node in graph.node:
        found.append(node)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                found += nodes_of(inner)
    return found


def name_axes(graph: Any) -> None:
    """Call the open axes of the images ``batch``, ``rows`` and ``cols``, not ``s77`` and the like.

    Where sizes go in steps, an axis reads ``16*rows``.
    """
    axes = dict(zip((0, 2, 3), ("batch", "rows", "cols"), strict=True))
    names: dict[str, str] = {}
    for axis, name in axes.items():
        for symbol in _SYMBOL.findall(graph.input[0].type.tensor_type.shape.dim[axis].dim_param):
            names[symbol] = name
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = _SYMBOL.sub(lambda m: names.get(m[0], m[0]), dim.dim_param)
