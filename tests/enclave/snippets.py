"""A worker as a test has it: snippets of Python in, values or errors out."""

import json
from typing import Any

from rapha_lab.enclave.sandbox import Worker


class Cell:
    """A worker that runs snippets of Python; `run` gives their `result`."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def tell(self, source: str) -> None:
        """Send a snippet without waiting for its answer."""
        self.worker.writer.write(json.dumps(source).encode() + b"\n")
        self.worker.writer.flush()

    def answer(self) -> dict[str, Any]:
        """The next answer."""
        line = self.worker.reader.readline()
        assert line, f"the worker ended: {self.worker.wait(10)}"
        return json.loads(line)

    def run(self, source: str) -> Any:
        """The value of a snippet's name `result`; fails if it raises."""
        self.tell(source)
        answer = self.answer()
        assert "error" not in answer, answer["trace"]
        return answer["value"]

    def error(self, source: str) -> tuple[str, str]:
        """The kind and text of what a snippet raises."""
        self.tell(source)
        answer = self.answer()
        return answer["error"], answer["text"]
