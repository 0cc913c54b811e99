"""The entry of a worker that attacks: for each line {"name", "facts"} one line {"open", "how"}."""

import json
from typing import BinaryIO

from outside import attempt


def main(reader: BinaryIO, writer: BinaryIO) -> None:
    """Attack as told until the pipe closes."""
    for line in reader:
        order = json.loads(line)
        writer.write(json.dumps(attempt(order["name"], {**order["facts"], "inside": True})).encode() + b"\n")
        writer.flush()
