"""Graphs in which linears that read the same input are one operator: a call costs what a small product costs."""

from collections import defaultdict
from itertools import accumulate

import torch
from torch.fx import Graph, Node


def join(graph: Graph) -> None:
    """Put one `qexport::linears` in place of all `qexport::linear` of the same input, where nothing is written to.

    All of them read that input and modules' numbers, which a graph is given, so the first one's place is early enough.
    """
    readers: dict[Node, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_function" and node.target is torch.ops.qexport.linear.default:
            readers[node.args[0]].append(node)
    for x, found in readers.items():
        if len(found) > 1:
            _joined(graph, x, found)


def _joined(graph: Graph, x: Node, linears: list[Node]) -> None:
    """One node for several; what each gave is a part of what it gives, which costs nothing in a compiled graph."""
    _, numbers, ns = zip(*(node.args for node in linears), strict=True)
    for number in numbers:
        if number.op == "get_attr":
            linears[0].prepend(number)
    ends = list(accumulate(ns, initial=0))
    with graph.inserting_before(linears[0]):
        whole = graph.call_function(torch.ops.qexport.linears.default, (x, list(numbers), ends[-1]))
        value = linears[0].meta["val"]
        whole.meta["val"] = value.new_empty(*value.shape[:-1], ends[-1])
        for node, start, stop in zip(linears, ends[:-1], ends[1:], strict=True):
            part = graph.call_function(torch.ops.aten.slice.Tensor, (whole, -1, start, stop))
            part.meta = dict(node.meta) | {"val": whole.meta["val"][..., start:stop]}
            node.replace_all_uses_with(part)
    for node in linears:
        graph.erase_node(node)
