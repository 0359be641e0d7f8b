"""Seeded JSON schemas of every kind that can be enforced, with answers of bounded length."""

import random

_KEYS = ["id", "name", "größe", "a b", "x", "tags", "日本", 'q"uote', "is_ok"]
_WORDS = ["red", "Zürich", "", 'a"b', "雪", "line\nbreak", "true"]


def make_schema(seed):
    """A schema whose definitions, if any, are in the root."""
    generator = random.Random(seed)
    definitions = {}
    schema = _schema(generator, 3, definitions)
    if definitions:
        schema = {**schema, "$defs": definitions}
    return schema


def _schema(generator, depth, definitions):
    scalars = [_string, _integer, _number, _enum, _constant]
    nested = [_object, _object, _array, _any_of, _reference, _recursive, _tuple]
    kind = generator.choice(scalars if depth == 0 else scalars + nested + nested)
    return kind(generator, depth, definitions)


def _string(generator, depth, definitions):
    return generator.choice(
        [
            {"type": "string", "maxLength": generator.randint(0, 8)},
            {"type": "string", "minLength": 2, "maxLength": generator.randint(2, 9)},
            {"type": "string", "pattern": "^[a-z]{1,4}(-[0-9]{2})?$"},
            {"type": "string", "pattern": "^(\\d{3}|[äöü]\\s?x)$"},
            {"type": "string", "format": generator.choice(["date", "time", "ipv4", "uuid"])},
        ]
    )


def _integer(generator, depth, definitions):
    low = generator.randint(-2000, 2000)
    schema = {"type": "integer", "minimum": low, "maximum": low + generator.randint(0, 300)}
    if generator.random() < 0.3:
        schema = {"type": "integer", "minimum": 0, "maximum": 90, "multipleOf": 5}
    return schema


def _number(generator, depth, definitions):
    low = generator.randint(-50, 50)
    return generator.choice(
        [
            {"type": "number", "minimum": low, "maximum": low + 2.5},
            {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        ]
    )


def _enum(generator, depth, definitions):
    values = [*_WORDS, 1, -2.5, None, True, {"a": [1]}, ["x"]]
    return {"enum": generator.sample(values, generator.randint(1, 4))}


def _constant(generator, depth, definitions):
    return generator.choice([{"const": "only"}, {"type": "boolean"}, {"type": "null"}])


def _object(generator, depth, definitions):
    names = generator.sample(_KEYS, generator.randint(0, 4))
    schema = {
        "type": "object",
        "properties": {name: _schema(generator, depth - 1, definitions) for name in names},
        "required": [name for name in names if generator.random() < 0.6],
        "additionalProperties": False,
    }
    if generator.random() < 0.2:
        schema["title"] = schema["description"] = "means nothing"
    return schema


def _array(generator, depth, definitions):
    least = generator.randint(0, 2)
    return {
        "type": "array",
        "items": _schema(generator, depth - 1, definitions),
        "minItems": least,
        "maxItems": least + generator.randint(0, 2),
    }


def _tuple(generator, depth, definitions):
    items = [_schema(generator, 0, definitions) for _ in range(2)]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": 1}


def _any_of(generator, depth, definitions):
    return {"anyOf": [_schema(generator, depth - 1, definitions) for _ in range(2)]}


def _reference(generator, depth, definitions):
    name = f"d{len(definitions)}"
    definitions[name] = {}
    definitions[name] = _schema(generator, depth - 1, definitions)
    return {"$ref": f"#/$defs/{name}"}


def _recursive(generator, depth, definitions):
    name = f"d{len(definitions)}"
    definitions[name] = {
        "type": "object",
        "properties": {
            "value": _schema(generator, 0, definitions | {name: {}}),
            "next": {"anyOf": [{"type": "null"}, {"$ref": f"#/$defs/{name}"}]},
        },
        "required": ["value", "next"],
        "additionalProperties": False,
    }
    return {"$ref": f"#/$defs/{name}"}
