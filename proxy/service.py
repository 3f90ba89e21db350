"""The configured part of the program: everything that depends on the configuration.

It uses the core and never changes. A reload builds a new one and replaces the old one; running
requests, downloads and operations finish with the old one.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from proxy import __version__
from proxy.bundle.export import BundleExporter
from proxy.bundle.import_ import BundleImporter
from proxy.cache.access import RepositoryAccess
from proxy.cache.blobs import BlobCache
from proxy.cache.content_fetcher import ContentFetcher
from proxy.cache.facts import FactsCache
from proxy.cache.fleet import FleetManifests
from proxy.cache.fleet_content import FleetContent
from proxy.cache.listings import ListingCache
from proxy.cache.manifest_store import ManifestStore
from proxy.cache.manifests import ManifestCache
from proxy.cache.policy import PolicyGate
from proxy.cache.prefetch import Prefetcher
from proxy.cache.refresh import TagRefresher
from proxy.cache.repair import BlobRepairer
from proxy.cache.search import RepositorySearch
from proxy.cache.stand_ins import StandIns
from proxy.concurrency import SingleFlight
from proxy.conditions import report_decision
from proxy.config import Config
from proxy.contents.questions import PackageQuestions
from proxy.contents.reader import ContentsReader
from proxy.contents.sboms.fetcher import SbomFetcher
from proxy.contents.scanner import ImageScanner
from proxy.core import Core
from proxy.images.check import OfflineChecker
from proxy.images.inspect import ImageInspector
from proxy.images.manage import ImageManager
from proxy.images.store import ImageStore
from proxy.images.usage import UsageReporter
from proxy.names import NameParser
from proxy.oci.platform import machine_platform
from proxy.policy.rules import RuleSet
from proxy.preload.preload import PreloadDeps, Preloader
from proxy.preload.resolve import ImageResolver
from proxy.repository_rules import RepositoryRules
from proxy.server.activity.handlers import ActivityHandlers
from proxy.server.activity.pull_test import PullTester
from proxy.server.admin import (
    bundles as admin_bundles,
    contents as admin_contents,
    images as admin_images,
    policy as admin_policy,
    preload as admin_preload,
    refresh as admin_refresh,
    schema as admin_schema,
    search as admin_search,
    status as admin_status,
    traffic as admin_traffic,
    trail as admin_trail,
    upstreams as admin_upstreams,
    usage as admin_usage,
)
from proxy.server.admin.api import Route
from proxy.server.admin.fleet import FleetHandlers
from proxy.server.admin.recording import ActRecorder
from proxy.server.registry.handlers import RegistryHandler
from proxy.server.setup.client_config import ClientConfigHandlers
from proxy.server.setup.settings import SettingsHandlers
from proxy.upstream.client import Upstream
from proxy.upstream.factory import is_unchanged


@dataclass(frozen=True, slots=True)
class ConfiguredApp:
    """The objects made from one configuration: its upstreams and handlers, preloader and repairer."""

    config: Config
    upstreams: Mapping[str, Upstream]
    registry: RegistryHandler
    preloader: Preloader
    policy: PolicyGate
    stand_ins: StandIns
    repairer: BlobRepairer
    scanner: ImageScanner
    routes: Sequence[Route]
    fleet_handlers: FleetHandlers


async def configure_app(
    core: Core, config: Config, previous: ConfiguredApp | None = None
) -> ConfiguredApp:
    """Build the configured part; unchanged upstreams are taken over from `previous`.

    Raises `ConfigError`, with nothing changed.
    """
    upstreams = {
        name: previous.upstreams[name]
        if previous and is_unchanged(name, previous.config, config)
        else await core.upstream_factory.open(config, name)
        for name in config.upstreams
    }
    access = RepositoryAccess(upstreams=upstreams, index=core.index, group=core.group)
    facts = FactsCache(
        upstreams=upstreams,
        records=core.policy_records,
        offline=core.offline,
        group=core.group,
        clock=core.clock,
    )
    rules = RuleSet(config.policy)
    stand_ins = StandIns(rules, core.index, core.space, core.clock)
    policy = PolicyGate(
        rules,
        index=core.index,
        records=core.policy_records,
        facts=facts,
        stand_ins=stand_ins,
        parser=core.parser,
        metrics=core.metrics,
        clock=core.clock,
        on_decision=partial(report_decision, core.webhook),
    )
    image_rules = RepositoryRules(config)
    manifests = ManifestCache(
        upstreams=upstreams,
        store=ManifestStore(
            core.store, core.index, core.space, core.metrics, core.disk_threads, core.parser
        ),
        index=core.index,
        access=access,
        policy=policy if config.policy else None,
        facts=facts,
        settings=config.manifests,
        rules=image_rules,
        group=core.group,
        clock=core.clock,
        fleet=FleetManifests(core.peers, upstreams) if core.peers else None,
    )
    blobs = BlobCache(
        upstreams=upstreams,
        store=core.store,
        index=core.index,
        space=core.space,
        downloads=core.downloads,
        access=access,
        settings=config.fetch,
    )
    listings = ListingCache(
        upstreams=upstreams,
        store=core.store,
        index=core.index,
        parser=core.parser,
        ttl=config.manifests.ttl,
        group=core.group,
        clock=core.clock,
    )
    search = RepositorySearch(
        config=config,
        upstreams=upstreams,
        index=core.index,
        facts=facts,
        group=core.group,
        clock=core.clock,
    )
    names = NameParser(config.upstreams)
    image_store = ImageStore(core.store, core.index, core.space, names, core.disk_threads)
    native_platform = machine_platform(platform.machine())
    checker = OfflineChecker(image_store, native_platform, rules, core.clock)
    preloader = Preloader(
        PreloadDeps(
            manifests=manifests,
            blobs=blobs,
            downloads=core.downloads,
            resolver=ImageResolver(upstreams, core.parser),
            listings=listings,
            checker=checker,
            image_store=image_store,
            upstreams=upstreams,
            metrics=core.metrics,
            parser=core.parser,
            native_platform=native_platform,
            fetch_settings=config.fetch,
            clock=core.clock,
        )
    )
    repairer = BlobRepairer(
        upstreams=upstreams,
        names=names,
        manifests=manifests,
        downloads=core.downloads,
        index=core.index,
        settings=config.fetch,
    )
    prefetch = (
        Prefetcher(
            core.downloads,
            core.index,
            access,
            upstreams,
            config.fetch,
            image_rules,
            core.metrics,
            core.group,
        )
        if image_rules.has_prefetch
        else None
    )
    registry = RegistryHandler(
        config.upstreams,
        manifests,
        blobs,
        listings,
        prefetch,
        search,
        core.peer_transfers,
        config.server.accel_redirect,
    )
    acts = ActRecorder(core.trail, names)
    image_manager = ImageManager(image_store, rules, core.clock, core.image_tables)
    tester = PullTester(manifests, blobs, names, core.parser, core.disk_threads, native_platform)
    content_fetcher = ContentFetcher(
        upstreams=upstreams,
        names=names,
        manifests=manifests,
        blobs=blobs,
        listings=listings,
        downloads=core.downloads,
        index=core.index,
        parser=core.parser,
        settings=config.fetch,
    )
    contents_reader = ContentsReader(
        image_store,
        core.contents_records,
        core.contents_worker,
        SbomFetcher(content_fetcher, core.disk_threads),
        SingleFlight(core.group),
        native_platform,
        core.clock,
        is_off=config.contents.scan == "off",
    )
    scanner = ImageScanner(
        config.contents.scanner,
        config.contents.scanner_timeout,
        config.contents.scan_every,
        core.addresses,
        contents_reader,
        core.contents_records,
        core.contents_worker,
        core.clock,
    )
    fleet_content = (
        FleetContent(
            directory=core.directory,
            upstreams=upstreams,
            manifests=manifests,
            blobs=blobs,
            downloads=core.downloads,
            settings=config.fetch,
        ).fetch
        if core.peers
        else None
    )
    fleet_handlers = FleetHandlers(
        str(config.fleet.name),
        str(config.fleet.address),
        __version__,
        core.directory,
        core.peers.call if core.peers else None,
    )
    # The routes of the admin API; `server/admin/api.py` says how to add one.
    routes = [
        *admin_schema.routes(),
        *_status_handlers(core, config, upstreams).routes(),
        *admin_traffic.TrafficHandlers(
            core.traffic_records, partial(core.write_traffic, config.statistics)
        ).routes(),
        *admin_bundles.BundleHandlers(
            BundleExporter(image_store, rules, core.clock, fleet_content),
            BundleImporter(image_store, core.clock, on_change=policy.forget),
            core.disk_threads,
            acts,
        ).routes(),
        *admin_contents.ContentsHandlers(
            contents_reader,
            PackageQuestions(
                image_store, core.contents_records, contents_reader, SingleFlight(core.group)
            ),
            scanner,
            acts,
        ).routes(),
        *admin_images.ImageHandlers(
            image_manager,
            checker,
            ImageInspector(image_store, rules, core.clock),
            acts,
            partial(core.write_traffic, config.statistics),
        ).routes(),
        *admin_refresh.RefreshHandlers(
            TagRefresher(manifests, core.index), image_manager, names, acts
        ).routes(),
        *admin_upstreams.UpstreamHandlers(
            upstreams,
            config.upstreams,
            core.offline,
            core.downloads,
            core.traffic_records,
            partial(core.write_traffic, config.statistics),
        ).routes(),
        *admin_usage.UsageHandlers(
            UsageReporter(image_store, image_rules, core.clock), core.group, core.clock
        ).routes(),
        *admin_preload.PreloadHandlers(preloader, acts).routes(),
        *ActivityHandlers(core.pulls, core.monitor, tester).routes(),
        *admin_policy.PolicyHandlers(
            config, names, manifests, policy, core.policy_records, acts, core.clock
        ).routes(),
        *admin_search.routes(search),
        *admin_trail.TrailHandlers(acts).routes(),
        *core.page_links.routes(),
        *ClientConfigHandlers(config.upstreams).routes(),
        *SettingsHandlers(config).routes(),
        *fleet_handlers.routes(),
    ]
    fleet_handlers.targets = routes
    return ConfiguredApp(
        config,
        upstreams,
        registry,
        preloader,
        policy,
        stand_ins,
        repairer,
        scanner,
        routes,
        fleet_handlers,
    )


def _status_handlers(
    core: Core, config: Config, upstreams: Mapping[str, Upstream]
) -> admin_status.StatusHandlers:
    return admin_status.StatusHandlers(
        config,
        upstreams,
        core.space,
        core.scrubber,
        core.downloads,
        core.metrics,
        core.offline,
        core.check_store,
        core.addresses,
        core.admin_addresses,
        core.traffic_records,
        partial(core.write_traffic, config.statistics),
        core.trail,
        core.started_at,
    )
