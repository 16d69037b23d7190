"""The tree of errors and the mapping of gRPC's statuses."""

import builtins
import copy
import pickle

import grpc
import pytest

import graftserve.client
from graftserve.client import errors

BRANCHES = {errors.RetryError, errors.RequestError, errors.GiveUpError}
CLASSES = [
    item
    for item in (getattr(errors, name) for name in errors.__all__)
    if isinstance(item, type) and item is not errors.ClientError
]


def test_every_status_is_mapped():
    assert set(errors._CLASSES) == set(grpc.StatusCode)
    for code in grpc.StatusCode:
        assert errors.error_class(code) not in {errors.ClientError, *BRANCHES}


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_is_in_one_branch_and_in_the_drawing(cls):
    assert sum(issubclass(cls, branch) for branch in BRANCHES) == 1
    assert f" {cls.__name__} " in errors.__doc__
    assert not hasattr(builtins, cls.__name__)
    assert getattr(graftserve.client, cls.__name__) is cls


@pytest.mark.parametrize("code", grpc.StatusCode)
def test_the_message_says_what_came_from_where(code):
    error = errors.from_status(code, "the reason", target="host:1", model="flowers", attempts=3)
    assert isinstance(error, errors.ClientError)
    assert (error.code, error.target, error.model, error.details) == (code, "host:1", "flowers", "the reason")
    for part in (code.name, "host:1", "'flowers'", "after 3 attempts", "the reason"):
        assert part in str(error)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_has_the_same_attributes_and_survives_pickling(cls):
    plain = cls("message")
    assert (plain.code, plain.target, plain.model, plain.details) == (None, "", "", "")
    error = cls("message", code=grpc.StatusCode.ABORTED, target="t", model="m", details="d")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == "message"
    assert vars(again) == vars(error)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_can_be_copied_for_each_who_shares_it(cls):
    error = cls("message", code=grpc.StatusCode.ABORTED, target="t", model="m", details="d")
    if cls is errors.InvalidImageError:
        error.indexes = (3,)
    own = copy.copy(error)
    assert type(own) is cls
    assert own is not error
    assert str(own) == "message"
    assert vars(own) == vars(error)
    own.details = "other"
    assert error.details == "d"
