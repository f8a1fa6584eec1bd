"""Options of remote file systems: what may be given, what is decided elsewhere, and that no secret is written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import RECIPE

from mim_framework.base.errors import DataError, RecipeError
from mim_framework.data.file_systems import RemoteSection, open_file_system, protocol_of
from mim_framework.data.stores import store_of
from mim_framework.recipe.draft import load_recipe
from mim_framework.recipe.writing import dump_recipe
from mim_framework.registry.registry import Registry

SECRET = "S3CR3T/x+y"


def recipe_with(tmp_path: Path, root: str = "s3://bucket/x", **options: Any) -> Any:
    file = tmp_path / "recipe.yaml"
    source = {"type": "folder", "root": root, "storage_options": options}
    file.write_text(json.dumps({**RECIPE, "data": {"source": source}}))
    return load_recipe(file, (), Registry())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"key": "AKIA", "secret": SECRET}, "key"),
        ({"secret": SECRET}, "secret"),
        ({"client_kwargs": {"aws_secret_access_key": SECRET}}, "client_kwargs.aws_secret_access_key"),
        ({"token": SECRET}, "token"),
        ({"account_key": SECRET}, "account_key"),
        ({"password": SECRET}, "password"),
        ({"client_kwargs": {"headers": {"Authorization": f"Bearer {SECRET}"}}}, "client_kwargs.headers.Authorization"),
        ({"endpoint_url": f"http://me:{SECRET}@host:9000"}, "endpoint_url"),
        ({"client_kwargs": {"proxies": [f"http://h/?sig={SECRET}"]}}, "client_kwargs.proxies.0"),
    ],
)
def test_a_secret_is_refused_by_name_and_never_shown(tmp_path, options: dict[str, Any], named: str):
    with pytest.raises(RecipeError, match=rf"storage_options: '{named}' would be written to recipe\.yaml") as info:
        recipe_with(tmp_path, **options)
    assert SECRET not in str(info.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config_kwargs": {"read_timeout": 5}}, "'config_kwargs.read_timeout' is the option 'timeout' beside it"),
        ({"config_kwargs": {"retries": {"m": "x"}}}, "'config_kwargs.retries.m' is the option 'retries' beside it"),
        ({"s3": {"config_kwargs": {"retries": 2}}}, "'s3.config_kwargs.retries' is the option 'retries' beside it"),
        ({"client_kwargs": {"timeout": 5}}, "'client_kwargs.timeout' is the option 'timeout' beside it"),
        ({"skip_instance_cache": True}, "'skip_instance_cache' would connect anew for every image"),
        ({"asynchronous": True}, "'asynchronous' belongs to fsspec"),
    ],
)  # fmt: skip
def test_what_is_decided_elsewhere_is_refused_with_where(tmp_path, options: dict[str, Any], message: str):
    with pytest.raises(RecipeError, match=f"storage_options: {message}; leave it out"):
        recipe_with(tmp_path, **options)


def test_other_options_are_written_down_and_read_back(tmp_path):
    options = {
        "endpoint_url": "https://minio.local:9000", "profile": "work", "anon": False, "token": "anon",
        "config_kwargs": {"signature_version": "s3v4", "s3": {"addressing_style": "path"}}, "requester_pays": True,
    }  # fmt: skip
    recipe = recipe_with(tmp_path, **options)
    (tmp_path / "written.yaml").write_text(dump_recipe(recipe))
    again = load_recipe(tmp_path / "written.yaml", (), Registry())
    assert again == recipe
    assert again.data.source.options["storage_options"] == options


@pytest.mark.parametrize(("root", "given"), [("/data/images", True), ("/data/images", False), ("http://h/x", True)])
def test_options_are_for_urls(tmp_path, root: str, given: bool):
    options = {"block_size": 5} if given else {}
    if root.startswith("/") and given:
        with pytest.raises(RecipeError, match="storage_options are for URLs, and root is a local folder"):
            recipe_with(tmp_path, root, **options)
    else:
        assert recipe_with(tmp_path, root, **options).data.source.options["root"] == root


# --- s3fs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["s3://bucket/images", "s3a://bucket/images", "simplecache::s3://bucket/images"])
def test_s3fs_repeats_nothing_by_itself_and_keeps_our_time_limits(url: str):
    pytest.importorskip("s3fs")
    given = {"endpoint_url": "http://127.0.0.1:1", "config_kwargs": {"signature_version": "s3v4"}}
    section = RemoteSection(timeout=7.5, storage_options={"s3": given} if "::" in url else given)
    found, path = open_file_system(url, section)
    s3 = found.fs if "::" in url else found
    assert path == "bucket/images"
    assert s3.retries == 1
    assert s3.max_concurrency == 1
    assert s3.endpoint_url == "http://127.0.0.1:1"
    assert s3._prepare_config_kwargs() == {
        "signature_version": "s3v4", "connect_timeout": 7.5, "read_timeout": 7.5, "retries": {"total_max_attempts": 1}
    }  # fmt: skip
    assert open_file_system(url, section)[0] is found or "::" in url


@pytest.mark.parametrize("url", [f"s3://AKIA:{SECRET}@bucket/x", f"s3a://AKIA:{SECRET}@bucket", f"s3://{SECRET[:6]}@b"])
def test_an_address_of_s3_with_credentials_is_refused_without_them(url: str):
    """s3fs would take them for the name of the bucket, and show them in its error."""
    with pytest.raises(DataError, match=r"data.source.root: 's3a?://\*\*\*@b.*' holds credentials") as info:
        store_of(url, "data.source.root")
    assert "data.source.storage_options.profile=NAME" in str(info.value)
    assert SECRET[:6] not in str(info.value)


def test_the_protocol_of_a_chain_is_that_of_its_server():
    assert protocol_of("s3a://bucket/x") == "s3a"
    assert protocol_of("simplecache::s3://bucket/x") == "s3"
    assert protocol_of("zip://*.png::http://host/a.zip") == "http"
