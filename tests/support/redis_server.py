"""A real Redis (or Valkey) server on a Unix socket, for the directory of a fleet."""

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

PROGRAM = shutil.which("redis-server") or shutil.which("valkey-server")
# A skip's reason.
MISSING = "needs Debian's redis-server (or valkey-server): a fleet's directory is tested with the real one"
# Seconds for its start and its end.
PATIENCE = 30.0


class RedisServer:
    """The server, whose data is only in memory. All methods block."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.socket = directory / "redis.sock"
        self.url = f"unix://{self.socket}"
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        """Start it, and wait until it answers."""
        assert PROGRAM is not None
        with suppress(FileNotFoundError):
            self.socket.unlink()
        arguments = ("--port", "0", "--unixsocket", self.socket, "--save", "", "--appendonly", "no")
        self._process = subprocess.Popen(
            [PROGRAM, *arguments, *self._options, *options],
            cwd=self.socket.parent,
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + PATIENCE
        while not self._answers():
            assert time.monotonic() < deadline, "redis-server does not answer"
            assert self._process.poll() is None, "redis-server has ended"
            time.sleep(0.005)

    def kill(self) -> None:
        """End it at once; all data is lost."""
        self.signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait(PATIENCE)

    def signal(self, number: int) -> None:
        """Send a signal to it, such as SIGSTOP."""
        assert self._process is not None
        os.kill(self._process.pid, number)

    def close(self) -> None:
        """End it, if it runs."""
        if self._process and self._process.poll() is None:
            self.kill()

    def command(self, *words: str) -> bytes:
        """Run a command on a connection of its own, and return the answer as the protocol has it."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(str(self.socket))
            parts = [f"*{len(words)}\r\n".encode()]
            for word in words:
                raw = word.encode(errors="surrogateescape")
                parts.append(b"$%d\r\n%s\r\n" % (len(raw), raw))
            connection.sendall(b"".join(parts))
            return connection.recv(1 << 20)

    def _answers(self) -> bool:
        try:
            return self.command("PING").startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False
