"""`/api/v1/fleet`: the members of the fleet, and operations that all of them do.

The node that is asked calls the others at their registry address, with the token of the fleet, and does the operation
itself as well. Only the operations of `OPERATIONS` can be called so. A call is a GET whose query has it, as the
registry's port takes no bodies.
"""

import asyncio
import base64
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from proxy.errors import DeniedError, InvalidRequestError, ProxyError, error_code
from proxy.fleet.directory import Directory, Member
from proxy.log import get_logger
from proxy.server.admin.actor import Actor
from proxy.server.admin.api import AdminRequest, RequestModel, Route, map_decode_errors

# The operations that a node does for another one.
OPERATIONS = frozenset(
    {
        ("GET", "/api/v1/status"),
        ("GET", "/api/v1/images"),
        ("POST", "/api/v1/images/check"),
        ("POST", "/api/v1/images/remove"),
        ("POST", "/api/v1/images/pin"),
        ("POST", "/api/v1/images/unpin"),
        ("POST", "/api/v1/images/refresh"),
        ("POST", "/api/v1/preload"),
        ("PUT", "/api/v1/offline"),
    }
)
# Bytes of a call, which has to fit into the head of a request.
MAX_CALL_SIZE = 32 << 10
# Bytes of what a member answers.
MAX_ANSWER_SIZE = 32 << 20
# Members that are called at a time.
MAX_CALLS = 32

T = TypeVar("T")

log = get_logger(__name__)


class FleetCall(RequestModel, frozen=True):
    """An operation of the admin API: its method, path, query and document."""

    method: str
    path: str
    query: dict[str, str] = msgspec.field(default_factory=dict)
    document: Any = None


class CallError(msgspec.Struct, frozen=True):
    """Why an operation failed, as in the admin API."""

    code: str
    message: str


class MemberAnswer(msgspec.Struct, frozen=True):
    """What a member has answered: the document of the operation, or its events, or an error."""

    member: str
    is_self: bool = False
    document: Any = None
    error: CallError | None = None


class FleetMember(msgspec.Struct, frozen=True):
    """A live member of the fleet."""

    address: str
    version: str
    is_self: bool = False


class FleetState(msgspec.Struct, frozen=True):
    """The fleet as this node sees it; `problem` says why it works alone, and is empty while it does not.

    `since` is when it joined the directory, or lost it, in Unix time.
    """

    name: str
    problem: str
    since: int
    members: list[FleetMember]


# Sends a call to a member and returns its answer. Raises `ProxyError`.
SendCall = Callable[[Member, str], Awaitable[bytes]]


class _CallRequest(AdminRequest):
    """A request to the admin API that another node has sent."""

    def __init__(self, call: FleetCall, path_params: Mapping[str, str], actor: Actor) -> None:
        self.path_params = path_params
        self.actor = actor
        self._call = call

    def parse_query(self, model: type[T]) -> T:
        """Return the query as a `model`. Raises `InvalidRequestError`."""
        with map_decode_errors("query"):
            return msgspec.convert(self._call.query, model, strict=False)

    async def read_json(self, model: type[T]) -> T:
        """Return the document as a `model`. Raises `InvalidRequestError`."""
        with map_decode_errors("body"):
            return msgspec.convert(self._call.document, model)

    async def iter_chunks(self) -> AsyncIterator[bytes]:
        """Yield the document as JSON."""
        yield msgspec.json.encode(self._call.document)


@dataclass(slots=True)
class FleetHandlers:
    """The handlers of these routes, and of what other nodes ask.

    `targets` are all routes of the admin API; they are set after this object exists.
    """

    name: str
    address: str
    version: str
    directory: Directory
    send: SendCall | None
    targets: Sequence[Route] = field(default_factory=list)

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("GET", "/api/v1/fleet", self.state),
            Route("POST", "/api/v1/fleet/call", self.call, is_read=True),
        ]

    async def state(self, _request: AdminRequest) -> FleetState:
        """Return the fleet as this node sees it."""
        if self.send is None:
            raise InvalidRequestError(
                "this node belongs to no fleet (set fleet.valkey and fleet.address)"
            )
        members = [FleetMember(one.address, one.version) for one in self.directory.members]
        own = FleetMember(self.address, self.version, is_self=True)
        return FleetState(
            self.name,
            self.directory.problem,
            int(self.directory.since),
            sorted([own, *members], key=lambda one: one.address),
        )

    async def call(self, request: AdminRequest) -> AsyncGenerator[MemberAnswer, None]:
        """Have all members do an operation, and yield what each of them answers, as it arrives."""
        call = await request.read_json(FleetCall)
        route, _ = self._find(call)
        route.check_role(request.actor)
        if self.send is None:
            raise InvalidRequestError(
                "this node belongs to no fleet (set fleet.valkey and fleet.address)"
            )
        encoded = base64.urlsafe_b64encode(msgspec.json.encode(call)).decode()
        if len(encoded) > MAX_CALL_SIZE:
            raise InvalidRequestError("too much for the fleet at once: name fewer images")
        answers: asyncio.Queue[MemberAnswer] = asyncio.Queue()
        members = list(self.directory.members)
        slots = asyncio.Semaphore(MAX_CALLS)
        async with asyncio.TaskGroup() as group:
            _ = group.create_task(self._call_self(call, request.actor, answers))
            for member in members:
                _ = group.create_task(self._call_member(member, encoded, slots, answers))
            for _ in range(len(members) + 1):
                yield await answers.get()

    async def answer(self, encoded: str, sender: str | None) -> bytes:
        """Do an operation that another node asks for; return its answer. Raises `ProxyError`."""
        try:
            content = base64.urlsafe_b64decode(encoded)
        except ValueError as error:
            raise InvalidRequestError("the call is not base64") from error
        with map_decode_errors("call"):
            call = msgspec.json.decode(content, type=FleetCall)
        answer = await self._run(call, Actor(origin=f"fleet {sender or 'local'}"))
        body = msgspec.json.encode(answer)
        if len(body) > MAX_ANSWER_SIZE:
            raise InvalidRequestError("the answer is too large: select fewer images")
        return body

    async def _call_self(
        self, call: FleetCall, actor: Actor, answers: "asyncio.Queue[MemberAnswer]"
    ) -> None:
        answers.put_nowait(await self._run(call, actor))

    async def _call_member(
        self,
        member: Member,
        encoded: str,
        slots: asyncio.Semaphore,
        answers: "asyncio.Queue[MemberAnswer]",
    ) -> None:
        assert self.send is not None
        try:
            async with slots:
                content = await self.send(member, encoded)
            answer = msgspec.json.decode(content, type=MemberAnswer)
            answer = msgspec.structs.replace(answer, member=member.address, is_self=False)
        except msgspec.DecodeError as error:
            problem = CallError("proxy", f"its answer is not understood: {error}")
            answer = MemberAnswer(member.address, error=problem)
        except ProxyError as error:
            answer = MemberAnswer(member.address, error=CallError(error_code(error), str(error)))
        answers.put_nowait(answer)

    async def _run(self, call: FleetCall, actor: Actor) -> MemberAnswer:
        """Do an operation on this node. Events of a long one are collected."""
        try:
            route, path_params = self._find(call)
            result = route.handler(_CallRequest(call, path_params, actor))
            if isinstance(result, AsyncGenerator):
                async with aclosing(result):
                    document: Any = [event async for event in result]
            else:
                document = await result
        except ProxyError as error:
            problem = CallError(error_code(error), str(error))
            return MemberAnswer(self.address, is_self=True, error=problem)
        except Exception:
            log.exception("admin_request_failed")
            problem = CallError("proxy", "internal error; see the daemon's log")
            return MemberAnswer(self.address, is_self=True, error=problem)
        return MemberAnswer(self.address, is_self=True, document=document)

    def _find(self, call: FleetCall) -> tuple[Route, Mapping[str, str]]:
        if (call.method, call.path) not in OPERATIONS:
            raise DeniedError(f"{call.method} {call.path[:100]} is no operation of a fleet")
        for route in self.targets:
            if route.method == call.method and (found := route.match(call.path)) is not None:
                return route, found
        raise InvalidRequestError(f"this node does not know {call.method} {call.path[:100]}")
