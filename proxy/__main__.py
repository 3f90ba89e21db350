"""Run the `pullcache` command as `python -m proxy`."""

from proxy.cli import main

main(prog_name="pullcache")
