"""The ``[privacy]`` table of a run: which obfuscation the clients use, and what it leaves alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from skymask_gpu.engine.registry import one_of
from skymask_gpu.federation.choices import Choice, Choices, with_settings
from skymask_gpu.federation.transforms import check_like
from skymask_gpu.federation.transforms.obfuscation import OBFUSCATIONS, Draws

__all__ = ["PrivacyConfig", "batch_norm_columns", "obfuscated"]


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig(Choice):
    """``[privacy]``: what clients do to their updates so that nobody can read their data from them.

    Attributes:
        obfuscation: key of :data:`~skymask_gpu.federation.transforms.obfuscation.OBFUSCATIONS`.
        batch_norm: ``"keep"``: the weights and biases of batch norm are sent as they are;
            ``"obfuscate"``: they are treated like all others. Running statistics are always sent
            as they are.
        attackers_too: what malicious clients send is obfuscated as well, after the attack.
        root_too: the server obfuscates the update of its root model likewise, before the rule.
        settings: the obfuscation's own keys.

    Example:
        >>> from skymask_gpu.federation.transforms.obfuscation import Mask
        >>> PrivacyConfig(obfuscation="mask", settings=Mask(strength=0.9)).settings.strength
        0.9
    """

    registry: ClassVar[Choices] = OBFUSCATIONS
    key: ClassVar[str] = "obfuscation"
    table: ClassVar[str] = "privacy"

    obfuscation: str = "none"
    batch_norm: str = "keep"
    attackers_too: bool = False
    root_too: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("privacy.batch_norm", self.batch_norm, ("keep", "obfuscate"))


def obfuscated(
    rows_NP: Tensor, privacy: PrivacyConfig, draws: Draws, layers: Mapping[str, slice], kept: Sequence[slice] = ()
) -> Tensor:
    """The updates as they are sent.

    Args:
        rows_NP: the updates; they may be overwritten.
        privacy: the obfuscation.
        draws: the source of its random numbers.
        layers: each parameter's columns, by name.
        kept: columns that stay as they are.

    Raises:
        ValueError: the obfuscation returns rows of another shape or type.
    """
    before = [rows_NP[:, columns].clone() for columns in kept]
    sent_NP = with_settings(OBFUSCATIONS[privacy.obfuscation], privacy.settings, rows_NP, draws, layers)
    check_like(f"privacy.obfuscation {privacy.obfuscation!r}", rows_NP, sent_NP)
    for columns, values in zip(kept, before, strict=True):
        sent_NP[:, columns] = values
    return sent_NP


def batch_norm_columns(module: nn.Module, layers: Mapping[str, slice]) -> list[slice]:
    """The columns of the weights and biases of all batch norm layers.

    Args:
        module: the model.
        layers: each trainable parameter's columns, by its name in ``named_parameters()``.

    Example:
        >>> module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> layers = {"0.weight": slice(0, 6), "0.bias": slice(6, 9)}
        >>> layers |= {"1.weight": slice(9, 12), "1.bias": slice(12, 15)}
        >>> batch_norm_columns(module, layers)
        [slice(9, 12, None), slice(12, 15, None)]
    """
    norms = {id(param) for layer in module.modules() if isinstance(layer, _BatchNorm) for param in layer.parameters()}
    return [layers[name] for name, param in module.named_parameters() if id(param) in norms and name in layers]
