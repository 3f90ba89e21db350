"""A real journald, in a separate mount namespace, reads the daemon's stderr."""

import subprocess
import sys
from pathlib import Path

from tests.system.processes import isolated_environment

# As systemd starts a service: stderr is journald's stream socket, and JOURNAL_STREAM names it.
SCRIPT = """
mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /var/log || exit 1
mkdir -p /run/systemd/journald.conf.d /run/log/journal
printf '[Journal]\\nReadKMsg=no\\nForwardToWall=no\\n' >/run/systemd/journald.conf.d/test.conf
"$(command -v systemd-journald || echo /lib/systemd/systemd-journald)" &
trap "kill $!" EXIT
for _ in $(seq 400); do [ -S /run/systemd/journal/stdout ] && break; sleep 0.05; done
systemd-cat sh -c 'export JOURNAL_STREAM="$(stat -L -c %d:%i /proc/self/fd/2)"; exec "$@"' - "$@"
journalctl --sync
for level in info warning err; do
    journalctl -p "$level" --output cat --no-pager >"$0.$level"
done
"""


def test_journalctl_finds_the_daemon_s_log_lines_by_priority(directory: Path):
    root = directory / "journal"
    invalid = root / "pullcache.toml"
    root.mkdir()
    invalid.write_text("[store]\nmax_size = 'much'\n")
    # A listener for other machines without a login logs a warning, an invalid configuration an
    # error.
    daemon = """
"$0" -m proxy serve --listen '[::]:0' --store "$1" --offline &
for _ in $(seq 400); do [ -S "$1/admin.sock" ] && break; sleep 0.05; done
kill "$!"; wait "$!"
"$0" -m proxy serve --config "$2"
:"""
    subprocess.run(
        [
            *("unshare", "--mount", "--propagation", "private", "sh", "-c", SCRIPT),
            *(root / "lines", "sh", "-c", daemon, sys.executable, root / "store", invalid),
        ],
        env=isolated_environment(),
        timeout=50,
        check=True,
    )
    lines = {level: (root / f"lines.{level}").read_text() for level in ("info", "warning", "err")}
    assert '"event":"daemon_started"' in lines["info"]
    assert '"event":"daemon_started"' not in lines["warning"]
    assert '"event":"listener_without_auth"' in lines["warning"]
    assert '"event":"listener_without_auth"' not in lines["err"]
    assert "store.max_size" in lines["err"]
    # journald has removed the priority prefixes, as in "<6>".
    assert "<" not in "".join(line[:1] for line in lines["info"].splitlines())
