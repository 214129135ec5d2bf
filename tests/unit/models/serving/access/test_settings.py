from __future__ import annotations

from pathlib import Path

import pytest

from models.serving.access.settings import InvalidAccess, Limits, decode_settings, load_settings

WHOLE = b"""
audience = "plant"
keys = "keys"
revoked = "revoked.txt"
open_loopback = false
max_in_flight = 512
default_deadline_ms = 250
[tenants.acme]
models = ["acme-*", "shared"]
rate = 100
burst = 200
concurrency = 16
[tenants."*"]
rate = 0.5
[clients."acme.gateway-1"]
tenant = "acme"
rate = 500
[clients.boss]
admin = true
"""


def test_limits_are_the_clients_own_then_its_tenants_then_everybodys() -> None:
    settings = decode_settings(WHOLE)
    assert settings.is_limited
    assert settings.limits("acme", "acme.gateway-1") == Limits(500, None, 16)
    assert settings.limits("acme", "other") == Limits(100, 200, 16)
    assert settings.limits("unlisted", "c") == settings.limits(None, None) == Limits(0.5)
    assert not decode_settings(b"").is_limited
    assert decode_settings(b"").limits("a", "c") == Limits()


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("[tenants.acme]\nrate = 0", 'tenants."acme".rate'),
        ("[tenants.acme]\nrate = nan", 'tenants."acme".rate'),
        ("[tenants.acme]\nrate = inf", 'tenants."acme".rate'),
        ("[tenants.acme]\nrate = '1'", 'tenants."acme".rate'),
        ("[tenants.acme]\nrate = 1\nburst = 0", 'tenants."acme".burst'),
        ("[tenants.acme]\nburst = 3", 'tenants."acme".burst'),
        ("[tenants.acme]\nconcurrency = 0", 'tenants."acme".concurrency'),
        ("[tenants.acme]\nrates = 1", "`rates`"),
        ("[tenants.acme]\nmodels = ['']", 'tenants."acme".models[0]'),
        ("[tenants.acme]\nmodels = 'a'", 'tenants."acme".models'),
        ("[tenants]\nacme = 3", 'tenants."acme"'),
        ("tenants = 3", "tenants"),
        ('[tenants.""]', "tenants"),
        ('[clients.c]\ntenant = "ghost"\n[tenants.acme]', 'clients."c".tenant'),
        ("[clients.c]\nburst = 3", 'clients."c".burst'),
        ("[clients.c]\nadmin = 'yes'", 'clients."c".admin'),
        ("[clients.c]\nconcurrency = 3", "`concurrency`"),
        ("keys = 3", "keys"),
        ("audience = ''", "audience"),
        ("key = 'x'", "`key`"),
        ("max_in_flight = 0", "max_in_flight"),
        ("default_deadline_ms = nan", "default_deadline_ms"),
        ("= 3", "not TOML"),
        ("a = \udcff", "not TOML"),
    ],
)
def test_a_mistake_is_refused_with_the_name_of_its_field(tmp_path: Path, text: str, field: str) -> None:
    path = tmp_path / "access.toml"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(InvalidAccess) as refused:
        load_settings(path)
    assert str(path) in str(refused.value)
    assert field in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidAccess, match=r"access\.toml: No such file"):
        load_settings(tmp_path / "access.toml")
