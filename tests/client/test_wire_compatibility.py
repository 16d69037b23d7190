"""Every message that the contract uses: written by one side, read by the other, equal in every field."""

import pytest
from google.protobuf import json_format
from google.protobuf.unknown_fields import UnknownFieldSet

from graftserve.client import wire
from graftserve.client.wire.methods import (
    METHODS,
    PREDICT,
    SIGNATURE_DEF_MAP_TYPE_URL,
    pack_signature_def_map,
    unpack_signature_def_map,
)

SPEC = {"name": "m", "version": "7", "signatureName": "s"}
LABELLED = {"name": "m", "versionLabel": "stable"}
SHAPE = {"dim": [{"size": "-1", "name": "batch"}, {"size": "3"}]}
TENSOR = {
    "dtype": "DT_FLOAT",
    "tensorShape": SHAPE,
    "versionNumber": 1,
    "tensorContent": "AAAA",
    "floatVal": [0.5, -1],
    "doubleVal": [0.25],
    "intVal": [-7],
    "stringVal": ["AP8=", ""],
    "scomplexVal": [1, 2],
    "int64Val": ["-9007199254740993"],
    "boolVal": [True, False],
    "dcomplexVal": [3, 4],
    "halfVal": [15360],
    "uint32Val": [4294967295],
    "uint64Val": ["18446744073709551615"],
}
INFO = {"name": "x:0", "dtype": "DT_STRING", "tensorShape": SHAPE}
SIGNATURE = {"inputs": {"x": INFO}, "outputs": {"y": INFO, "z": {"dtype": "DT_BOOL"}}, "methodName": "p"}
REQUEST = {"modelSpec": SPEC, "inputs": {"x": TENSOR}, "outputFilter": ["y", "z"]}
RESPONSE = {"modelSpec": SPEC, "outputs": {"y": TENSOR}}
MESSAGES = [
    ("TensorProto", TENSOR),
    ("TensorProto", {"dtype": "DT_UINT64", "tensorShape": {"unknownRank": True}}),
    ("ModelSpec", SPEC),
    ("ModelSpec", LABELLED),
    ("ModelSpec", {"name": "m", "version": "0"}),
    ("PredictRequest", REQUEST),
    ("PredictResponse", RESPONSE),
    ("SignatureDef", SIGNATURE),
    ("GetModelMetadataRequest", {"modelSpec": SPEC, "metadataField": ["signature_def"]}),
    ("GetModelStatusRequest", {"modelSpec": LABELLED}),
    ("StatusProto", {"errorCode": "UNAUTHENTICATED", "errorMessage": "who?"}),
    (
        "GetModelStatusResponse",
        {
            "modelVersionStatus": [
                {"version": "1", "state": "AVAILABLE", "status": {}},
                {
                    "version": "2",
                    "state": "END",
                    "status": {"errorCode": "DATA_LOSS", "errorMessage": "broken"},
                },
            ]
        },
    ),
    ("SignatureDefMap", {"signatureDef": {"serving_default": SIGNATURE, "features": {}}}),
    ("PredictionLog", {"predictLog": {"request": REQUEST, "response": RESPONSE}}),
    (
        "ModelServerConfig",
        {
            "modelConfigList": {
                "config": [
                    {
                        "name": "m",
                        "basePath": "/models/m",
                        "modelPlatform": "tensorflow",
                        "modelVersionPolicy": {"specific": {"versions": ["3", "9223372036854775807"]}},
                        "versionLabels": {"stable": "3"},
                    },
                    {"name": "n", "modelVersionPolicy": {"latest": {"numVersions": 2}}},
                    {"name": "o", "modelVersionPolicy": {"all": {}}},
                ]
            }
        },
    ),
    (
        "ReloadConfigRequest",
        {
            "config": {
                "modelConfigList": {
                    "config": [
                        {
                            "name": "m",
                            "modelType": "TENSORFLOW",
                            "loggingConfig": {
                                "logCollectorConfig": {"type": "file", "filenamePrefix": "/logs/m"},
                                "samplingConfig": {"samplingRate": 0.5},
                            },
                        }
                    ]
                }
            }
        },
    ),
    ("ReloadConfigResponse", {"status": {"errorCode": "ABORTED", "errorMessage": "later"}}),
]


def as_dict(message):
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def parse(fields, message):
    return json_format.ParseDict(fields, message)


@pytest.mark.parametrize(("name", "fields"), MESSAGES, ids=[name for name, _ in MESSAGES])
def test_messages_agree_both_ways(name, fields, serving_apis):
    ours = parse(fields, getattr(wire, name)())
    assert as_dict(ours), "a test that compares nothing proves nothing"
    theirs = getattr(serving_apis, name).FromString(ours.SerializeToString())
    assert as_dict(theirs) == as_dict(ours)
    assert not list(unknown_fields(theirs))
    back = getattr(wire, name).FromString(theirs.SerializeToString())
    assert back == ours


def unknown_fields(message):
    yield from UnknownFieldSet(message)
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if field.message_type.GetOptions().map_entry:
            if field.message_type.fields_by_name["value"].message_type is not None:
                for item in value.values():
                    yield from unknown_fields(item)
        elif isinstance(value, type(message)) or hasattr(value, "ListFields"):
            yield from unknown_fields(value)
        else:
            for item in value:
                yield from unknown_fields(item)


def test_metadata_agrees_both_ways(serving_apis):
    fields = {"signatureDef": {"serving_default": SIGNATURE}}
    ours = wire.GetModelMetadataResponse(model_spec=wire.ModelSpec(name="m"))
    ours.metadata["signature_def"].CopyFrom(pack_signature_def_map(parse(fields, wire.SignatureDefMap())))
    theirs = serving_apis.GetModelMetadataResponse.FromString(ours.SerializeToString())
    signatures = serving_apis.SignatureDefMap()
    assert theirs.metadata["signature_def"].Unpack(signatures)
    assert as_dict(signatures) == as_dict(parse(fields, wire.SignatureDefMap()))

    packed = serving_apis.GetModelMetadataResponse()
    packed.metadata["signature_def"].Pack(signatures)
    assert packed.metadata["signature_def"].type_url == SIGNATURE_DEF_MAP_TYPE_URL
    back = wire.GetModelMetadataResponse.FromString(packed.SerializeToString())
    assert as_dict(unpack_signature_def_map(back.metadata["signature_def"])) == as_dict(signatures)


def test_every_enum_agrees(serving_apis):
    pairs = [
        (wire.Code, serving_apis.StatusProto.DESCRIPTOR.fields_by_name["error_code"]),
        (wire.ModelVersionStatus.State, serving_apis.ModelVersionStatus.DESCRIPTOR.fields_by_name["state"]),
        (wire.DataType, serving_apis.TensorProto.DESCRIPTOR.fields_by_name["dtype"]),
    ]
    for ours, field in pairs:
        theirs = {value.name: value.number for value in field.enum_type.values}
        assert dict(ours.items()).items() <= theirs.items()


def test_every_field_of_ours_has_their_number_and_type(serving_apis):
    for name in wire.__all__:
        if not hasattr(getattr(wire, name), "DESCRIPTOR") or not hasattr(serving_apis, name):
            continue
        theirs = getattr(serving_apis, name).DESCRIPTOR.fields_by_name
        for field in getattr(wire, name).DESCRIPTOR.fields:
            assert (field.number, field.type) == (theirs[field.name].number, theirs[field.name].type)


def test_paths_are_the_real_services(tensorflow, serving_apis):
    from tensorflow_serving.apis import model_service_pb2, prediction_service_pb2

    services = {
        service.full_name: service
        for module in (model_service_pb2, prediction_service_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
    }
    for method in METHODS:
        real = services[method.service].methods_by_name[method.name]
        assert real.input_type.name == method.request.__name__
        assert real.output_type.name == method.response.__name__
    assert PREDICT.path == "/tensorflow.serving.PredictionService/Predict"


@pytest.mark.parametrize(
    ("type_url", "value", "message"),
    [
        ("", b"", "an empty Any"),
        ("type.googleapis.com/tensorflow.SignatureDef", b"", "tensorflow.SignatureDef"),
        (SIGNATURE_DEF_MAP_TYPE_URL, b"\xff", "1 other bytes"),
    ],
)
def test_what_is_no_signature_def_map_is_refused(type_url, value, message):
    packed = type(pack_signature_def_map(wire.SignatureDefMap()))(type_url=type_url, value=value)
    with pytest.raises(ValueError, match=message):
        unpack_signature_def_map(packed)
