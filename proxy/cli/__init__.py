"""The commands. stdout is data, stderr is progress and log.

Nothing here imports aiohttp at start: `pullcache --help` answers at once.
"""

import sys

import click

from proxy import __version__
from proxy.cli.commands.bundles import export, import_
from proxy.cli.commands.check_offline import check_offline
from proxy.cli.commands.client_config import client_config
from proxy.cli.commands.config import config
from proxy.cli.commands.fsck import fsck
from proxy.cli.commands.images import images, inspect, pin, rm, unpin
from proxy.cli.commands.preload import preload
from proxy.cli.commands.search import search
from proxy.cli.commands.serve import serve
from proxy.cli.commands.status import offline, status
from proxy.cli.errors import INTERRUPTED, exit_code, format_error
from proxy.journal import is_journal_stream, priority_prefix


class CommandGroup(click.Group):
    """The commands; an expected error becomes one line and an exit code."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; what fails in a foreseen way becomes one line and an exit code."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)
        except Exception as error:
            code = exit_code(error)
            if code is None:
                raise
            text = f"pullcache: {format_error(error)}"
            # So that `journalctl -p err` shows why a service did not start.
            mark = priority_prefix("error").decode() if is_journal_stream(sys.stderr) else ""
            click.echo(f"{mark}{text}", err=True)
            ctx.exit(code)


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pullcache")
def main() -> None:
    """Keep container images near: a pull-through cache for Docker Hub and other registries.

    Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 bad bytes found, 4 partly done.
    """


main.add_command(serve)
main.add_command(config)
main.add_command(fsck)
main.add_command(status)
main.add_command(offline)
main.add_command(preload)
main.add_command(export)
main.add_command(import_)
main.add_command(images)
main.add_command(inspect)
main.add_command(rm)
main.add_command(pin)
main.add_command(unpin)
main.add_command(check_offline)
main.add_command(search)
main.add_command(client_config)
