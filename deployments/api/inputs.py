"""Input images: from the fields of a request to bytes that are known to be images."""

from __future__ import annotations

import asyncio
import binascii
from base64 import b64decode
from dataclasses import dataclass

from configs.server_args import ServerArgs
from deployments.api.multipart import too_large
from deployments.api.protocol.requests import ImageReference, InputImage
from deployments.errors import APIError
from pipelines.job import content_key
from pipelines.media.uploads import MAX_INPUT_PIXELS, decode_image, decode_mask


@dataclass(frozen=True)
class Upload:
    """A PNG, WebP or JPEG as it was sent, known to be intact."""

    data: bytes
    key: str
    """The content key by which a job refers to it."""
    size: tuple[int, int]
    """Width and height in pixels, once its EXIF orientation is applied."""


async def input_image(image: InputImage, param: str, args: ServerArgs) -> Upload:
    """The image that a request gives in `param`, whatever its declared type or name.

    Raises:
        APIError: 400 for an image that cannot be obtained, 413 for one that is too large.
        InvalidJob: not an image, or damaged.
    """
    data = await _bytes_of(image, param, args)

    def examined() -> Upload:
        decoded = decode_image(data, max_pixels=MAX_INPUT_PIXELS, param=param)
        return Upload(data, content_key(data), decoded.size)

    return await asyncio.to_thread(examined)


async def input_mask(mask: InputImage, image: Upload, args: ServerArgs) -> Upload:
    """The mask of `image`. Raises as `input_image`, and `InvalidJob` if its size differs or it has no alpha channel."""
    data = await _bytes_of(mask, "mask", args)

    def examined() -> Upload:
        decode_mask(data, size=image.size, max_pixels=MAX_INPUT_PIXELS)
        return Upload(data, content_key(data), image.size)

    return await asyncio.to_thread(examined)


async def _bytes_of(image: InputImage, param: str, args: ServerArgs) -> bytes:
    data = image if isinstance(image, bytes) else await _referenced(image, param, args)
    if len(data) > args.max_upload_bytes:
        raise too_large(param, args.max_upload_bytes)
    return data


async def _referenced(image: ImageReference | str, param: str, args: ServerArgs) -> bytes:
    url = image.image_url if isinstance(image, ImageReference) else image
    if url is None:
        raise _refused(
            param, "give the image itself, as a file or an image_url: this server keeps no files for a file_id"
        )
    scheme, _, rest = url.partition(":")
    match scheme.lower():
        case "data":
            return await asyncio.to_thread(_data_url_bytes, rest, param)
        case "http" | "https" if args.allow_remote_media:
            from deployments.api.remote_media import fetch  # imports aiohttp: 8 MB that few servers need

            return await fetch(url, param, args.max_upload_bytes)
        case "http" | "https":
            raise _refused(param, "images are not fetched from remote URLs; upload the file or give it as a data: URL")
        case _:
            raise _refused(param, "it must be a file upload or a data: URL")


def _data_url_bytes(rest: str, param: str) -> bytes:
    kind, comma, payload = rest.partition(",")
    if not comma:
        raise _refused(param, "the data: URL has no data")
    if not kind.lower().endswith(";base64"):  # Python decodes percent codes in 0.2 s and 25 MB per megabyte
        raise _refused(param, "the data: URL is not base64")
    try:
        return b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: characters outside of ASCII
        raise _refused(param, "the data: URL is not valid base64") from error


def _refused(param: str, reason: str) -> APIError:
    return APIError(400, f"Invalid '{param}': {reason}", param=param, code="invalid_image")
