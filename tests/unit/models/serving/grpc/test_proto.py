"""The .proto is what the code was generated from, and says on the wire what everyone else's does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from models.serving.grpc import calls, inference_pb2, servicer

PROTO = Path(inference_pb2.__file__).with_name("inference.proto").read_text()
_FIELD = re.compile(r"(repeated )?(map<\w+, \w+>|\w+) (\w+) = (\d+);")


def written_fields() -> dict[str, dict[str, tuple[str, int, bool]]]:
    """Message -> field -> (type, number, repeated), as the text of the .proto has them. Enums are listed by their values."""
    found: dict[str, dict[str, tuple[str, int, bool]]] = {}
    place: list[str] = []
    for line in PROTO.splitlines():
        text = line.partition("//")[0].strip()
        opened = re.fullmatch(r"(message|enum|oneof|service) (\w+) \{(\})?", text)
        if opened:
            if opened[1] == "message":
                found[".".join([*(name for name in place if name), opened[2]])] = {}
            if not opened[3]:
                place.append(opened[2] if opened[1] == "message" else "")
        elif text == "}":
            place.pop()
        elif match := _FIELD.fullmatch(text):
            message = found[".".join(name for name in place if name)]
            is_map = match[2].startswith("map<")
            message[match[3]] = (match[2], int(match[4]), bool(match[1]) or is_map)
    return found


def generated_fields(message: Descriptor, prefix: str = "") -> Iterator[tuple[str, dict[str, tuple[str, int, bool]]]]:
    name = prefix + message.name
    yield name, {field.name: (type_name(field), field.number, is_repeated(field)) for field in message.fields}
    for nested in message.nested_types:
        if not nested.GetOptions().map_entry:
            yield from generated_fields(nested, f"{name}.")


def type_name(field: FieldDescriptor) -> str:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields
        return f"map<{type_name(key)}, {type_name(value)}>"
    if field.message_type is not None:
        return str(field.message_type.name)
    if field.enum_type is not None:
        return str(field.enum_type.name)
    names = {getattr(FieldDescriptor, name): name for name in dir(FieldDescriptor) if name.startswith("TYPE_")}
    return names[field.type].removeprefix("TYPE_").lower()


def is_repeated(field: FieldDescriptor) -> bool:
    repeated = getattr(field, "is_repeated", None)
    return bool(field.label == FieldDescriptor.LABEL_REPEATED if repeated is None else repeated)


def test_the_generated_code_is_of_this_proto() -> None:
    generated: dict[str, Any] = {}
    for message in inference_pb2.DESCRIPTOR.message_types_by_name.values():
        generated.update(generated_fields(message))
    written = written_fields()
    assert len(written) > 60
    assert generated == written


def test_every_field_is_written_as_triton_writes_it() -> None:
    triton = pytest.importorskip("tritonclient.grpc.service_pb2")
    model_config = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    theirs: dict[str, Any] = {}
    for file in (triton, model_config):
        for message in file.DESCRIPTOR.message_types_by_name.values():
            theirs.update(generated_fields(message))
    for name, fields in written_fields().items():
        for field, said in fields.items():
            assert theirs[name][field] == said, f"{name}.{field}"


def test_every_enum_value_is_tritons() -> None:
    triton = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    ours = inference_pb2.DESCRIPTOR.enum_types_by_name["DataType"]
    theirs = triton.DESCRIPTOR.enum_types_by_name["DataType"]
    assert {v.name: v.number for v in ours.values} == {v.name: v.number for v in theirs.values}


def test_every_call_of_the_service_has_a_handler() -> None:
    (service,) = inference_pb2.DESCRIPTOR.services_by_name.values()
    assert service.full_name == servicer.SERVICE
    assert {method.name for method in service.methods} == {*calls.METHODS, "ModelInfer", "ModelStreamInfer"}
    for method in service.methods:
        if method.name in calls.METHODS:
            assert calls.METHODS[method.name].message.DESCRIPTOR is method.input_type
