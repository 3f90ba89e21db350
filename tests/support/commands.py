"""Commands run by a test: in this process, or in one of their own on a terminal."""

import asyncio
import logging
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import structlog
from click.testing import CliRunner, Result

from proxy.cli import main


def run(*arguments: str | Path, stdin: str | bytes = "") -> Result:
    """Run a command in this process. An exception that has no exit code fails the test."""
    # A command that embeds a daemon configures the log for its own stderr, which ends with it.
    before, level = structlog.get_config(), logging.getLogger().level
    try:
        result = CliRunner().invoke(main, [*map(str, arguments)], input=stdin)
    finally:
        structlog.configure(**before)
        logging.getLogger().setLevel(level)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


async def run_on(program: Any, *arguments: str | Path, stdin: str | bytes = "") -> Result:
    """Run a command on the store of `program`, in a thread, while its daemon serves in the loop."""
    return await asyncio.to_thread(run, *arguments, "--store", program.root, stdin=stdin)


async def run_on_terminal(
    program: Any, *arguments: str | Path, columns: int = 120, exit_code: int | None = 0
) -> str:
    """Run a command on the store of `program` on a terminal; return what it shows."""
    command = [*arguments, "--store", program.root]
    return await asyncio.to_thread(read_terminal, *command, columns=columns, exit_code=exit_code)


def read_terminal(*arguments: str | Path, columns: int = 120, exit_code: int | None = 0) -> str:
    """Run a command on a terminal; return what it shows. An `exit_code` of None is not checked."""
    controller, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), "LINES": "30"}
    command = [sys.executable, "-m", "proxy", *map(str, arguments)]
    with subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment) as process:
        os.close(terminal)
        content = bytearray()
        try:
            while chunk := os.read(controller, 1 << 16):
                content += chunk
        except OSError:
            pass  # Linux reports the end of a terminal's output as an error
    os.close(controller)
    if exit_code is not None:
        assert process.returncode == exit_code, content
    return content.decode()
