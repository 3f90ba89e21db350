"""A node that belongs to no fleet."""

import subprocess
import sys

from proxy.fleet.alone import Alone
from proxy.fleet.directory import Directory, Member
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository, Tag

BLOB = Digest.from_content(b"blob")
NGINX = Repository("docker.io", "library/nginx")


async def test_a_node_alone_fetches_from_upstream():
    directory: Directory = Alone()
    async with directory.downloading("docker.io", BLOB) as download:
        assert await download.locate() is None
        await download.report(Member("http://10.0.0.7:5000", "1"), "stall")
        assert await download.locate() is None
    assert not directory.members
    assert not await directory.is_held(BLOB)
    assert not directory.is_blind


async def test_a_node_alone_keeps_no_tags_and_no_limits_for_others():
    directory: Directory = Alone()
    directory.add_holdings([BLOB])
    directory.remove_holdings([BLOB])
    await directory.set_tag(NGINX, Tag("1"), BLOB, ttl=60, keep=60)
    assert await directory.get_tag(NGINX, Tag("1")) is None
    await directory.release_tag(NGINX, Tag("1"))
    await directory.limit("docker.io", "pulls", 60)
    assert await directory.limited_for("docker.io", "pulls") == 0


async def test_a_node_alone_leads_every_job():
    async with Alone().lead("preload", keep=60) as is_leader:
        assert is_leader


def test_the_daemon_starts_without_redis():
    script = "import sys, proxy.daemon; sys.exit('redis' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
