"""A kubectl without a cluster, for tests: it writes down what it is asked for, and answers as it is told.

    python fake_kubectl.py FOLDER ARGUMENT...

Each call adds a line of JSON to FOLDER/calls: its arguments, and stable.env and canary.env of the folder that
-k names as they are at that moment. FOLDER/answers holds a list of answers in JSON, each used once: the first
whose `words` are all among the arguments says what is written to `stdout` and `stderr`, the exit status `rc`,
and `sleep_s`, how long it takes. Without one the call succeeds.
"""

import json
import sys
import time
from pathlib import Path


def main() -> None:
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    call = {"arguments": arguments}
    if "-k" in arguments:
        overlay = Path(arguments[arguments.index("-k") + 1])
        call |= {name: (overlay / name).read_text() for name in ("stable.env", "canary.env")}
    with open(folder / "calls", "a") as file:
        file.write(json.dumps(call) + "\n")
    answers = json.loads((folder / "answers").read_text())
    for index, answer in enumerate(answers):
        if set(answer["words"]) <= set(arguments):
            del answers[index]
            (folder / "answers").write_text(json.dumps(answers))
            time.sleep(answer.get("sleep_s", 0))
            sys.stdout.write(answer.get("stdout", ""))
            sys.stderr.write(answer.get("stderr", ""))
            sys.exit(answer.get("rc", 0))


if __name__ == "__main__":
    main()
