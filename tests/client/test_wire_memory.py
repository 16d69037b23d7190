"""How often the content of a large tensor is copied, by the most memory that a process ever held."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

MIB = 200
PROGRAM = """
import re
import numpy as np
from graftserve.client.wire import PredictRequest, TensorProto
from graftserve.client.wire.encoding import predict_request
from graftserve.client.wire.tensors import tensor_parts, to_array, write_tensor, write_typed

def held_mib(name):
    with open("/proc/self/status") as file:
        return int(re.search(name + r":\\s+(\\d+) kB", file.read())[1]) / 1024

array = np.full({mib} * 2**18, 0.5, np.float32)
proto, request = TensorProto(), PredictRequest()
{before}
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew
base = held_mib("VmRSS")
{code}
print((held_mib("VmHWM") - base) / {mib}, (held_mib("VmRSS") - base) / {mib})
"""


@pytest.mark.parametrize(
    ("before", "code", "most_copies", "copies_kept"),
    [
        ("", "serialized = predict_request(request, {'x': tensor_parts(array)})", 1, 1),
        # protobuf takes bytes, and copies them.
        ("", "write_tensor(array, request.inputs['x'])", 2, 1),
        ("write_tensor(array, proto)", "result = to_array(proto)", 1, 1),
        # A packed field goes through serialized bytes.
        ("", "write_typed(array, proto)", 2, 1),
        ("write_typed(array, proto)", "result = to_array(proto)", 2, 1),
    ],
    ids=["into bytes", "into a message", "out of a message", "into a typed field", "out of a typed field"],
)
def test_content_is_copied_no_more_than_it_must(before, code, most_copies, copies_kept):
    program = PROGRAM.format(mib=MIB, before=before, code=code)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    peak, kept = map(float, done.stdout.split())
    assert peak == pytest.approx(most_copies, abs=0.1)
    assert kept == pytest.approx(copies_kept, abs=0.1)
