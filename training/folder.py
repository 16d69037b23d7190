"""A folder of class folders, split into training, validation and test folders or not.

flowers/daisy/1.jpg          label daisy
flowers/roses/b/2.png        label roses: folders inside a class are part of it

flowers/train/daisy/1.jpg    label daisy, trained on
flowers/val/daisy/2.jpg      label daisy, for validation
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from .errors import DataError
from .images import FolderImages, ImageStore, why_no_images
from .listing import SPLIT_NAMES, Listed, Listing, Skipped, Split

__all__ = ["list_folder", "unlabeled_images"]


def list_folder(root: Path) -> Listing:
    """Every image below the class folders of `root`.

    Folders are splits where each is called train, validation, val or test and holds folders itself; otherwise
    they are classes. Hidden files and folders are passed over. Raises DataError if there are no class
    folders, or if some folders are splits and others cannot be.
    """
    splits = _split_folders(root)
    skipped = _stray_files(root, root)
    if splits:
        skipped += [stray for name in splits for stray in _stray_files(root, root / name)]
    listed: list[Listed] = []
    labels = set()
    parents: list[tuple[Path, Split | None]] = [(root / name, split) for name, split in splits.items()]
    for parent, split in parents or [(root, None)]:
        for label in _folders(parent):
            labels.add(label)
            paths, passed_over = _images_below(root, parent / label)
            listed += [Listed(path, label, split, path) for path in paths]
            skipped += passed_over
    if not labels:
        raise DataError(
            f"{root}: no class folders. Expected one folder of images for each class, as in "
            f"{root.name}/daisy/1.jpg and {root.name}/roses/2.jpg"
        )
    return Listing(tuple(sorted(labels)), tuple(listed), tuple(skipped), FolderImages(root))


def unlabeled_images(folder: Path) -> tuple[ImageStore, list[str]]:
    """The images anywhere below `folder`, and their paths relative to it; other files are passed over.

    Raises DataError if `folder` is no folder or holds no image.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    paths, _ = _images_below(folder, folder)
    if not paths:
        raise DataError(f"{folder}: no images; expected JPEG, PNG, GIF, BMP or WebP files")
    return FolderImages(folder), paths


def _split_folders(root: Path) -> Mapping[str, Split]:
    """The split of each folder in `root`; empty if they are classes."""
    names = _folders(root)
    if not all(name in SPLIT_NAMES for name in names):
        return {}
    flat = [name for name in names if not _folders(root / name)]
    if len(flat) == len(names):
        return {}
    if flat:
        raise DataError(
            f"{root}: expected class folders in {' and '.join(names)}, found none in {' and '.join(flat)}; "
            "sort its images by class, or take it out"
        )
    if "val" in names and "validation" in names:
        raise DataError(f"{root}: holds both val and validation; expected one of them")
    return {name: split for name, split in SPLIT_NAMES.items() if name in names}


def _visible(folder: str | Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)


def _folders(folder: Path) -> list[str]:
    return [entry.name for entry in _visible(folder) if _is_folder(entry)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _stray_files(root: Path, folder: Path) -> list[Skipped]:
    names = [entry.name for entry in _visible(folder) if not _is_folder(entry)]
    return [Skipped((folder / name).relative_to(root).as_posix(), "not in a class folder") for name in names]


def _images_below(root: Path, folder: Path) -> tuple[list[str], list[Skipped]]:
    """Paths relative to `root` of the images below `folder`, and what is there besides."""
    found = list(_walk(str(folder)))
    files = [file for file, reason in found if reason is None]
    reasons = dict(zip(files, why_no_images(files), strict=True))

    prefix = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
    start = len(os.path.join(folder, ""))
    paths: list[str] = []
    skipped: list[Skipped] = []
    for file, passed_over in found:
        path = prefix + file[start:]
        if reason := passed_over or reasons[file]:
            skipped.append(Skipped(path, reason))
        else:
            paths.append(path)
    return paths, skipped


def _walk(folder: str) -> Iterator[tuple[str, str | None]]:
    """Each file below `folder` and None; each folder that is passed over and why."""
    try:
        entries = _visible(folder)
    except OSError as error:
        yield folder, f"cannot be read: {error.strerror or error}"
        return
    folders = []
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            folders.append(entry.path)
        elif _is_folder(entry):
            yield entry.path, "a link to a folder: not followed"
        else:
            yield entry.path, None
    for path in folders:
        yield from _walk(path)
