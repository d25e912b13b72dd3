"""A recipe's method as plain values: one mapping, or a list of methods that are added up."""

from typing import Any

from potstill.code_references import is_code_reference
from potstill.errors import UsageError
from potstill.methods import list_own_methods, method_info, takes_methods


def normalize_method(method: Any) -> Any:
    """A list of methods is short for the method ``combined``; anything else stays as it is.

    Example:
        >>> normalize_method([{"name": "kd"}, {"name": "crd", "factor": 0.8}])
        {'name': 'combined', 'methods': [{'name': 'kd'}, {'name': 'crd', 'factor': 0.8}]}
    """
    return {"name": "combined", "methods": method} if isinstance(method, list) else method


def inner_methods(settings: dict[str, Any]) -> list[tuple[tuple[str | int, ...], Any]]:
    """The methods inside a method, each with its path: ``("base_method",)``, ``("methods", 0)``.

    Empty for an unknown name; what stands there may be anything, since nobody has checked it.  A method from outside is
    not loaded for it: what looks like a method is one.
    """
    name = settings.get("name")
    if not isinstance(name, str):
        return []
    if name in list_own_methods():
        options = method_info(name).options
        inside = {key: settings[key] for key in options if settings.get(key) and takes_methods(options[key])}
    else:
        inside = {key: value for key, value in settings.items() if _looks_like_methods(value)}
    found: list[tuple[tuple[str | int, ...], Any]] = []
    for key, value in inside.items():
        several = isinstance(value, list)
        found += [((key, position), each) for position, each in enumerate(value)] if several else [((key,), value)]
    return found


def _looks_like_methods(value: Any) -> bool:
    each = value if isinstance(value, list) else [value]
    return bool(each) and all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in each)


def needs_teacher(method: Any) -> bool:
    """Whether a method learns from a teacher, with the defaults of its options; True if in doubt.

    Example:
        >>> needs_teacher({"name": "kd"}), needs_teacher({"name": "supervised"})
        (True, False)
        >>> needs_teacher([{"name": "supervised"}, {"name": "kd"}])
        True
    """
    settings = normalize_method(method)
    if not isinstance(settings, dict) or not isinstance(settings.get("name"), str):
        return True
    if inner := inner_methods(settings):
        return any(needs_teacher(each) for _, each in inner)
    try:
        needs = method_info(settings["name"]).requirements
    except UsageError:  # the check of the method reports it
        return True
    return needs is None or needs.teacher


def describe_method(method: Any) -> str:
    """A method in a few words, for tables and headings.

    Example:
        >>> (describe_method({"name": "ls", "base_method": {"name": "dkd"}}),
        ... describe_method([{"name": "kd"}, {"name": "crd"}]))
        ('ls around dkd', 'kd + crd')
        >>> describe_method({"name": "combined", "methods": [{"name": "kd"}, {"name": "crd", "factor": 0.8}]})
        'kd + 0.8 crd'
        >>> describe_method({"name": "kd", "schedule": {"temperature": {"shape": "linear"}}, "preset": "cifar100"})
        'kd (cifar100, scheduled temperature)'
    """
    settings = normalize_method(method)
    if not isinstance(settings, dict) or "name" not in settings:
        return ""
    name = str(settings["name"])
    if is_code_reference(name):
        name = name.rpartition(":")[2]
    inner = inner_methods(settings)
    if name == "combined" and inner:
        text = " + ".join(_describe_weighted(each) for _, each in inner)
    else:
        text = f"{name} around {describe_method(inner[0][1])}" if inner else name
    more = [str(settings["preset"])] if settings.get("preset") else []
    if isinstance(settings.get("schedule"), dict):
        more.append(f"scheduled {', '.join(map(str, settings['schedule']))}")
    return f"{text} ({', '.join(more)})" if more else text


def _describe_weighted(settings: Any) -> str:
    factor = settings.get("factor", 1) if isinstance(settings, dict) else 1
    return describe_method(settings) if factor == 1 else f"{factor:g} {describe_method(settings)}"
