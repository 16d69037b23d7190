"""The trees of errors, each from its module, and the status codes of every transport."""

import inspect
from types import ModuleType

import grpc

import graftserve.client.errors
import graftserve.export.errors
import graftserve.k8s.rollout.errors
import graftserve.training.errors
from graftserve.client.errors import error_class
from graftserve.serving.errors import Code
from graftserve.serving.rest_api import HTTP_STATUS

from .fields import summary
from .markdown import code, prose, table

__all__ = ["render_client", "render_export", "render_rollout", "render_status_codes", "render_training"]


def render_client() -> str:
    return _tree(graftserve.client, graftserve.client.errors)


def render_export() -> str:
    return _tree(graftserve.export, graftserve.export.errors)


def render_rollout() -> str:
    return _tree(graftserve.k8s.rollout, graftserve.k8s.rollout.errors)


def render_training() -> str:
    return _tree(graftserve.training, graftserve.training.errors)


def render_status_codes() -> str:
    by_value = {status.value[0]: status for status in grpc.StatusCode}
    rows = [
        (
            code(status.name),
            str(int(status)),
            prose(HTTP_STATUS[status]),
            "" if status is Code.OK else code(error_class(by_value[status]).__name__),
        )
        for status in Code
    ]
    return table(("gRPC", "number", "HTTP", "raised by the client"), rows)


def _tree(package: ModuleType, errors: ModuleType) -> str:
    """The drawing of the docstring of `errors`, and what each class says of itself, with those that other
    modules of the package add."""
    drawing = (inspect.getdoc(errors) or "").partition("\n\n")[2]
    values = {**vars(errors), **vars(package)}.values()
    classes = [value for value in values if inspect.isclass(value) and issubclass(value, Exception)]
    missing = [
        kind.__name__
        for kind in classes
        if kind.__module__ == errors.__name__ and kind.__name__ not in drawing
    ]
    if missing:
        raise LookupError(f"{errors.__name__}: its drawing lacks {', '.join(missing)}")
    rows = [
        (code(kind.__name__), code(kind.__bases__[0].__name__), prose(summary(kind.__doc__)))
        for kind in classes
    ]
    return f"```text\n{drawing}\n```\n\n{table(('class', 'is a', 'when'), rows)}"
