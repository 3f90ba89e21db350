"""`python -m proxy` is `pullcache`."""

from proxy.cli import main

main(prog_name="pullcache")
