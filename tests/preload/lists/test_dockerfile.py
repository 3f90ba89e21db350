"""Dockerfiles."""

import pytest

from proxy.preload.lists import parse_list
from tests.support.image_lists import errors, images, only, platforms

DOCKERFILE = """\
# syntax=docker/dockerfile:1.10
# check=skip=all

# the versions
ARG GO=1.23 ALPINE="3.20"
ARG BASE=golang:${GO}-alpine${ALPINE}
ARG PLATFORM
FROM --platform=$BUILDPLATFORM ${BASE} AS Build
ARG GO=1.0
WORKDIR /src
RUN --mount=type=bind,from=ghcr.io/shop/tools:2,target=/tools \\
    # a comment between

    --mount=type=cache,target=/root \\
    make
RUN <<EOF
FROM not/an/image
EOF
COPY <<-"a.txt" <<b /etc/
\tFROM neither/is/this
\ta.txt
FROM nor/this
b
FROM --platform=linux/arm64 scratch AS empty
from build as test
RUN echo $((1 << 2))
FROM \\
   gcr.io/distroless/static:nonroot
COPY --chown=1:1 --from=build /src/app /app
COPY --from=0 /src/doc /doc
COPY --from=busybox:1.36 /bin/sh /bin/sh
ADD --from=TEST /x /x
"""


def test_the_images_of_all_stages_are_found_and_stage_names_are_not():
    assert parse_list(DOCKERFILE).format == "Dockerfile"
    assert images(DOCKERFILE) == [
        (1, "docker/dockerfile:1.10"),
        (8, "golang:1.23-alpine3.20"),
        (11, "ghcr.io/shop/tools:2"),
        (27, "gcr.io/distroless/static:nonroot"),
        (31, "busybox:1.36"),
    ]
    assert errors(DOCKERFILE) == []


def test_a_platform_is_read_unless_the_builder_sets_it():
    text = "ARG P=linux/arm64\nFROM --platform=$P a\nFROM --platform=linux/arm/v7 b\n"
    assert platforms(text) == {"a": ("linux/arm64",), "b": ("linux/arm/v7",)}
    assert platforms("ARG P\nFROM --platform=$P --other a\n") == {"a": ()}


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("ARG TAG\nFROM nginx:$TAG\nFROM alpine", 2, "the variable TAG has no value"),
        ("ARG A=$B\nFROM nginx:${A}\nFROM alpine", 2, "the variable A has no value"),
        ("FROM a\nARG B=1\nFROM nginx:$B\nFROM alpine", 3, "the variable B has no value"),
        ("FROM Nginx\nFROM alpine", 1, "is not a repository name"),
        ("FROM --platform=arm nginx\nFROM alpine", 1, "is not a platform"),
        ("FROM --platform=linux/arm64\nFROM alpine", 1, "FROM names no image"),
        ("FROM x\nCOPY --from=$A a b\nFROM alpine", 2, "is not a repository name"),
    ],
)
def test_an_invalid_line_is_an_error_and_the_others_are_read(text, line, reason):
    error_line, message = only(errors(text))
    assert error_line == line
    assert reason in message
    assert images(text)[-1][1] == "alpine"


def test_a_here_document_without_an_end_is_an_error():
    text = "FROM alpine\nRUN <<EOF\nFROM nginx\n"
    assert images(text) == [(1, "alpine")]
    assert only(errors(text))[0] == 2


def test_the_escape_directive_sets_the_continuation_character():
    text = "# escape=`\nFROM `\n  nginx\nRUN dir C:\\\nFROM alpine\n"
    assert images(text) == [(2, "nginx"), (5, "alpine")]


def test_an_escaped_backslash_does_not_continue_a_line():
    assert images("FROM nginx\nRUN echo \\\\\nFROM alpine") == [(1, "nginx"), (3, "alpine")]


def test_a_file_may_end_in_the_middle_of_an_instruction():
    assert images("FROM nginx\nFROM alpine \\") == [(1, "nginx"), (2, "alpine")]
    assert images("FROM nginx\nnonsense\n") == [(1, "nginx")]


def test_an_image_may_be_quoted():
    assert images('ARG A="b:1"\nFROM "$A"') == [(2, "b:1")]
