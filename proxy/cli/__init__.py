"""The `pullcache` command line: arguments in, data on stdout, progress and errors on stderr.

aiohttp and the daemon are imported only by commands that run them, so that `pullcache --help` is
fast.
"""

import sys
from collections.abc import Mapping, Sequence
from itertools import chain

import click

from proxy import __version__
from proxy.cli.commands.bundles import export, import_
from proxy.cli.commands.check_offline import check_offline
from proxy.cli.commands.client_config import client_config
from proxy.cli.commands.completion import completion
from proxy.cli.commands.config import config
from proxy.cli.commands.contents import sbom, scan
from proxy.cli.commands.df import df
from proxy.cli.commands.doctor import doctor
from proxy.cli.commands.events import events
from proxy.cli.commands.fsck import fsck
from proxy.cli.commands.images import images, inspect, pin, rm, unpin
from proxy.cli.commands.offline import offline
from proxy.cli.commands.policy import policy
from proxy.cli.commands.preload import preload
from proxy.cli.commands.refresh import refresh
from proxy.cli.commands.search import search
from proxy.cli.commands.serve import serve
from proxy.cli.commands.status import status
from proxy.cli.commands.top import top
from proxy.cli.commands.ui import ui
from proxy.cli.display.text import echo
from proxy.cli.exit_codes import INTERRUPTED, exit_code, format_error
from proxy.cli.groups import SummaryGroup
from proxy.journal import is_journal_stream, priority_prefix

# The commands in the order in which the help lists them.
COMMANDS: Mapping[str, Sequence[click.Command]] = {
    "Run": (serve, status, ui, doctor, offline, fsck),
    "Look": (images, inspect, sbom, scan, df, top, events, search, check_offline),
    "Fill and clear": (preload, refresh, pin, unpin, rm),
    "Carry": (export, import_),
    "Configure": (config, client_config, policy, completion),
}


class CommandGroup(SummaryGroup):
    """The group of all commands; turns expected errors into one line and an exit code."""

    def command_sections(self) -> Mapping[str, Sequence[click.Command]]:
        """Return the commands by what they are for."""
        return COMMANDS

    def invoke(self, ctx: click.Context) -> object:
        """Run the command. Errors without an exit code are bugs and keep their traceback."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)
        except Exception as error:
            code = exit_code(error)
            if code is None:
                raise
            # With a priority, `journalctl -p err` shows why the service did not start.
            prefix = priority_prefix("error").decode() if is_journal_stream(sys.stderr) else ""
            echo(f"{prefix}pullcache: {format_error(error)}", err=True)
            ctx.exit(code)


# \b keeps click from rewrapping the paragraph.
_HELP = """Pull-through cache for container images from Docker Hub and other registries.

\b
Exit codes:
  0  success
  1  failure
  2  usage or configuration error
  3  corruption found
  4  partial success

\b
Examples:
  pullcache serve
  pullcache client-config docker
  pullcache status
"""


@click.group(cls=CommandGroup, help=_HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pullcache")
def main() -> None:
    """Run the `pullcache` command line."""


for _command in chain.from_iterable(COMMANDS.values()):
    main.add_command(_command)
