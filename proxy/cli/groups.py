"""Groups of commands whose help shows each summary as a whole."""

from collections.abc import Mapping, Sequence

import click

# click truncates summaries to one line; they are wrapped in place of that.
_NO_LIMIT = 1000


class SummaryGroup(click.Group):
    """A group that lists its commands in sections, by default in one."""

    def command_sections(self) -> Mapping[str, Sequence[click.Command]]:
        """Return the commands by section, in order."""
        return {"Commands": [*self.commands.values()]}

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands with their summaries."""
        del ctx
        for title, commands in self.command_sections().items():
            with formatter.section(title):
                formatter.write_dl(
                    [(one.name or "", one.get_short_help_str(_NO_LIMIT)) for one in commands]
                )
