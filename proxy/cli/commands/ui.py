"""`pullcache ui`: open the pages of the running daemon in a browser."""

import os
import subprocess
from pathlib import Path

import click

from proxy.cli.api_client import open_admin_client
from proxy.cli.options import config_options, load_config

# Programs that open a link in the user's browser; the first that exists is taken.
_OPENERS = ("xdg-open", "open")


@click.command()
@config_options
@click.option("--no-browser", is_flag=True, help="Print the link, and open no browser.")
def ui(*, path: Path | None, store: str | None, no_browser: bool) -> None:
    """Open the pages of the running daemon in a browser.

    Prints a link, which logs in once and within a minute. Without `server.admin_listen`, the daemon
    opens a port on loopback for this, until it stops. From another machine, forward the port: ssh -L.

    \b
    Examples:
      pullcache ui
      pullcache ui --no-browser
    """
    with open_admin_client(load_config(path, store), allow_embedded=False) as api:
        link = api.post("/api/v1/pages/link")
    click.echo(link["url"])
    if link["seconds"]:
        click.echo(f"The link logs in once, within {link['seconds']} seconds.", err=True)
    if not no_browser and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        _open_browser(link["url"])


def _open_browser(url: str) -> None:
    """Open a link with the desktop's program for that, if there is one."""
    from shutil import which  # noqa: PLC0415 - no other command needs it

    opener = next(filter(None, map(which, _OPENERS)), None)
    if opener:
        subprocess.Popen(  # noqa: S603 (a link of our daemon)
            [opener, url],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
