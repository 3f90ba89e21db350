"""Sessions of browsers: logged in by an admin token or a single-use code, kept in memory only.

Where no login is needed, a session is not kept: its id is any that this daemon has not seen, and stands for
the page's token alone, which is a HMAC of the id.
"""

import hmac
import re
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from proxy.errors import TooManyRequestsError
from proxy.server.admin.actor import Actor

MAX_SESSIONS = 64
# Seconds that a session lasts, and that it lasts unused.
SESSION_LIFETIME = 12 * 3600.0
SESSION_IDLE_TIME = 3600.0
# Single-use codes that wait at a time, and seconds that each is good for.
MAX_LOGIN_CODES = 16
LOGIN_CODE_LIFETIME = 60.0
# Wrong logins of an address in a minute, and addresses that are remembered.
MAX_WRONG_LOGINS = 5
MAX_WRONG_ADDRESSES = 1024
WRONG_LOGINS_PERIOD = 60.0
# Messages that wait to be shown.
MAX_NOTICES = 256

_ID = re.compile(r"[A-Za-z0-9_-]{43}")  # 32 bytes


@dataclass(frozen=True, slots=True)
class Notice:
    """A message that a page shows once: the result of an action."""

    text: str
    is_error: bool = False


@dataclass(slots=True)
class BrowserSession:
    """A session of an actor; the times are by the clock of the sessions."""

    id: str
    actor: Actor
    ends_at: float
    idle_at: float


class SessionStore:
    """The sessions, the codes that open one, and the messages that wait for the next page."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._key = secrets.token_bytes(32)
        self._sessions: OrderedDict[str, BrowserSession] = OrderedDict()
        self._codes: OrderedDict[str, tuple[Actor, float]] = OrderedDict()
        self._notices: OrderedDict[str, tuple[str, Notice]] = OrderedDict()
        self._wrong: OrderedDict[str, deque[float]] = OrderedDict()

    def open(self, actor: Actor) -> BrowserSession:
        """Open a session. Beyond `MAX_SESSIONS`, the one that was not used for longest ends."""
        now = self._clock()
        session = BrowserSession(
            new_session_id(), actor, now + SESSION_LIFETIME, now + SESSION_IDLE_TIME
        )
        self._sessions[session.id] = session
        while len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)
        return session

    def find(self, session_id: str) -> BrowserSession | None:
        """Return a session that has not ended, and count this as a use of it."""
        if not self.is_open(session_id):
            self._sessions.pop(session_id, None)
            return None
        session = self._sessions[session_id]
        session.idle_at = self._clock() + SESSION_IDLE_TIME
        self._sessions.move_to_end(session_id)
        return session

    def is_open(self, session_id: str) -> bool:
        """Tell whether a session has not ended; this is no use of it."""
        session = self._sessions.get(session_id)
        return session is not None and self._clock() < min(session.ends_at, session.idle_at)

    def close(self, session_id: str) -> None:
        """End a session."""
        self._sessions.pop(session_id, None)

    def change_token(self, session_id: str) -> str:
        """Return the token that each change by pages of this session has."""
        return hmac.digest(self._key, session_id.encode(), "sha256").hex()

    def is_change_token(self, session_id: str, token: str) -> bool:
        """Tell whether a token is that of the session."""
        return hmac.compare_digest(
            self.change_token(session_id).encode(), token.encode(errors="surrogateescape")
        )

    # Codes.

    def make_code(self, actor: Actor) -> str:
        """Return a code that opens one session of `actor`, within `LOGIN_CODE_LIFETIME`."""
        code = secrets.token_urlsafe(32)
        self._codes[code] = actor, self._clock() + LOGIN_CODE_LIFETIME
        while len(self._codes) > MAX_LOGIN_CODES:
            self._codes.popitem(last=False)
        return code

    def take_code(self, code: str) -> Actor | None:
        """Use up a code; return its actor, or None if it is none, or no longer one."""
        actor, ends_at = self._codes.pop(code, (None, 0.0))
        return actor if self._clock() < ends_at else None

    # Messages.

    def add_notice(self, session_id: str, notice: Notice) -> str:
        """Keep a message for a session; return the id by which it is taken."""
        notice_id = secrets.token_urlsafe(16)
        self._notices[notice_id] = session_id, notice
        while len(self._notices) > MAX_NOTICES:
            self._notices.popitem(last=False)
        return notice_id

    def take_notice(self, session_id: str, notice_id: str) -> Notice | None:
        """Return a message of this session, which is then gone."""
        owner, notice = self._notices.get(notice_id, ("", None))
        if notice is None or owner != session_id:
            return None
        del self._notices[notice_id]
        return notice

    # Wrong logins.

    def check_login_rate(self, address: str) -> None:
        """Raise `TooManyRequestsError` after `MAX_WRONG_LOGINS` of an address within a minute."""
        times = self._wrong.get(address)
        if times is None:
            return
        since = self._clock() - WRONG_LOGINS_PERIOD
        while times and times[0] <= since:
            times.popleft()
        if len(times) >= MAX_WRONG_LOGINS:
            raise TooManyRequestsError("too many wrong logins from your address; wait a minute")

    def count_wrong_login(self, address: str) -> None:
        """Count a wrong login of an address."""
        times = self._wrong.setdefault(address, deque(maxlen=MAX_WRONG_LOGINS))
        times.append(self._clock())
        self._wrong.move_to_end(address)
        while len(self._wrong) > MAX_WRONG_ADDRESSES:
            self._wrong.popitem(last=False)


def new_session_id() -> str:
    """Return an id of 256 random bits."""
    return secrets.token_urlsafe(32)


def is_session_id(text: str) -> bool:
    """Tell whether a text has the form of a session's id."""
    return _ID.fullmatch(text) is not None
