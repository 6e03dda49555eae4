"""A network as a chain of modules that run one after the other: where it can be cut."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from fedfreeze.errors import ConfigError, one_line


@dataclass(frozen=True)
class Link:
    """One piece of a chain: takes one tensor, gives one tensor."""

    name: str | None
    """The module's name in the network; None for operations between modules, where no block can begin."""
    module: nn.Module

    @property
    def has_parameters(self) -> bool:
        """Whether there is anything to train in it."""
        return next(self.module.parameters(), None) is not None

    @property
    def has_weights(self) -> bool:
        """Whether it holds more than a normalisation layer's vectors: a place where a block usually begins."""
        return any(parameter.dim() > 1 for parameter in self.module.parameters())


def chain_of(network: nn.Module) -> list[Link]:
    """Return the network as a chain whose links, applied in order, are its forward pass.

    Nested Sequentials are unfolded. Another module's own forward is followed with torch.fx: each module that it calls
    is a link, with the tensor operations between them; where more than one value is alive (a shortcut around several
    modules), all that it spans is one link. Raises ConfigError where the forward cannot be followed.
    """
    if is_plain_sequential(network):
        return [Link(name, module) for name, module in unfold(network)]
    return _links_of_graph(network, _traced(network))


def is_plain_sequential(module: nn.Module) -> bool:
    """Whether a module does nothing but run its children in order."""
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        return False
    return not (module._forward_hooks or module._forward_pre_hooks)


def unfold(network: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a Sequential that run, in order, with nested Sequentials unfolded and their full names."""
    for name, child in network._modules.items():  # not named_children, which leaves out a module that runs twice
        if child is None:
            continue
        if is_plain_sequential(child):
            yield from unfold(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


class _Outline(fx.Tracer):
    """Follows the forward of the network itself and of plain Sequentials in it; any other module is one call."""

    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        return not is_plain_sequential(module)


def _traced(network: nn.Module) -> fx.Graph:
    """Return the graph of a network's own forward. Raises ConfigError."""
    what = f"the forward of {type(network).__name__}"
    training = network.training
    try:
        graphs = []
        for mode in (False, True):
            network.train(mode)
            traced = fx.GraphModule(network, _Outline().trace(network))
            traced.graph.eliminate_dead_code()
            graphs.append(traced.graph)
    except Exception as error:  # whatever the user's code makes of a stand-in for a tensor
        raise ConfigError(
            f"model.factory: {what} cannot be followed ({one_line(error)[:160]}); it may call modules and tensor "
            "operations in any order, but not branch on values; or return a torch.nn.Sequential"
        ) from None
    finally:
        network.train(training)
    if str(graphs[0]) != str(graphs[1]):
        raise ConfigError(f"model.factory: {what} depends on self.training; use modules for that, such as nn.Dropout")
    inputs = [node for node in graphs[1].nodes if node.op == "placeholder" and node.users]
    outputs = [node.args[0] for node in graphs[1].nodes if node.op == "output"]
    if len(inputs) != 1 or not isinstance(outputs[0], fx.Node):
        raise ConfigError(f"model.factory: {what} must take the images alone and return one tensor, the logits")
    return graphs[1]


def _links_of_graph(network: nn.Module, graph: fx.Graph) -> list[Link]:
    incoming = next(node for node in graph.nodes if node.op == "placeholder" and node.users)
    output = next(node.args[0] for node in graph.nodes if node.op == "output")
    nodes = [node for node in graph.nodes if node.op.startswith("call_")]
    assert isinstance(output, fx.Node)
    links = []
    begin = 0
    for end in [*_places(network, nodes, incoming, output), len(nodes)]:
        region = nodes[begin:end]
        if region:
            links.append(_link(network, region, incoming))
            incoming = region[-1] if end == len(nodes) else _alive(nodes, end, incoming, output, region)
        begin = end
    return links


def _places(network: nn.Module, nodes: list[fx.Node], incoming: fx.Node, output: fx.Node) -> list[int]:
    """Return the positions between nodes where a single value is alive and no weight is used on both sides."""
    position = {node: i for i, node in enumerate(nodes)} | {incoming: -1}
    last_use = {value: _last_use(value, position, output, len(nodes)) for value in position}
    spans = list(_shared_spans(network, nodes))
    found = []
    for place in range(1, len(nodes)):
        alive = sum(position[value] < place <= last_use[value] for value in position)
        if alive == 1 and not any(first < place <= last for first, last in spans):
            found.append(place)
    return found


def _last_use(value: fx.Node, position: dict[fx.Node, int], output: fx.Node, end: int) -> int:
    uses = [position[user] for user in value.users if user in position]
    return end if value is output else max(uses, default=-1)


def _alive(nodes: list[fx.Node], place: int, incoming: fx.Node, output: fx.Node, region: list[fx.Node]) -> fx.Node:
    """Return the one value that crosses a place."""
    later = set(nodes[place:])
    for value in [*region, incoming]:
        if value is output or later & set(value.users):
            return value
    return region[-1]


def _shared_spans(network: nn.Module, nodes: list[fx.Node]) -> Iterator[tuple[int, int]]:
    """Yield the first and last use of every tensor of the network that is used more than once."""
    uses: dict[int, list[int]] = {}
    for i, node in enumerate(nodes):
        for tensor in _tensors_of(network, node):
            uses.setdefault(tensor, []).append(i)
    yield from {(min(places), max(places)) for places in uses.values() if min(places) != max(places)}


def _tensors_of(network: nn.Module, node: fx.Node) -> set[int]:
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        return {id(tensor) for tensor in [*module.parameters(), *module.buffers()]}
    found = set()
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            owner, _, name = str(source.target).rpartition(".")
            found.add(id(getattr(network.get_submodule(owner), name)))
    return found


def _link(network: nn.Module, region: list[fx.Node], incoming: fx.Node) -> Link:
    """Return a region as the one module that it calls, or as a module of its own."""
    called = [str(node.target) for node in region if node.op == "call_module"]
    if len(region) == 1 and called and region[0].args == (incoming,) and not region[0].kwargs:
        return Link(called[0], network.get_submodule(called[0]))
    graph = fx.Graph()
    copied = {incoming: graph.placeholder("x")}
    for node in region:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in copied:
                copied[source] = graph.node_copy(source)
        copied[node] = graph.node_copy(node, lambda value: copied[value])
    outgoing = next((node for node in region if not set(node.users) <= set(region)), region[-1])
    graph.output(copied[outgoing])
    # a block can begin at a region only by the name of the module that runs first in it
    name = str(region[0].target) if region[0].op == "call_module" else None
    return Link(name, fx.GraphModule(network, graph, "Region"))
