"""Arrays of tables in the configuration: `[[preload]]`."""

import pytest

from proxy.config import dump, load, to_toml
from proxy.errors import ConfigError
from tests.test_config import load_text


def test_each_table_is_loaded_and_its_toml_output_has_the_same_meaning(tmp_path):
    text = """
        offline = true
        [[preload]]
        images = ["nginx:1.27", "ghcr.io/me/app@sha256:%s"]
        every = "90m"
        platforms = ["linux/arm64", "all"]
        pin = true
        [[preload]]
        file = "/etc/images.txt"
    """ % ("a" * 64)
    config = load_text(text, tmp_path)
    first, second = config.preload
    assert (first.images[0], first.every, first.pin) == ("nginx:1.27", 5400.0, True)
    assert (second.file, second.every, second.images) == ("/etc/images.txt", 21_600.0, ())
    assert load_text(to_toml(config), tmp_path) == config
    assert dump(config)["preload"][1]["file"] == "/etc/images.txt"
    assert load(None, {}, {}, is_root=True).preload == ()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[preload]\nfile = '/x'", "preload: expected an array of tables (write [[preload]])"),
        ("preload = [1]", "preload[1]: expected a table"),
        ("[[preload]]\nfiel = '/x'", "preload[1].fiel: no such key (did you mean file?)"),
        ("[[preload]]\nfile='/x'\n[[preload]]", "preload[2]: set exactly one of images and file"),
        ("[[preload]]\nfile='/x'\nimages=['x']", "preload[1]: set exactly one of images and file"),
        ("[[preload]]\nimages=['Bad Name']", "preload[1]: 'Bad Name' is not"),
        ("[[preload]]\nfile='/x'\nevery='0s'", "preload[1].every: '0s' must be longer than 0"),
        ("[[preload]]\nfile='/x'\nplatforms=['amd64']", "'amd64' is not a platform"),
    ],
)
def test_an_error_names_the_table_by_number(tmp_path, text, reason):
    with pytest.raises(ConfigError) as caught:
        load_text(text, tmp_path)
    assert reason in str(caught.value)


def test_the_environment_cannot_set_an_array_of_tables():
    with pytest.raises(ConfigError, match="no such key"):
        load(None, {"PULLCACHE_PRELOAD": "x"}, {}, is_root=True)
