"""Class names of published networks, and the outputs that belong to the classes of a data set.  No torch here.

The names of CIFAR are beside this module; those of ImageNet come with timm, as WordNet numbers with their synonyms.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from potstill.errors import UsageError, did_you_mean

CLASS_LISTS = ("cifar10", "cifar100", "imagenet-1k", "imagenet-21k")
# Lists that an unnamed network of so many outputs probably has.
LIKELY_LISTS: Mapping[int, str] = {10: "cifar10", 100: "cifar100", 1000: "imagenet-1k", 21_843: "imagenet-21k"}
_SYNSETS = {"imagenet-1k": "imagenet_synsets.txt", "imagenet-21k": "imagenet21k_goog_synsets.txt"}
_LEMMAS = "imagenet_synset_to_lemma.txt"


@cache
def class_list(name: str) -> tuple[str, ...]:
    """Return the class names of a list of ``CLASS_LISTS``, of ImageNet as "n01440764, tench, Tinca tinca"."""
    if name not in _SYNSETS:
        return tuple((Path(__file__).parent / "class_lists" / f"{name}.txt").read_text(encoding="utf-8").splitlines())
    spec = importlib.util.find_spec("timm")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "data" / "_info"
    lines = (folder / _LEMMAS).read_text(encoding="utf-8").splitlines()
    lemmas = dict(line.split("\t", 1) for line in lines if "\t" in line)
    synsets = (folder / _SYNSETS[name]).read_text(encoding="utf-8").split()
    return tuple(f"{synset}, {lemmas[synset]}" if synset in lemmas else synset for synset in synsets)


def lists_with(names: Sequence[str]) -> list[str]:
    """Return the lists of ``CLASS_LISTS`` that have all of ``names``, each once.

    Example:
        >>> lists_with(["cat", "truck"]), lists_with(["golden_retriever", "daisy"])
        (['cifar10'], ['imagenet-1k', 'imagenet-21k'])
    """
    return [each for each in CLASS_LISTS if all(len(_list_outputs(each).find(name)) == 1 for name in names)]


@cache  # a tenth of a second for those of ImageNet, and each network of a run is looked up
def _list_outputs(name: str) -> "OutputNames":
    return OutputNames(class_list(name))


class OutputNames:
    """The class names of a network's outputs, for look-up by several spellings.

    A name is found as written, ignoring case and underscores, or by one of its synonyms (the parts between commas).

    Example:
        >>> names = OutputNames(class_list("imagenet-1k"))
        >>> names.find("golden_retriever"), names.find("n02099601"), names.find("poodle")
        ([207], [207], [])
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._exact: dict[str, list[int]] = {}
        self._plain: dict[str, list[int]] = {}
        self._synonyms: dict[str, list[int]] = {}
        for at, name in enumerate(self.names):
            self._exact.setdefault(name, []).append(at)
            self._plain.setdefault(_plain(name), []).append(at)
            for synonym in dict.fromkeys(map(_plain, name.split(", "))):
                self._synonyms.setdefault(synonym, []).append(at)

    def find(self, name: str) -> list[int]:
        """Return the outputs that match ``name``: several if it is ambiguous, none if it is unknown."""
        plain = _plain(name)
        return self._exact.get(name) or self._plain.get(plain) or self._synonyms.get(plain) or []

    def nearest(self, name: str) -> str:
        """Return the end of a message, with names similar to ``name``."""
        return did_you_mean(_plain(name), self._synonyms)


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def find_outputs(
    wanted: Mapping[str, Sequence[str | int]], names: Sequence[str] | None, count: int, ours: Sequence[str], key: str
) -> list[list[int]]:
    """Return the outputs whose probabilities make up each class: ``wanted`` class -> their names or numbers, from 0.

    UsageError: a class without an output, an unknown or ambiguous name, a number out of range, an output twice.

    Example:
        >>> find_outputs({"pet": ["cat", "dog"], "ship": [8]}, class_list("cifar10"), 10, ["pet", "ship"], "classes")
        [[3, 5], [8]]
    """
    known = None if names is None else OutputNames(names)
    missing = [name for name in ours if not wanted.get(name)]
    if missing:
        some = ", ".join(map(repr, missing[:3]))
        raise UsageError(
            f"{key} lacks {len(missing)} of the {len(ours)} classes of this data: {some}"
            f"{did_you_mean(missing[0], wanted)}\nIt must give the outputs of each class of the data"
        )
    groups, owner = list[list[int]](), dict[int, str]()
    for name in ours:
        group = [_find_output(each, known, count, f"{key}: {name!r}") for each in wanted[name]]
        for each in group:
            if each in owner:
                shown = repr(names[each]) if names is not None else str(each)
                raise UsageError(f"{key}: output {shown} is given for {owner[each]!r} and for {name!r}")
            owner[each] = name
        groups.append(group)
    return groups


def _find_output(wanted: str | int, known: OutputNames | None, count: int, where: str) -> int:
    if isinstance(wanted, int):
        if not 0 <= wanted < count:
            raise UsageError(f"{where}: the network has outputs 0 to {count - 1}, got {wanted}")
        return wanted
    if known is None:
        raise UsageError(
            f"{where}: the names of the network's {count} outputs are unknown, so {wanted!r} cannot be found; "
            f"give their numbers, 0 to {count - 1}"
        )
    found = known.find(wanted)
    if not found:
        raise UsageError(f"{where}: no output of the network is called {wanted!r}{known.nearest(wanted)}")
    if len(found) > 1:
        several = "; ".join(f"{known.names[each]} (output {each})" for each in found[:3])
        raise UsageError(
            f"{where}: {wanted!r} may be {several}: write one of these in full, or {{{wanted}: [{found[0]}]}}"
        )
    return found[0]
