"""A debugger's client: enough of the Debug Adapter Protocol to attach, stop at a line, and go on."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

#: For each thing that is waited for (seconds); busy machines take their time.
PATIENCE = 60.0

Message = dict[str, Any]


class Debugger:
    """One connection to a debug adapter.  Use it in a `with` block."""

    def __init__(self, host: str, port: int) -> None:
        self._sock = socket.create_connection((host, port), PATIENCE)
        self._file = self._sock.makefile("rb")
        self._number = 0
        #: Every message so far that nobody has asked for.
        self._seen: list[Message] = []

    @classmethod
    def at(cls, address: str) -> Debugger:
        """Connect to HOST:PORT."""
        host, _, port = address.rpartition(":")
        return cls(host.strip("[]"), int(port))

    def __enter__(self) -> Debugger:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
        self._sock.close()

    def initialize(self) -> Message:
        """What every session begins with; the answer's body."""
        body = self.ask("initialize", adapterID="python", clientID="test", pathFormat="path")["body"]
        assert isinstance(body, dict)
        return body

    def attach(self, path: str = "", line: int = 0) -> None:
        """Attach, with a breakpoint in a file; who waits for a client goes on."""
        self.initialize()
        attach = self.send("attach", justMyCode=False)
        self.event("initialized")
        if path:
            self.ask("setBreakpoints", source={"path": path}, breakpoints=[{"line": line}])
        self.ask("configurationDone")
        self._wait(lambda message: message.get("request_seq") == attach and message["success"])

    def go_on(self, stopped: Message) -> None:
        """Leave the breakpoint of which the event `stopped` told."""
        self.ask("continue", threadId=stopped["body"]["threadId"])

    def event(self, name: str) -> Message:
        return self._wait(lambda message: message.get("event") == name)

    def ask(self, command: str, **arguments: Any) -> Message:
        number = self.send(command, **arguments)
        answer = self._wait(lambda message: message.get("request_seq") == number)
        assert answer["success"], answer
        return answer

    def send(self, command: str, **arguments: Any) -> int:
        self._number += 1
        message = {"seq": self._number, "type": "request", "command": command, "arguments": arguments}
        body = json.dumps(message).encode()
        self._sock.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        return self._number

    def _wait(self, wanted: Callable[[Message], bool]) -> Message:
        for message in self._seen:
            if wanted(message):
                self._seen.remove(message)
                return message
        while True:
            message = self._read()
            if wanted(message):
                return message
            self._seen.append(message)

    def _read(self) -> Message:
        size = 0
        while (line := self._file.readline()) not in (b"\r\n", b""):
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                size = int(value)
        assert size, "the adapter has closed the connection"
        message: Message = json.loads(self._file.read(size))
        return message
