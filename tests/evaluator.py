"""A small implementation of how AWS documents the evaluation of service control policies, for one request at a time.

It knows nothing of the program, and holds the judge and the printed policies to what they promise. It follows
"IAM JSON policy elements: Condition operators", "Multivalued context keys" and "Policy evaluation logic" of the IAM
User Guide.
"""

from __future__ import annotations

import functools
import ipaddress
import operator as compare
import re
from collections.abc import Callable, Iterable
from typing import Any

ACCOUNT, ORGANIZATION = "111122223333", "o-test123456"
Json = dict[str, Any]
Request = dict[str, str]  # the request context; keys in lower case


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@functools.cache
def _pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", ".*").replace(r"\?", "."), re.DOTALL)


def matches(pattern: str, value: str) -> bool:
    """* stands for any characters, ? for one."""
    return _pattern(pattern).fullmatch(value) is not None


def arn_matches(pattern: str, arn: str) -> bool:
    """Each of the six parts is compared by itself; what is no ARN matches nothing."""
    parts, of_arn = pattern.split(":", 5), arn.split(":", 5)
    return len(parts) == len(of_arn) == 6 and all(map(matches, parts, of_arn))


def resource_matches(pattern: str, arn: str) -> bool:
    """As an ARN; AWS completes an incomplete one with wildcards."""
    parts = pattern.split(":", 5)
    return pattern == "*" or arn_matches(":".join(parts + ["*"] * (6 - len(parts))), arn)


def ignoring_case(value: str, given: str) -> bool:
    return value.lower() == given.lower()


def in_network(value: str, given: str) -> bool:
    return ipaddress.ip_address(given) in ipaddress.ip_network(value, strict=False)


def numeric(by: Callable[[float, float], bool]) -> Callable[[str, str], bool]:
    return lambda value, given: by(float(given), float(value))


OPERATORS: dict[str, Callable[[str, str], bool]] = {
    "stringequals": str.__eq__,
    "stringequalsignorecase": ignoring_case,
    "stringlike": matches,
    "arnequals": arn_matches,
    "arnlike": arn_matches,
    "bool": ignoring_case,
    "ipaddress": in_network,
    "numericequals": numeric(compare.eq),
    "numericlessthan": numeric(compare.lt),
    "numericlessthanequals": numeric(compare.le),
    "numericgreaterthan": numeric(compare.gt),
    "numericgreaterthanequals": numeric(compare.ge),
}
NEGATIONS = {
    "stringnotequals": "stringequals",
    "stringnotequalsignorecase": "stringequalsignorecase",
    "stringnotlike": "stringlike",
    "arnnotequals": "arnequals",
    "arnnotlike": "arnlike",
    "notipaddress": "ipaddress",
    "numericnotequals": "numericequals",
}


def filled(value: Any, request: Request) -> str | None:
    """A value with its policy variables; None if one of them has no value, for then nothing matches."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    for variable in re.findall(r"\$\{([^}]*)\}", text):
        if variable.lower() not in request:
            return None
        text = text.replace(f"${{{variable}}}", request[variable.lower()])
    return text


def condition_holds(operator: str, key: str, values: list[Any], request: Request) -> bool:
    """All keys here have one value, so that a set operator matters only where the key is absent."""
    quantifier, _, name = operator.lower().rpartition(":")
    if_exists, name = name.endswith("ifexists"), name.removesuffix("ifexists")
    given = request.get(key.lower())
    texts = [text for value in values if (text := filled(value, request)) is not None]
    if name == "null":
        return any((given is None) == (text.lower() == "true") for text in texts)
    negated = name in NEGATIONS
    if given is None:
        return quantifier == "forallvalues" or (not quantifier and (if_exists or negated))
    holds = OPERATORS[NEGATIONS.get(name, name)]
    return any(holds(text, given) for text in texts) != negated


def applies(statement: Json, action: str, resource: str, request: Request) -> bool:
    """Whether a statement, whatever its effect, is about a request."""
    actions = as_list(statement.get("Action", statement.get("NotAction")))
    resources = as_list(statement.get("Resource", statement.get("NotResource")))
    named = any(matches(each.lower(), action.lower()) for each in actions)
    covered = any(resource_matches(each, resource) for each in resources)
    return (
        named == ("Action" in statement)
        and covered == ("Resource" in statement)
        and all(
            condition_holds(operator, key, as_list(value), request)
            for operator, keys in statement.get("Condition", {}).items()
            for key, value in keys.items()
        )
    )


def denies(statement: Json, action: str, resource: str, request: Request) -> bool:
    return statement["Effect"] == "Deny" and applies(statement, action, resource, request)


def gets_through(
    levels: Iterable[Iterable[Json]], action: str, resource: str, request: Request
) -> bool:
    """Whether the statements attached to the root, each OU and the account let a request through: no Deny at any
    level, and an Allow at every one."""
    for statements in levels:
        effects = {
            each["Effect"] for each in statements if applies(each, action, resource, request)
        }
        if effects != {"Allow"}:
            return False
    return True


def request_of(principal: str, **more: str) -> Request:
    """What a request of this principal carries, from a session without MFA unless more says otherwise."""
    kind, _, name = principal.partition("/")
    types = {"user": "User", "role": "AssumedRole", "root": "Account"}
    request = {
        "aws:PrincipalArn": f"arn:aws:iam::{ACCOUNT}:{principal}",
        "aws:PrincipalType": types[kind],
        "aws:PrincipalAccount": ACCOUNT,
        "aws:PrincipalOrgID": ORGANIZATION,
        "aws:PrincipalIsAWSService": "false",
        "aws:RequestedRegion": "us-west-2",
        "aws:MultiFactorAuthPresent": "false",
        "aws:ViaAWSService": "false",
        "aws:SecureTransport": "true",
        "aws:SourceIp": "203.0.113.7",
        **({"aws:username": name.rpartition("/")[2]} if kind == "user" else {}),
        **more,
    }
    return {key.lower(): value for key, value in request.items()}
