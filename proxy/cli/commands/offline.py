"""`pullcache offline`: the switch that keeps the running daemon from dialling out."""

from pathlib import Path

import click

from proxy.cli.api_client import admin_api
from proxy.cli.options import config_options, load_config


@click.command()
@config_options
@click.argument("switch", type=click.Choice(("on", "off")))
def offline(*, path: Path | None, store: str | None, switch: str) -> None:
    """Keep the running daemon from asking any upstream, or let it again.

    It holds at once, for what is under way too, and until the daemon ends: a start takes `offline` of the configuration.
    """
    # A private daemon would forget it with the end of this command.
    with admin_api(load_config(path, store), private=False) as api:
        api.put("/api/v1/offline", {"offline": switch == "on"})
    click.echo(f"offline is {switch}")
