"""Logins through the hospital's identity provider (OpenID Connect), where it has one.

The policy names keys; a login says that the person behind a key is still employed and who they say they are. So it
never lets anybody in whom the policy does not name: an account that the hospital closes is out when its last
token expires, without a custodian. An ID token is accepted if
- the provider signed it, with a key of the file that the custodians mirror: the enclave asks no network,
- it was issued for this site (`aud`), lives, and is of the person whom the site's operator wrote beside the key,
- its nonce is the hash of the researcher's key: a stolen token serves no other key.
"""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from rapha_lab.protocol.errors import PolicyError, RequestError

__all__ = ["Login", "Provider", "token_nonce"]

LONGEST = 12 * 3600.0
_ALGORITHMS = ["RS256", "PS256", "ES256", "EdDSA"]


class Provider(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The identity provider, in the site's configuration.

    Attributes:
        issuer: its name, as in its tokens.
        audience: this site's name with it.
        jwks: file with its public keys.
        people: the provider's subject for each researcher's key.
    """

    issuer: str
    audience: str
    jwks: str
    people: dict[str, str]


def token_nonce(researcher: str) -> str:
    """The nonce with which the holder of this key asks the provider for a token."""
    digest = hashlib.sha256(b"rapha-lab/login/v1\0" + researcher.encode()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


class Login:
    """Who is logged in, and until when; a restart logs everybody out."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider
        self._until: dict[str, float] = {}
        self._lock = threading.Lock()

    def enter(self, researcher: str, token: str, now: float | None = None) -> float:
        """Log the holder of a key in with an ID token; gives the Unix time until when.

        Raises:
            PolicyError: saying what about the token does not hold.
        """
        now = time.time() if now is None else now
        told = self._verified(token)
        if told.get("sub") != self._provider.people.get(researcher):
            _refuse("The token is not of the person whom this site knows by your key.")
        if told.get("nonce") != token_nonce(researcher):
            _refuse(
                "Its nonce is not of your key.", "Ask your provider with the nonce of: rapha-lab keys nonce"
            )
        until = min(float(told["exp"]), float(told["iat"]) + LONGEST)
        if not now < until or told["iat"] > now + 60:
            _refuse("The token has expired, or is dated in the future.")
        with self._lock:
            self._until[researcher] = until
        return until

    def require(self, researcher: str, now: float | None = None) -> None:
        """Raise PolicyError unless the holder of the key is logged in."""
        with self._lock:
            until = self._until.get(researcher, 0.0)
        if not (time.time() if now is None else now) < until:
            raise PolicyError(
                "You are not logged in.",
                f"This site asks for a token of {self._provider.issuer}.",
                "site.login(token), or connect(..., token=token)",
            )

    def _verified(self, token: str) -> dict[str, Any]:
        try:
            import jwt
        except ModuleNotFoundError:
            raise RequestError(
                "The site lacks the package PyJWT.", "", "pip install 'rapha-lab[oidc]'"
            ) from None
        try:
            keys = jwt.PyJWKSet.from_json(Path(self._provider.jwks).read_text())
            key = keys[str(jwt.get_unverified_header(token)["kid"])]
            found: dict[str, Any] = jwt.decode(
                token,
                key,
                algorithms=_ALGORITHMS,
                audience=self._provider.audience,
                issuer=self._provider.issuer,
                options={
                    "require": ["exp", "iat", "sub", "aud", "iss"],
                    "verify_exp": False,
                    "verify_iat": False,
                },
            )
            if not all(isinstance(found[name], int | float) for name in ("exp", "iat")):
                _refuse("Its times are no numbers.")
        except (
            jwt.PyJWTError,
            OSError,
            LookupError,
            ValueError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            _refuse(f"{type(error).__name__}.")
        return found


def _refuse(why: str, instead: str = "Get a new token from your hospital's identity provider.") -> NoReturn:
    raise PolicyError("The login was refused.", why, instead)
