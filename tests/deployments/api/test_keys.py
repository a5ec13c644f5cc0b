"""Keys: where they come from, who presents which, and that they show up nowhere."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from pydantic import ValidationError

from configs.server_args import ServerArgs
from deployments.api.keys import Caller, Keyring
from deployments.errors import APIError

ALICE, BOB, ADMIN = "sk-alice-4f1c", "sk-bob-77aa", "sk-admin-90d2"


def keyring(**keys: object) -> Keyring:
    return Keyring.read(ServerArgs(**keys))


def refusal(ring: Keyring, key: str | None) -> APIError:
    with pytest.raises(APIError) as error:
        ring.caller(key)
    return error.value


class TestWithoutKeys:
    @pytest.mark.parametrize("key", [None, "unused"])
    def test_everybody_sees_and_does_everything(self, key: str | None) -> None:
        assert keyring().caller(key) == Caller(tenant=None, is_admin=True)


class TestWithOrdinaryKeys:
    ring = keyring(api_key=[ALICE, BOB])

    @pytest.mark.parametrize("key", [None, "", "wrong", ALICE[:-1], f"{ALICE}x", ALICE.upper(), "schlüssel"])
    def test_nobody_else_is_let_in(self, key: str | None) -> None:
        error = refusal(self.ring, key)
        assert (error.status, error.code, error.type) == (401, "invalid_api_key", "authentication_error")
        assert error.headers == {"WWW-Authenticate": "Bearer"}
        assert not key or key not in error.message

    def test_each_is_a_tenant_of_its_own(self) -> None:
        alice, bob = self.ring.caller(ALICE), self.ring.caller(BOB)
        assert None not in (alice.tenant, bob.tenant)
        assert alice.tenant != bob.tenant
        assert self.ring.caller(ALICE) == alice

    def test_each_is_an_admin_where_there_is_no_admin_key(self) -> None:
        self.ring.caller(ALICE).require_admin("This")


class TestWithAnAdminKey:
    ring = keyring(api_key=[ALICE], admin_api_key=[ADMIN])

    def test_it_passes_everywhere_and_sees_all(self) -> None:
        caller = self.ring.caller(ADMIN)
        assert caller == Caller(tenant=None, is_admin=True)
        caller.require_admin("This")

    def test_an_ordinary_key_is_forbidden_what_only_it_may(self) -> None:
        with pytest.raises(APIError, match="This needs an admin API key") as error:
            self.ring.caller(ALICE).require_admin("This")
        assert (error.value.status, error.value.type) == (403, "permission_error")

    def test_alone_it_leaves_the_rest_open(self) -> None:
        ring = keyring(admin_api_key=ADMIN)
        for key in (None, "unused"):
            caller = ring.caller(key)
            assert caller.tenant is None
            with pytest.raises(APIError) as error:
                caller.require_admin("This")
            assert error.value.status == 401
        ring.caller(ADMIN).require_admin("This")


class TestFiles:
    def test_have_one_key_a_line_beside_those_of_the_flags(self, tmp_path: Path) -> None:
        (tmp_path / "keys").write_text(f"\n  {ALICE}\r\n\n{BOB}")
        ring = keyring(api_key_file=str(tmp_path / "keys"), api_key=["third"])
        assert ring == keyring(api_key=[ALICE, BOB, "third"])
        (tmp_path / "admins").write_text(ADMIN)
        assert keyring(admin_api_key_file=str(tmp_path / "admins")) == keyring(admin_api_key=ADMIN)

    @pytest.mark.parametrize("content", ["", "\n \n", "two words", "schlüssel"])
    def test_without_a_proper_key_are_refused_rather_than_leave_the_server_open(
        self, tmp_path: Path, content: str
    ) -> None:
        (tmp_path / "keys").write_text(content)
        with pytest.raises(ValueError, match="no API key") as error:
            keyring(api_key_file=str(tmp_path / "keys"))
        assert not content.strip() or content not in str(error.value)

    def test_that_are_not_there_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            keyring(api_key_file=str(tmp_path / "keys"))


@pytest.mark.parametrize("key", ["", "two words", "line\nbreak", "schlüssel"])
def test_a_key_that_no_header_carries_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(ValidationError) as error:
        ServerArgs(api_key=[key])
    assert not key or key not in str(error.value)


def test_keys_are_not_shown_by_what_holds_them() -> None:
    args = ServerArgs(api_key=[ALICE], admin_api_key=ADMIN)
    ring = Keyring.read(args)
    for shown in (repr(args), str(args), repr(ring), repr(ring.caller(ALICE)), str(pickle.dumps(ring))):
        assert ALICE not in shown
        assert ADMIN not in shown
