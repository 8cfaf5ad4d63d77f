"""URLs as streams of bytes: http and https by the standard library, all else by fsspec.

Nothing here runs a command, and no scheme of urllib's own other than http is opened.
"""

import difflib
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from http.client import HTTPException, HTTPResponse
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

from vlm.errors import ConfigError, DataError

NOT_THERE = (404, 410)
TRY_AGAIN = (408, 425, 429)  # and all from 500 on
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//)?")


class MissingError(DataError):
    """A URL that names nothing."""


class Stream(NamedTuple):
    """Bytes from `start` on; `total` is the size of the whole, None where a server hides it."""

    start: int
    total: int | None
    read: Callable[[int], bytes]


def open_stream(url: str, offset: int, timeout_s: float) -> AbstractContextManager[Stream]:
    """The bytes of a URL from `offset` on, or from 0 where that cannot be had."""
    return _open_http(url, offset, timeout_s) if is_http(url) else _open_fsspec(url, offset)


@contextmanager
def _open_http(url: str, offset: int, timeout_s: float) -> Iterator[Stream]:
    response, start, total = _get(url, offset, timeout_s)
    with response:
        yield Stream(start, total, response.read1)


def _get(url: str, offset: int, timeout_s: float) -> tuple[HTTPResponse, int, int | None]:
    """The answer, where in the whole its bytes begin, and how many the whole has."""
    headers = {"User-Agent": "vlm"} | ({"Range": f"bytes={offset}-"} if offset else {})
    request = Request(quote(url, safe=":/?#[]@!$&'()*+,;=%~"), headers=headers)
    try:
        response: HTTPResponse = _opener().open(request, timeout=timeout_s)
    except HTTPError as error:
        with error:
            if error.code == 416 and offset:
                return _get(url, 0, timeout_s)
            raise _refusal(url, error) from error
    if response.status != 206:
        length = response.headers.get("Content-Length", "")
        return response, 0, int(length) if length.isdigit() else None
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    if found and int(found[1]) == offset:
        return response, offset, int(found[2])
    response.close()
    if not offset:
        raise OSError("the server sends a part that nobody asked for")
    return _get(url, 0, timeout_s)


def _refusal(url: str, error: HTTPError) -> Exception:
    """What an HTTP status stands for."""
    answer = f"the server answers {error.code} {error.reason}".rstrip()
    if error.code in NOT_THERE:
        return MissingError(f"{shown(url)}: {answer}")
    if error.code >= 500 or error.code in TRY_AGAIN:
        return OSError(answer)
    return DataError(f"{shown(url)}: {answer}")


@cache
def _opener() -> OpenerDirector:
    """Opens http and https, redirects and proxies; unlike urllib's own, no ftp, no files."""
    opener = OpenerDirector()
    for handler in (
        ProxyHandler,
        HTTPHandler,
        HTTPSHandler,
        HTTPRedirectHandler,
        HTTPDefaultErrorHandler,
        HTTPErrorProcessor,
        UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


@contextmanager
def _open_fsspec(url: str, offset: int) -> Iterator[Stream]:
    filesystem, name = _filesystem(url)

    def told(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except FileNotFoundError as error:
            raise MissingError(f"{shown(url)}: there is no such file") from error
        except PermissionError as error:
            raise DataError(f"{shown(url)}: not permitted: {error}") from error
        except Exception as error:  # each client has its own
            raise OSError(f"{type(error).__name__}: {error}") from error

    total = told(filesystem.size, name)
    file = told(filesystem.open, name, "rb", cache_type="none")
    with file:
        told(file.seek, offset)
        yield Stream(offset, total, lambda size: bytes(told(file.read, size)))


def probe(url: str, timeout_s: float) -> None:
    """Looks whether there is something at a URL; what keeps it from being seen is no matter here.

    Raises:
        MissingError: There is nothing.
    """
    try:
        with open_stream(url, 0, timeout_s):
            pass
    except (OSError, HTTPException):
        pass


def list_urls(pattern: str) -> list[str]:
    """The URLs that a glob finds, where fsspec can list.

    Raises:
        ConfigError: The scheme needs a package that is not installed.
        DataError: They cannot be listed.
    """
    filesystem, name = _filesystem(pattern)
    try:
        return [filesystem.unstrip_protocol(found) for found in filesystem.glob(name)]
    except Exception as error:  # each client has its own
        raise DataError(f"{pattern}: cannot be listed: {error}") from error


def _filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the file's name there."""
    from fsspec.core import url_to_fs

    try:
        filesystem, name = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(f'"{shown(url)}": {error}') from error
    return filesystem, name


def is_http(url: str) -> bool:
    """Whether it is http or https."""
    return url.lower().startswith(("http://", "https://"))


def shown(url: str) -> str:
    """The URL as messages show it: without a query, which may be a signature."""
    return re.sub(r"\?.*", "?...", url) if is_http(url) else url


def check_url(url: str) -> None:
    """Refuses what is no URL that shards are read from: commands above all.

    Raises:
        ConfigError: As it says.
    """
    from fsspec import available_protocols

    match = SCHEME.match(url)
    assert match is not None
    scheme, known = match[1].lower(), sorted({*available_protocols(), "http", "https"})
    if not match[2] or scheme not in known or "::" in url:
        near = difflib.get_close_matches(scheme, known, n=1) if match[2] else []
        hint = f"did you mean {near[0]}://?" if near and near[0] != scheme else ""
        rule = "shards are files, https:// or what fsspec knows (s3://, gs://); no commands"
        raise ConfigError(f'"{shown(url)}": {hint or rule}')
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  # checks it
    except ValueError as error:
        raise ConfigError(f'"{shown(url)}": {error}') from error
    if is_http(url) and (not parts.hostname or "@" in parts.netloc):
        raise ConfigError(f'"{scheme}://...": a URL needs a host, and no user or password in it')
