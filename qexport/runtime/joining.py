"""Graphs in which linears that read the same input are one operator: a call costs what a small product costs."""

import operator
from collections import defaultdict

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
    """One node for several, and what takes the result of each out of it."""
    _, numbers, ns = zip(*(node.args for node in linears), strict=True)
    for number in numbers:
        if number.op == "get_attr":
            linears[0].prepend(number)
    with graph.inserting_before(linears[0]):
        whole = graph.call_function(torch.ops.qexport.linears.default, (x, list(numbers), list(ns)))
        whole.meta["val"] = [node.meta["val"] for node in linears]
        for i, node in enumerate(linears):
            part = graph.call_function(operator.getitem, (whole, i))
            part.meta = dict(node.meta)
            node.replace_all_uses_with(part)
    for node in linears:
        graph.erase_node(node)
