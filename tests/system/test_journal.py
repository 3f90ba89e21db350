"""A real journald, in a mount namespace of its own, that reads the daemon's stderr."""

import subprocess
import sys
from pathlib import Path

from tests.system.processes import fenced

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


def test_journalctl_finds_by_priority_what_the_daemon_logs(place: Path):
    root = place / "journal"
    broken = root / "pullcache.toml"
    root.mkdir()
    broken.write_text("[store]\nmax_size = 'much'\n")
    # Listening everywhere without a login is a warning, a file that cannot be used an error.
    daemon = """
"$0" -m proxy serve --listen '[::]:0' --store "$1" --offline &
for _ in $(seq 400); do [ -S "$1/admin.sock" ] && break; sleep 0.05; done
kill "$!"; wait "$!"
"$0" -m proxy serve --config "$2"
:"""
    subprocess.run(
        [
            *("unshare", "--mount", "--propagation", "private", "sh", "-c", SCRIPT),
            *(root / "found", "sh", "-c", daemon, sys.executable, root / "store", broken),
        ],
        env=fenced(),
        timeout=50,
        check=True,
    )
    found = {level: (root / f"found.{level}").read_text() for level in ("info", "warning", "err")}
    assert '"event":"daemon_started"' in found["info"]
    assert '"event":"daemon_started"' not in found["warning"]
    assert '"event":"listener_without_auth"' in found["warning"]
    assert '"event":"listener_without_auth"' not in found["err"]
    assert "store.max_size" in found["err"]
    assert "<" not in "".join(line[:1] for line in found["info"].splitlines())
