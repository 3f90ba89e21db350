"""`pullcache completion`: the script with which a shell completes commands, options and images."""

import click
from click.shell_completion import get_completion_class

_VARIABLE = "_PULLCACHE_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script that completes commands, options and images.

    The Debian package installs it for all three shells.

    \b
    Examples:
      source <(pullcache completion bash)
      pullcache completion fish | source
    """
    complete = get_completion_class(shell)
    assert complete is not None
    click.echo(complete(ctx.find_root().command, {}, "pullcache", _VARIABLE).source())
