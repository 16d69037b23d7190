"""comparison.html: two versions side by side, with the images whose answers flipped."""

from importlib.resources import files

from graftserve.training.page import render_page, thumbnail

from .compare_versions import Images, VersionComparison

__all__ = ["render_comparison"]

_FLIPS_SHOWN = 48
_CLASSES_SHOWN = 40
_NAMED = 20


def render_comparison(before: str, after: str, result: VersionComparison, images: Images) -> str:
    """The page. before, after: what the versions are called."""

    def picture(path: str) -> str | None:
        try:
            return thumbnail(images.store.read(path))
        except OSError:
            return None

    comparison = result.comparison
    return render_page(
        files(__package__).joinpath("compare.html").read_text(encoding="utf-8"),
        before=before,
        after=after,
        result=result,
        comparison=comparison,
        flips=[(flip, picture(flip.path)) for flip in comparison.flips[:_FLIPS_SHOWN]],
        changed=[change for change in comparison.classes if change.gained or change.lost][:_CLASSES_SHOWN],
        classes_shown=_CLASSES_SHOWN,
        unreadable={
            f"only {after} can read": comparison.unreadable_before,
            f"only {before} can read": comparison.unreadable_after,
            "neither can read": comparison.unreadable_both,
        },
        named=_NAMED,
    )
