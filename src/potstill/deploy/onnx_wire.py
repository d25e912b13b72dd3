"""What an ONNX file says of itself, read from its bytes before an engine sees them.  No torch and no onnx here.

ONNX is a protobuf message; only its wire format is known here, and a few field numbers of onnx.proto3.
"""

from collections.abc import Iterator

from potstill.errors import ArtifactError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_PROPERTIES = 14  # of ModelProto: key (1), value (2)
_DEEPEST = 40

# Message -> fields that hold messages in which a tensor may stand.  A Tensor's 13 and 14 say that it lies elsewhere.
_INSIDE = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_EXTERNAL = (13, 14)


def metadata(content: bytes, origin: str) -> dict[str, str]:
    """The properties of a model all of whose tensors are in it.

    Args:
        content: of an ONNX file.
        origin: what messages call it.

    Raises:
        ArtifactError: no protobuf, or a tensor that lies in another file.
    """
    found: dict[str, str] = {}
    view = memoryview(content)
    try:
        if _refers_elsewhere(view, "model", 0):
            raise ArtifactError(
                f"{origin} keeps its weights in another file, which potstill does not follow; "
                "save it as one file, or export it anew with potstill export"
            )
        for number, value in _fields(view):
            if number == _PROPERTIES and isinstance(value, memoryview):
                pair = {key: bytes(text) for key, text in _fields(value) if isinstance(text, memoryview)}
                found[pair.get(1, b"").decode()] = pair.get(2, b"").decode()
    except (ValueError, IndexError) as error:
        raise ArtifactError(f"{origin} is no ONNX model, or is damaged ({error})") from None
    return found


def _refers_elsewhere(message: memoryview, kind: str, depth: int) -> bool:
    if depth > _DEEPEST:
        raise ValueError("nested too deeply")
    if kind == "tensor":
        return any(number == _EXTERNAL[0] or (number == _EXTERNAL[1] and value) for number, value in _fields(message))
    inside = _INSIDE[kind]
    return any(
        _refers_elsewhere(value, inside[number], depth + 1)
        for number, value in _fields(message)
        if number in inside and isinstance(value, memoryview)
    )


def _fields(message: memoryview) -> Iterator[tuple[int, "memoryview | int"]]:
    """(field number, value) of a message, in order; numbers of fixed width come as bytes."""
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == _BYTES:
            length, at = _varint(message, at)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"a field of the unknown kind {kind}")
        if number == 0 or length > end - at:
            raise ValueError("cut short")
        yield number, message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than ten bytes")
