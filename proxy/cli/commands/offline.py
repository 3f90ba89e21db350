"""`pullcache offline`: switch the running daemon offline or online."""

from pathlib import Path

import click

from proxy.cli.api_client import open_admin_client
from proxy.cli.fleet import call_fleet, fleet_option, show_answers
from proxy.cli.options import config_options, load_config


@click.command()
@config_options
@fleet_option
@click.argument("switch", type=click.Choice(("on", "off")))
def offline(*, path: Path | None, store: str | None, is_fleet: bool, switch: str) -> None:
    """Switch the daemon offline or online.

    Offline, it never connects to upstream and serves cached content only. Takes effect at once,
    also for running requests. Lasts until the daemon stops; at start, `offline` in the
    configuration applies.

    \b
    Examples:
      pullcache offline on
      pullcache offline on --fleet
    """
    document = {"offline": switch == "on"}
    if is_fleet:
        answers = call_fleet(path, store, "PUT", "/api/v1/offline", document)
        show_answers(answers, lambda _: f"offline mode is {switch}")
        return
    # An embedded daemon would forget the switch when this command ends.
    with open_admin_client(load_config(path, store), allow_embedded=False) as api:
        api.put("/api/v1/offline", document)
    click.echo(f"offline mode is {switch}")
