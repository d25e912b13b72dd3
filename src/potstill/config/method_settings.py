"""A recipe's method as plain values: one mapping, or a list of methods that are added up."""

from typing import Any

from potstill.code_references import is_code_reference
from potstill.errors import UsageError
from potstill.methods import list_own_methods, method_info, takes_methods


def normalize_method(method: Any) -> Any:
    """Return a list of methods as the method ``combined``, anything else unchanged.

    Example:
        >>> normalize_method([{"name": "kd"}, {"name": "crd", "factor": 0.8}])
        {'name': 'combined', 'methods': [{'name': 'kd'}, {'name': 'crd', 'factor': 0.8}]}
    """
    return {"name": "combined", "methods": method} if isinstance(method, list) else method


def inner_methods(settings: dict[str, Any]) -> list[tuple[tuple[str | int, ...], Any]]:
    """Return the methods inside a method, each with its path: ``("base_method",)``, ``("methods", 0)``.

    The values are unchecked.  Empty if the name is missing.  A method from outside is not loaded: every option of it
    that looks like a method counts as one.
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
        if isinstance(value, list):
            found += [((key, position), each) for position, each in enumerate(value)]
        else:
            found.append(((key,), value))
    return found


def _looks_like_methods(value: Any) -> bool:
    methods = value if isinstance(value, list) else [value]
    return bool(methods) and all(isinstance(each, dict) and isinstance(each.get("name"), str) for each in methods)


def needs_teacher(method: Any) -> bool:
    """Return whether a method needs a teacher, with the defaults of its options; True if it is unknown.

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
        requirements = method_info(settings["name"]).requirements
    except UsageError:  # reported by check_method
        return True
    return requirements is None or requirements.teacher


def describe_method(method: Any) -> str:
    """Return a short label of a method, for tables and headings.

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
    details = [str(settings["preset"])] if settings.get("preset") else []
    if isinstance(settings.get("schedule"), dict):
        details.append(f"scheduled {', '.join(map(str, settings['schedule']))}")
    return f"{text} ({', '.join(details)})" if details else text


def _describe_weighted(settings: Any) -> str:
    factor = settings.get("factor", 1) if isinstance(settings, dict) else 1
    return describe_method(settings) if factor == 1 else f"{factor:g} {describe_method(settings)}"
