"""The several names of one tensor in a module, such as those of tied weights.

``named_parameters()`` and ``named_buffers()`` give each tensor one name, and updates have that name
only. ``state_dict()`` has all names, and ``load_state_dict`` writes to the tensor once for each of
them. A new state in which one name kept its old value would therefore undo the round.
"""

from collections.abc import Mapping

from torch import Tensor, nn

__all__ = ["other_names", "under_all_names"]


def other_names(module: nn.Module) -> dict[str, str]:
    """Every further name in ``state_dict()`` -> the one in ``named_parameters()``.

    The same goes for buffers, which have theirs in ``named_buffers()``.

    Example:
        >>> module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        >>> module[1].weight = module[0].weight
        >>> other_names(module)
        {'1.weight': '0.weight'}
    """
    first = {id(tensor): name for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
    # With keep_vars they are the module's own tensors, which can be told apart by their ids.
    entries = module.state_dict(keep_vars=True)
    return {name: first[id(value)] for name, value in entries.items() if first.get(id(value), name) != name}


def under_all_names(values: Mapping[str, Tensor], others: Mapping[str, str]) -> dict[str, Tensor]:
    """The same values, and copies of them under each further name.

    They are copies because safetensors refuses tensors that share memory.

    Args:
        values: name -> tensor of any shape and dtype. Names may be missing.
        others: what :func:`other_names` returned.
    """
    return {**values, **{name: values[first].clone() for name, first in others.items() if first in values}}
