"""A session that counts for as long as it may run."""

import time
from typing import BinaryIO


def main(reader: BinaryIO, writer: BinaryIO) -> None:
    """Once spoken to, write the time every 10 ms."""
    if not reader.read(1):
        return
    while True:
        writer.write(f"{time.monotonic()}\n".encode())
        writer.flush()
        time.sleep(0.01)
