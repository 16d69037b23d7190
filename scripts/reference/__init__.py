"""The site's reference pages, made from the code: what stands where a page says <!-- reference: NAME -->.

Nothing here imports TensorFlow: what cannot be imported without it is read from its source.
"""

from collections.abc import Callable, Mapping

from . import commands, contract, errors, recipe, serving

__all__ = ["SECTIONS"]

SECTIONS: Mapping[str, Callable[[], str]] = {
    "commands": commands.render,
    "contract": contract.render_document,
    "signatures": contract.render_signatures,
    "client errors": errors.render_client,
    "export errors": errors.render_export,
    "rollout errors": errors.render_rollout,
    "training errors": errors.render_training,
    "flags": serving.render_flags,
    "unused flags": serving.render_unused_flags,
    "metrics": serving.render_metrics,
    "recipe": recipe.render,
    "status codes": errors.render_status_codes,
}
"""Markdown by name."""
