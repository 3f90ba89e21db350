"""Docker compose files."""

import pytest

from proxy.preload.lists import parse_list
from proxy.preload.lists.variables import MAX_SUBSTITUTION_DEPTH, VariableError, substitute
from tests.support.image_lists import errors, images, notes, only, platforms

COMPOSE = """\
name: shop
x-logging: &logging
  logging: {driver: local}
x-base: &base
  <<: *logging
  image: ${REGISTRY:-ghcr.io}/shop/app:${TAG-1.4}
  platform: linux/arm64
services:
  web:
    image: nginx:1.27-alpine
    ports: ["80:80"]
    depends_on:
      - app
  app:
    <<: *base
    volumes: ["data:/data"]
  worker:
    <<: [*logging, *base]
    image: "ghcr.io/shop/worker:1.4"
  database:
    image: 'postgres:17'
    profiles: [full]
    volumes:
      - {type: bind, source: ./data, target: /var/lib/postgresql/data}
      - type: image
        source: ghcr.io/shop/seed:2
        target: /seed
  migrate:
    build: ./migrate
volumes:
  data: {}
"""


def test_the_images_of_all_services_are_found():
    assert parse_list(COMPOSE).format == "docker compose"
    assert images(COMPOSE) == [
        (10, "nginx:1.27-alpine"),
        (6, "ghcr.io/shop/app:1.4"),
        (19, "ghcr.io/shop/worker:1.4"),
        (21, "postgres:17"),
        (26, "ghcr.io/shop/seed:2"),
    ]
    assert errors(COMPOSE) == []


def test_the_platform_of_a_service_is_read_even_if_merged():
    assert platforms(COMPOSE)["ghcr.io/shop/app:1.4"] == ("linux/arm64",)
    assert platforms(COMPOSE)["ghcr.io/shop/worker:1.4"] == ("linux/arm64",)
    assert platforms(COMPOSE)["nginx:1.27-alpine"] == ()


def test_a_service_that_is_built_is_a_note():
    line, message = only(notes(COMPOSE))
    assert line == 29
    assert "'migrate' is built, not pulled" in message


def test_a_service_without_an_image_is_a_note_with_the_reason():
    text = """\
    include:
      - other.yaml
    services:
      a: {extends: {service: b, file: base.yaml}}
      b: {command: x}
      c: {image: }
    """
    assert [line for line, _ in notes(text)] == [2, 4, 5, 6]
    assert "extends another service" in notes(text)[1][1]


def test_invalid_services_and_images_are_errors_and_the_others_are_read():
    text = "services:\n  a: text\n  b: {image: [x]}\n  c: {image: 'A B'}\n  d: {image: nginx}\n"
    assert [line for line, _ in errors(text)] == [2, 3, 4]
    assert images(text) == [(5, "nginx")]


def test_a_variable_without_a_value_is_an_error_with_its_line():
    text = "services:\n  a:\n    image: app:${TAG}\n  b:\n    image: nginx\n"
    line, message = only(errors(text))
    assert line == 3
    assert "the variable TAG has no value" in message
    assert images(text) == [(5, "nginx")]


def test_a_platform_may_be_a_variable():
    text = "services: {a: {image: nginx, platform: '${PLATFORM:-linux/arm64}'}}"
    assert platforms(text) == {"nginx": ("linux/arm64",)}


def test_circular_merge_keys_end():
    text = (
        "services:\n  a: &a\n    <<: [*a, *a, text]\n    image: nginx\n  b: &b {<<: [*b, text]}\n"
    )
    assert images(text) == [(4, "nginx")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("$SET:$SET", "value:value"),
        ("${SET}-x", "value-x"),
        ("${UNSET:-default}", "default"),
        ("${UNSET-default}", "default"),
        ("${EMPTY:-default}", "default"),
        ("${EMPTY-default}", ""),
        ("${SET:-default}", "value"),
        ("${UNSET:-${EMPTY:-${SET}}}", "value"),
        ("${UNSET:-}", ""),
        ("${SET:?say}", "value"),
        ("${SET:+other}", "other"),
        ("${UNSET+other}", ""),
        ("$$SET", "$SET"),
        ("a$", "a$"),
        ("$1", "$1"),
    ],
)
def test_variables_are_replaced_as_the_compose_specification_says(text, expected):
    assert substitute(text, {"SET": "value", "EMPTY": ""}) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("$UNSET", "UNSET has no value"),
        ("${UNSET:?no tag}", "UNSET has no value"),
        ("${EMPTY:?no tag}", "EMPTY has no value"),
        ("${SET/a/b}", "not supported"),
        ("${}", "not supported"),
        ("${SET", "not closed"),
        ("x" * 2000, "too long"),
        ("${A:-" * 20 + "}" * 20, "too deeply"),
        ("$SET" * 250, "expands to more"),
    ],
)
def test_an_invalid_variable_is_an_error_with_the_reason(text, reason):
    with pytest.raises(VariableError, match=reason) as caught:
        substitute(text, {"SET": "value", "EMPTY": ""})
    assert len(str(caught.value)) < 200


def test_variables_may_be_nested_up_to_the_limit():
    assert (
        substitute("${A:-" * MAX_SUBSTITUTION_DEPTH + "x" + "}" * MAX_SUBSTITUTION_DEPTH, {}) == "x"
    )
