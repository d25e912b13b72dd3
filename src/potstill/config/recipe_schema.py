"""The JSON schema of recipe files with the options of every method, for completion and checks in editors.

It allows what the settings classes do not: short forms, and required keys that are filled in.
"""

from dataclasses import fields
from typing import get_type_hints

from potstill.config.recipe import Recipe
from potstill.errors import UsageError
from potstill.methods import MethodInfo, list_methods, method_info
from potstill.methods.schedules import Schedule
from potstill.options import METHOD_SCHEMA, REQUIRED, WEIGHT_SCHEMA, Schema, json_schema

_CODE = {"type": "string", "pattern": r":[A-Za-z_]\w*$"}  # package.module:Class, path/file.py:Class
_WEIGHTED: Schema = {"$ref": "#/$defs/WeightedMethod"}


def recipe_schema() -> Schema:
    """Return the schema (dialect 2020-12); methods of other installed packages are loaded and included."""
    schema = Recipe.model_json_schema()
    definitions, keys = schema["$defs"], schema["properties"]
    schema |= {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "potstill recipe"}
    schema["required"] = [key for key in schema["required"] if key != "name"]  # default: the file's name
    definitions |= _method_definitions()
    keys["method"] = {
        "description": keys["method"]["description"],
        "default": {"name": "kd"},
        "anyOf": [METHOD_SCHEMA, {"type": "array", "minItems": 2, "items": _WEIGHTED}],
    }
    source = definitions["DataSettings"]["properties"]["source"]
    source["type"] = [source["type"], "null"]  # null: given with --data
    stage = definitions["StageSettings"]
    stage["required"] = [key for key in stage["required"] if key != "model"]  # default: that of the weights
    stage["anyOf"] = [{"required": ["model"]}, {"required": ["weights"]}]
    stage["properties"]["classes"].setdefault("anyOf", []).append({"type": "string"})  # a file
    stage["properties"]["fallback"]["items"] = {"$ref": "#/$defs/StageSettings"}
    stage["properties"]["training"] |= {"$ref": "#/$defs/TrainingSettings"}
    modes = definitions["TeacherCacheSettings"]["properties"]["mode"]["enum"]
    keys["teacher_cache"] = {"anyOf": [{"$ref": "#/$defs/TeacherCacheSettings"}, {"enum": [*modes, False]}]}
    names = definitions["LoggerSettings"]["properties"]["name"]
    logger: Schema = {"anyOf": [{"$ref": "#/$defs/LoggerSettings"}, names]}
    keys["tracker"] = {
        "description": keys["tracker"]["description"],
        "anyOf": [{"type": "array", "items": logger}, *logger["anyOf"], {"type": "null"}],
    }
    return schema


def _method_definitions() -> dict[str, Schema]:
    """Return a definition for each method, and one that selects among them by name."""
    found = [info for name in list_methods() if (info := _loadable(name)) is not None]
    choice: Schema = {
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"anyOf": [{"enum": [info.name for info in found]}, _CODE]}},
        # Not oneOf: its error for an unknown option would list every method.
        "allOf": [
            {
                "if": {"properties": {"name": {"const": info.name}}, "required": ["name"]},
                "then": {"$ref": f"#/$defs/method_{info.name}"},
            }
            for info in found
        ],
    }
    shape = {field.name: json_schema(get_type_hints(Schedule)[field.name]) for field in fields(Schedule)}
    schedules = {"type": "object", "properties": shape, "additionalProperties": False}
    return {
        "Method": {**choice, "not": {"required": ["factor"]}},
        "WeightedMethod": choice,
        "Schedules": {"type": "object", "additionalProperties": schedules},
        **{f"method_{info.name}": _method_schema(info) for info in found},
    }


def _method_schema(info: MethodInfo) -> Schema:
    options = {key: {**_weighted(each.schema), "description": each.doc} for key, each in info.options.items()}
    for key, each in info.options.items():
        if each.default is not REQUIRED:
            options[key]["default"] = each.default
    filled = {key for preset in info.presets.values() for key in preset}
    return {
        "type": "object",
        "description": info.summary,
        "properties": {
            "name": {"const": info.name},
            **options,
            **({"preset": {"enum": list(info.presets), "description": "the authors' options"}} if info.presets else {}),
            "schedule": {"$ref": "#/$defs/Schedules", "description": "options and weights that change during training"},
            "factor": {**WEIGHT_SCHEMA, "default": 1.0, "description": "weight of all its terms, in a list of methods"},
        },
        "required": ["name", *(key for key in info.examples if key not in filled)],
        "additionalProperties": False,
    }


def _weighted(schema: Schema) -> Schema:
    """Return the schema of an option; methods in a list may each have a factor."""
    return {**schema, "items": _WEIGHTED} if schema.get("items") == METHOD_SCHEMA else schema


def _loadable(name: str) -> MethodInfo | None:
    try:
        return method_info(name)
    except UsageError:  # a broken package does not affect the other methods
        return None
