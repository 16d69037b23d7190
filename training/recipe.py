"""What a run was asked to do, complete enough to do it again."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import RunError

__all__ = ["DEFAULT_BACKBONE", "Recipe"]

DEFAULT_BACKBONE = "efficientnet-lite0"


@dataclass(frozen=True)
class Recipe:
    """The settings of a run; saved with it.

    data_dir: folder of class folders. backbone: a name of the backbone table.
    weights: "imagenet", "none" or a file. Percentages: 0 to below 100, the rest is trained on.
    """

    data_dir: str
    backbone: str = DEFAULT_BACKBONE
    weights: str = "imagenet"
    validation_percent: float = 10.0
    test_percent: float = 10.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """The inverse of `to_dict`; raises RunError for a missing or unknown setting."""
        known = {field.name for field in fields(cls)}
        if unknown := values.keys() - known:
            raise RunError(
                f"recipe: unknown settings {', '.join(sorted(unknown))}; expected {', '.join(sorted(known))}"
            )
        try:
            return cls(**values)
        except TypeError as error:
            raise RunError(f"recipe: {error}") from error
