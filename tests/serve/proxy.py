"""A TCP proxy between two ends of a connection, which a test cuts."""

from __future__ import annotations

import contextlib
import socket
import threading


class Proxy:
    """Forwards TCP to `target` in threads."""

    def __init__(self, target: str):
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._pairs: list[tuple[socket.socket, socket.socket]] = []  # of a client and the server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "127.0.0.1:%d" % self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                self._pairs.append((client, server))
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=_forward, args=ends, daemon=True).start()

    def cut(self, silent: bool = False) -> None:
        """Breaks what is connected now. `silent`: the server hears nothing of that, or of the client, any more."""
        pairs, self._pairs = self._pairs, []
        for client, server in pairs:
            _end(client)
            if not silent:
                _end(server)

    def close(self) -> None:
        self.cut()
        _end(self._listener)


def _forward(source: socket.socket, sink: socket.socket) -> None:
    """What the sink does not take any more is lost; the end of one direction says nothing to the other."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            with contextlib.suppress(OSError):
                sink.sendall(data)


def _end(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
