"""Pages that need nothing else, neither a network nor JavaScript: what they all have in common.

Everything that comes from the user's data is escaped, and each page's own policy forbids scripts and
requests.
"""

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image, ImageOps

__all__ = ["is_list", "plain", "render_page", "thumbnail"]

_THUMBNAIL_SIDE_PX = 160
_THUMBNAIL_QUALITY = 80


def render_page(template: str, **values: Any) -> str:
    """The Jinja template with the values, escaped unless they are Markup, and `style`, the pages' CSS."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        percent=lambda share, digits=1: "–" if share is None else f"{share:.{digits}%}",
        plain=plain,
        count=lambda number: f"{number:,}",
        duration=_duration,
    )
    environment.tests["nested"] = lambda value: isinstance(value, Mapping) or is_list(value)
    style = Markup(files(__package__).joinpath("page.css").read_text(encoding="utf-8"))
    return environment.from_string(template).render(style=style, **values)


def thumbnail(image_bytes: bytes) -> str | None:
    """The image as a small JPEG in a data URI; None if it cannot be decoded."""
    try:
        with warnings.catch_warnings():
            # Of odd palettes, and of sizes that the pipeline's own limit lets pass.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(image_bytes)) as image:
                image.draft("RGB", (_THUMBNAIL_SIDE_PX, _THUMBNAIL_SIDE_PX))
                upright = ImageOps.exif_transpose(image).convert("RGB")
    except Exception:  # Pillow raises whatever its parsers met; the page names such an image
        return None
    upright.thumbnail((_THUMBNAIL_SIDE_PX, _THUMBNAIL_SIDE_PX))
    buffer = io.BytesIO()
    upright.save(buffer, "JPEG", quality=_THUMBNAIL_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def plain(value: Any) -> str:
    """A value of a recipe or a measurement, for people."""
    if value is None or value == "" or (is_list(value) and not value):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if is_list(value):
        return ", ".join(plain(item) for item in value)
    return str(value)


def is_list(value: Any) -> bool:
    """Whether it is a sequence other than text."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
