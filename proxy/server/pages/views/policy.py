"""Policy: the rules in words, what they decided, what is to ripen, and exceptions."""

import re
from collections.abc import Mapping

from proxy.errors import InvalidRequestError
from proxy.policy.words import describe_rule
from proxy.server.admin.policy import ExceptionSummary, PolicyCheck, PolicyOverview, RipeningTag
from proxy.server.pages.page import Done, Model, PageRequest
from proxy.storage.records.policy_rows import DecisionRecord

# Rows of each table.
PAGE_SIZE = 50

DECISIONS: Mapping[str, str] = {
    "deny": "refused",
    "unripe": "refused: too young",
    "unknown": "not decided: a fact is missing",
    "previous": "older content served",
    "would_deny": "audit: would be refused",
    "would_unripe": "audit: would be too young",
    "would_unknown": "audit: would not be decided",
    "allowed_unknown": "allowed, though a fact is missing",
    "exception": "exception",
}


async def show(request: PageRequest) -> Model:
    """Return rules, exceptions, what ripens, and decisions."""
    overview = await request.api.get("/api/v1/policy", PolicyOverview)
    decision = request.query.get("decision", "")
    image = request.query.get("image", "").strip()
    checked: PolicyCheck | None = None
    if image:
        events = request.api.stream("POST", "/api/v1/policy/check", {"images": [image]})
        async for event in events:
            checked = event
    decisions = await request.api.get(
        "/api/v1/policy/decisions",
        list[DecisionRecord],
        limit=PAGE_SIZE,
        decision=decision if decision in DECISIONS else "",
    )
    return {
        "rules": [
            {
                "number": rule["policy"],
                "mode": rule["mode"],
                "images": rule["images"],
                "words": describe_rule(rule),
            }
            for rule in overview.policies[:PAGE_SIZE]
        ],
        "exceptions": overview.exceptions[:PAGE_SIZE],
        "more_exceptions": max(0, len(overview.exceptions) - PAGE_SIZE),
        "ripening": await request.api.get(
            "/api/v1/policy/ripening", list[RipeningTag], limit=PAGE_SIZE
        ),
        "decisions": decisions,
        "decision": decision,
        "decision_names": DECISIONS,
        "image": image,
        "checked": checked,
    }


async def add_exception(request: PageRequest) -> Done:
    """Allow an image by digest for some days."""
    days = request.form.get("days", "").strip()
    if not re.fullmatch(r"[0-9]{1,3}", days):
        raise InvalidRequestError("write for how many days, 366 at most")
    body = {
        "image": request.form.get("image", "").strip(),
        "seconds": int(days) * 86_400.0,
        "reason": request.form.get("reason", "").strip(),
    }
    made = await request.api.post("/api/v1/policy/exceptions", ExceptionSummary, body)
    return Done(f"{made.image} is allowed for {days} days.", "/policy")


async def remove_exception(request: PageRequest) -> Done:
    """End an exception."""
    image = request.form.get("image", "")
    await request.api.post("/api/v1/policy/exceptions/remove", type(None), {"image": image})
    return Done(f"The exception for {image} has ended.", "/policy")
