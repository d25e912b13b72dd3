"""What can be found wrong with data, how bad it is, and why."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Kind:
    """One kind of problem."""

    severity: Severity
    what: str  # heading, in the plural
    why: str  # it is an error, or only a warning
    refused: bool = False  # by `potstill run`
    skippable: bool = False  # left out with data.skip_bad


def _refused(what: str, why: str) -> Kind:
    return Kind("error", what, why, refused=True)


def _skippable(what: str, why: str) -> Kind:
    return Kind("error", what, why, refused=True, skippable=True)


KINDS: dict[str, Kind] = {
    # files
    "unreadable": _skippable("unreadable files", "no sample may be left out or replaced unseen"),
    "empty-file": _skippable("empty files", "there is no image in them; often a copy that broke off"),
    "truncated": _skippable("truncated images", "part of the picture is missing; copy the files again"),
    "damaged": _skippable("damaged images", "their pixels cannot be told"),
    "no-image": _skippable("files that are no images", "every file in a class folder counts as an image"),
    "oversize": _skippable("oversize files", "beyond the limits of file size or pixels that protect memory"),
    # the listing
    "unreadable-folder": _skippable("unreadable folders", "nobody knows which images are missing"),
    "no-classes": _refused("places without class folders", "there is nothing to learn"),
    "empty-class": _skippable("empty classes", "a class without images cannot be learned"),
    "one-class": _refused("too few classes", "a classifier needs at least two"),
    "missing-class": _skippable("classes that are not in every split", "figures of such a split leave a class out"),
    "too-few": _skippable("classes too small for a split", "each of train, val and test needs an image of each class"),
    "split-folders": _refused("contradictory split folders", "which images are for training is not clear"),
    "link-out": _skippable(
        "paths and links out of the data",
        "the data would change with what lies elsewhere; data.follow_links: true reads them",
    ),
    "link-folder": _skippable("links to folders", "images would count twice, or a loop would never end"),
    "link-broken": _skippable("links to nothing", "the image is missing"),
    "name": _skippable("names that cannot be written down", "they would spoil tables and logs"),
    "manifest": _refused("manifests that cannot be read", "which images there are is not clear"),
    "manifest-row": _skippable("rows of the manifest", "what they hold cannot be used"),
    "listed-twice": _skippable("files that are listed twice", "the image would count twice, perhaps under two labels"),
    # what the images say
    "two-labels": Kind("error", "images under two labels", "at most one label is right, and no model can give both"),
    "across-splits": Kind(
        "error", "images in more than one split", "figures on images that were trained on, or picked by, say too much"
    ),
    "few-across-splits": Kind(
        "warning", "images in more than one split", "below 1 % of the split, figures hardly move"
    ),
    "duplicate": Kind("warning", "duplicates", "the image counts twice, which may be meant"),
    "other-format": Kind("warning", "names that say another format", "other programs may go by the name"),
    "narrow-range": Kind(
        "warning", "images that use less than 1/8 of the range", "they are nearly black to the network; set data.range"
    ),
    "beyond-range": Kind(
        "warning", "images with values beyond the range", "what lies beyond becomes black or white; set data.range"
    ),
    "mixed-range": Kind(
        "warning", "images of different depth", "one range is for all; convert them alike, or set data.range"
    ),
    "blank": Kind("warning", "blank images", "all pixels have one colour; most likely a failed export"),
    "tiny": Kind("warning", "tiny images", "a side below 8 pixels shows next to nothing"),
    "similar-names": Kind(
        "warning", "names that differ in case, blanks or Unicode form only", "most likely meant to be one"
    ),
    "beside-classes": Kind("warning", "images beside the class folders", "they have no class, and are not used"),
    "hidden": Kind("warning", "hidden images and folders of images", "they are not used"),
    "imbalance": Kind("warning", "imbalance", "figures over all images say little of the small classes"),
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One problem."""

    kind: str  # of KINDS
    path: str  # below the data folder, forward slashes; "." for the whole
    reason: str  # what was found there, and what to do
    others: tuple[str, ...] = ()  # further paths that it is about

    @property
    def severity(self) -> Severity:
        """How bad its kind is."""
        return KINDS[self.kind].severity

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"severity": self.severity, **vars(self), "others": list(self.others)}


def hints(findings: list[Finding], *, skip_bad: bool = False) -> list[str]:
    """What can be done about refused findings, besides mending the data; a line each."""
    kinds = {each.kind for each in findings}
    found = []
    if "link-out" in kinds or any(
        each.reason.startswith("a link to a folder;") or each.reason == "a link to a folder" for each in findings
    ):
        found.append("To read files elsewhere by links and paths: --set data.follow_links=true")
    if not skip_bad and any(KINDS[kind].skippable for kind in kinds):
        found.append("To go on without the bad files and the classes that are too small, and list them: --skip-bad")
    return found


def said(findings: list[Finding], root: Path) -> list[str]:
    """Those that `potstill run` refuses, as sentences that can be printed, in their order and each once."""
    refused = (each for each in findings if KINDS[each.kind].refused)
    return list(dict.fromkeys(f"{_printable(str(root / each.path))}: {each.reason}" for each in refused))


def _printable(path: str) -> str:
    return path if path.isprintable() else repr(path)
