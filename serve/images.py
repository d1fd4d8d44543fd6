"""Reads the images of a request: base64 data URLs, or URLs on allowed hosts."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import ipaddress
import re
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

from sae_ray.images import PIXEL_LIMIT, BadImage, decode_image
from sae_ray.images.rendering import ON_WHITE, Rendering

from .errors import ApiError, invalid

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import UInt8
    from PIL import Image

_DATA_URL = re.compile(r"\s*data:(.*?;)?\s*base64\s*,", re.IGNORECASE | re.DOTALL)
"""With any media type and parameters, such as a file's name: the bytes tell what the image is."""
LONGEST_PREFIX = 2000
_URL_SAFE = str.maketrans("-_", "+/")
FETCH_SECONDS = 10.0


async def read_image(
    url: str, hosts: Sequence[str], max_bytes: float, max_pixels: float, rendering: Rendering = ON_WHITE
) -> Image.Image:
    """The image, RGB, upright, over white where it is transparent. Its size is checked before it is decoded.

    Raises ApiError if it is not a usable image, is too large, or cannot be fetched.
    """
    prefix = _DATA_URL.match(url[:LONGEST_PREFIX])
    if prefix is not None:
        data = await asyncio.to_thread(_from_base64, url[prefix.end() :])
    elif url[:8].lower().startswith(("http://", "https://")):
        data = await fetch(url, hosts, max_bytes)
    else:
        raise invalid("an image must be a data URL: data:image/png;base64,… with the bytes of an image file", "image")
    if len(data) > max_bytes:
        raise ApiError(413, "image_too_large", f"the image has {len(data):,} bytes, more than {max_bytes:,.0f}")
    return await asyncio.to_thread(_decode, data, max_pixels, rendering)


def _from_base64(text: str) -> bytes:
    """Decodes base64 as clients write it: in lines, percent-encoded, url-safe, without padding."""
    if "%" in text:
        text = unquote(text)
    text = "".join(text.split()).rstrip("=").translate(_URL_SAFE)
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(f"the data URL of an image is not valid base64 ({error})", "image") from error


def _decode(data: bytes, max_pixels: float, rendering: Rendering) -> Image.Image:
    try:
        return decode_image(data, min(int(max_pixels), PIXEL_LIMIT), rendering=rendering)
    except BadImage as error:
        raise invalid(
            f"the image cannot be used: {error}; send a JPEG, PNG, WebP or other image file of at most "
            f"{max_pixels / 1e6:.1f} megapixels (the limit holds for all images of a request together)",
            "image",
        ) from error


def as_data_url(pixels: UInt8[np.ndarray, "height width 3"]) -> str:
    """An image as a PNG file in a URL."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


async def fetch(url: str, hosts: Sequence[str], max_bytes: float) -> bytes:
    """Fetches a URL from an allowed public host, without redirects, within a size and time limit.

    Raises ApiError if that is not possible.
    """
    try:
        host = urlsplit(url).hostname or ""
    except ValueError as error:
        raise invalid(f"{url[:100]!r} is not a valid image URL ({error})", "image_url") from error
    if host not in hosts:
        known = f"allowed hosts are {', '.join(hosts)}" if hosts else "send the image as a data URL"
        raise invalid(f"this server does not fetch images from {host[:100]!r}; {known}", "image_url")
    timeout = aiohttp.ClientTimeout(total=FETCH_SECONDS)
    connector = aiohttp.TCPConnector(resolver=PublicResolver())
    try:
        if _is_address(host):
            check_public(host)  # the resolver is not called for addresses
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False) as session,
            session.get(url, allow_redirects=False) as response,
        ):
            if response.status != 200:
                raise invalid(f"{host} answered {response.status} instead of an image", "image_url")
            data = await response.content.read(int(max_bytes) + 1)
            while len(data) <= max_bytes and (more := await response.content.read(int(max_bytes) + 1 - len(data))):
                data += more
            return data
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise invalid(f"the image could not be fetched from {host} ({type(error).__name__})", "image_url") from error


class PublicResolver(AbstractResolver):
    """Resolves names to public addresses only. The client connects to exactly these addresses."""

    def __init__(self) -> None:
        self._resolver = ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._resolver.resolve(host, port, family)
        for one in found:
            check_public(one["host"])
        return found

    async def close(self) -> None:
        await self._resolver.close()


def check_public(address: str) -> None:
    """Raises OSError for a private, local or multicast address."""
    found: Any = ipaddress.ip_address(address)
    if not (getattr(found, "ipv4_mapped", None) or found).is_global or found.is_multicast:
        raise OSError("not a public address")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
