"""Image configurations are parsed for display, and missing fields are left empty."""

import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

from proxy.errors import InvalidManifestError
from proxy.oci.config import ImageConfig, parse_config
from proxy.oci.platform import Platform

STEPS = [
    {"created_by": "/bin/sh -c #(nop) ADD file:1 in / "},
    {"created_by": '/bin/sh -c #(nop)  CMD ["bash"]', "empty_layer": True},
    {"created_by": "/bin/sh -c apt-get update"},
    {"created_by": "COPY /a /b # buildkit"},
    {"created_by": "ENV A=1", "empty_layer": True},
]
COMMANDS = ["ADD file:1 in /", "RUN apt-get update", "COPY /a /b"]


def parse(**document: Any) -> ImageConfig:
    return parse_config(json.dumps(document).encode())


def test_commands_are_matched_to_layers_if_their_numbers_agree():
    config = parse(history=STEPS)
    assert list(config.commands_for_layers(3)) == COMMANDS
    assert list(config.commands_for_layers(2)) == ["", ""]
    assert list(parse().commands_for_layers(1)) == [""]


def test_the_fields_of_the_configuration_are_parsed():
    config = parse(
        os="linux",
        architecture="arm",
        variant="v6",
        created="2026-01-01T00:00:00Z",
        config={
            "User": "1000",
            "Env": ["A=1"],
            "Entrypoint": ["/run"],
            "Cmd": ["-x"],
            "WorkingDir": "/w",
            "Labels": {"a": "b"},
            "ExposedPorts": {"80/tcp": {}, "443/tcp": {}},
        },
    )
    assert config.platform == Platform("linux", "arm", "v6")
    assert (config.created, config.user, config.workdir) == ("2026-01-01T00:00:00Z", "1000", "/w")
    assert (config.env, config.entrypoint, config.cmd) == (["A=1"], ["/run"], ["-x"])
    assert (config.labels, config.ports) == ({"a": "b"}, ["443/tcp", "80/tcp"])


def test_null_is_the_same_as_a_missing_field():
    config = parse(config={"Env": None, "Cmd": None, "Labels": None}, history=None, os=None)
    assert config == parse()
    assert config.platform is None


@given(
    st.binary()
    | st.recursive(st.none() | st.text(), st.lists).map(lambda x: json.dumps(x).encode())
)
def test_anything_else_raises_no_other_error(content):
    try:
        parse_config(content)
    except InvalidManifestError as error:
        assert len(str(error)) <= 200  # noqa: PT017 - some content is valid


def test_deep_nesting_is_rejected():
    with pytest.raises(InvalidManifestError):
        parse_config(b'{"config":' + b'{"Labels":' * 5000)
