"""Whether a statement denies a request, as AWS documents the evaluation of policies.

It knows nothing of the program: request by request, it holds the judge and the printed policies to what they promise.
"""

from __future__ import annotations

import re
from typing import Any


def as_list(value: Any) -> list[str]:
    return [str(each) for each in (value if isinstance(value, list) else [value])]


def matches(pattern: str, value: str) -> bool:
    return (
        re.fullmatch(re.escape(pattern).replace(r"\*", ".*").replace(r"\?", "."), value, re.DOTALL)
        is not None
    )


def condition_holds(operator: str, key: str, values: list[str], request: dict[str, str]) -> bool:
    set_operator, _, plain = operator.rpartition(":")
    name, if_exists = plain.removesuffix("IfExists"), plain.endswith("IfExists")
    if name == "Null":
        return any((key not in request) == (value.lower() == "true") for value in values)
    negated = "Not" in name
    if key not in request:
        return if_exists or (negated and not set_operator)
    if name == "Bool":
        return any(value.lower() == request[key] for value in values)
    compare = matches if "Like" in name or "Arn" in name else str.__eq__
    return any(compare(value, request[key]) for value in values) != negated


def denies(statement: dict[str, Any], action: str, resource: str, request: dict[str, str]) -> bool:
    named = any(
        matches(each.lower(), action.lower())
        for each in as_list(statement.get("Action", statement.get("NotAction")))
    )
    covered = any(
        matches(each, resource)
        for each in as_list(statement.get("Resource", statement.get("NotResource")))
    )
    return (
        named == ("Action" in statement)
        and covered == ("Resource" in statement)
        and all(
            condition_holds(operator, key, as_list(value), request)
            for operator, keys in statement["Condition"].items()
            for key, value in keys.items()
        )
    )


def request_of(principal: str, **more: str) -> dict[str, str]:
    """What a request of this principal carries, from a console session without MFA unless more says otherwise."""
    kind, _, name = principal.partition("/")
    user = (
        {"aws:PrincipalType": "User", "aws:username": name.rpartition("/")[2]}
        if kind == "user"
        else {"aws:PrincipalType": "AssumedRole"}
    )
    return {
        "aws:PrincipalArn": f"arn:aws:iam::111122223333:{principal}",
        "aws:RequestedRegion": "us-west-2",
        "aws:MultiFactorAuthPresent": "false",
        "aws:ViaAWSService": "false",
        **user,
        **more,
    }
