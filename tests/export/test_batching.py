"""The batching parameters: what is refused, and how a server is told."""

import pytest

from graftserve.export import Batching


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sizes": ()}, "sizes"),
        ({"sizes": (4, 2)}, "sizes: expected ascending"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"timeout_us": -1}, "timeout_us"),
        ({"max_request_images": 4}, "max_request_images: expected at least 8"),
        ({"max_queued_batches": 5}, "max_queued_batches: expected at least 128"),
    ],
)
def test_batching_is_checked(values, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batching(**values)


def test_the_file_for_a_server() -> None:
    """tensorflow-serving-api does not ship BatchingParameters, so its text is compared as it is."""
    batching = Batching(threads=3, sizes=(1, 2, 16), timeout_us=500)
    assert batching.to_text() == (
        "max_batch_size { value: 16 }\n"
        "batch_timeout_micros { value: 500 }\n"
        "max_enqueued_batches { value: 4096 }\n"
        "num_batch_threads { value: 3 }\n"
        "allowed_batch_sizes: 1\n"
        "allowed_batch_sizes: 2\n"
        "allowed_batch_sizes: 16\n"
    )
