"""The command line: `ditserve serve` and `ditserve generate` (installed as `sglang` too)."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from configs.server_args import ServerArgs
from deployments.api.protocol.requests import VideoRequest
from deployments.command.cluster import PROXY_ENVIRONMENT, http_options, logging_config, served
from deployments.command.generate import MODEL_FIELDS, SAMPLING_FIELDS, generate_files
from deployments.command.preconditions import StartFailed
from deployments.errors import APIError
from deployments.names import APPLICATION


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0 done, 1 failed, 2 called wrongly."""
    parser = argparse.ArgumentParser(prog="ditserve", description=__doc__)
    parser.add_argument("--version", action="version", version=f"ditserve {version('ditserve')}")
    commands = parser.add_subparsers(dest="command", required=True)
    # Flags may not be abbreviated: a misspelt flag would be taken for another.
    settings: dict[str, Any] = {"formatter_class": _Formatter, "allow_abbrev": False}
    serve = commands.add_parser("serve", help="start the server", **settings)
    add_flags(serve)
    serve.add_argument("--print-config", action="store_true", help="print the equivalent serve_config.yaml and exit")
    serve.set_defaults(run=_serve)
    generate = commands.add_parser("generate", help="make an image or a video without a server", **settings)
    add_flags(generate, only=MODEL_FIELDS)
    for name in SAMPLING_FIELDS:
        described = (VideoRequest.model_fields[name].description or "").removeprefix("Extension: ")
        help_text = described[:1].upper() + described[1:]
        flag, required = f"--{name.replace('_', '-')}", name == "prompt"
        generate.add_argument(flag, type=str, required=required, metavar="VALUE", help=help_text)
    generate.add_argument("--image-path", type=Path, nargs="+", default=[], metavar="FILE", help="Input images.")
    generate.add_argument(
        "--output-path",
        type=Path,
        required=True,
        metavar="PATH",
        help="A file (.png, .webp, .jpg, .mp4), or a folder for one file per output.",
    )
    generate.set_defaults(run=_generate)
    arguments = vars(parser.parse_args(argv))
    run = arguments.pop("run")
    del arguments["command"]
    try:
        return run(**arguments)
    except ValidationError as error:
        print(f"ditserve: {_flag_errors(error)}", file=sys.stderr)
        return 2
    except (StartFailed, APIError, ValueError, OSError) as error:
        print(f"ditserve: {error}", file=sys.stderr)
        return 1


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.MetavarTypeHelpFormatter):
    """Shows types, and defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def add_flags(parser: argparse.ArgumentParser, only: Sequence[str] | None = None) -> None:
    """One flag per field of `ServerArgs` (or per one named in `only`): `num_gpus` becomes `--num-gpus`."""
    for name, info in ServerArgs.model_fields.items():
        if only is None or name in only:
            reading = {"default": info.default, **_reading(info)}
            parser.add_argument(f"--{name.replace('_', '-')}", help=info.description, **reading)


def _reading(info: FieldInfo) -> dict[str, Any]:
    """How argparse reads a field. A boolean is a bare `--flag`, or `--flag true|false` as in SGLang; a flag with
    several values is repeated."""
    kinds = [kind for kind in get_args(info.annotation) if kind is not type(None)]
    if get_origin(info.annotation) is tuple:
        return {"action": "append", "type": str, "default": None}
    if get_origin(info.annotation) is Literal:
        return {"choices": kinds, "type": str}
    kind = kinds[0] if kinds else info.annotation
    if kind is bool:
        return {"type": _truth, "nargs": "?", "const": True, "metavar": "true|false"}
    return {"type": kind}


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return text.lower() == "true"


def _flag_errors(error: ValidationError) -> str:
    """Pydantic's errors in terms of the command line."""
    return "; ".join(
        f"--{str(found['loc'][0]).replace('_', '-')}: {found['msg']}" if found["loc"] else str(found["ctx"]["error"])
        for found in error.errors()
    )


def _serve(print_config: bool, **flags: Any) -> int:
    args = ServerArgs(**flags)
    if print_config:
        print(serve_config(args), end="")
        return 0
    stop = threading.Event()

    def request_stop(signum: int, frame: FrameType | None) -> None:
        if stop.is_set() and signum != signal.SIGINT:
            return  # `timeout` sends SIGTERM twice, to the process and to its group; a second Ctrl-C means hurry
        interrupt = stop.is_set() or not ready
        stop.set()
        if interrupt:
            raise KeyboardInterrupt

    ready = False
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, request_stop)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as it is under `nohup`
        signal.signal(signal.SIGHUP, request_stop)
    try:
        with served(args) as settled:
            ready = True
            print(ready_line(settled), flush=True)
            stop.wait()
            print("ditserve is stopping", flush=True)
    except KeyboardInterrupt:
        return 130
    return 0


def ready_line(args: ServerArgs) -> str:
    """Where to reach the server, and what it computes on; `args.device` must be resolved."""
    kind, transport = ("GPU", "NCCL") if args.device == "cuda" else ("CPU rank", "gloo")
    ranks = f"1 {kind}" if args.num_gpus == 1 else f"{args.num_gpus} {kind}s over {transport}"
    return f"ditserve is ready on {ranks}: http://{args.host}:{args.port}/v1 (API page: /docs)"


def _generate(output_path: Path, image_path: list[Path], **flags: Any) -> int:
    fields = {name: flags.pop(name) for name in SAMPLING_FIELDS}
    given = {name: value for name, value in fields.items() if value is not None}
    for path in generate_files(ServerArgs(**flags), output_path, image_path, given):
        print(path)
    return 0


def serve_config(args: ServerArgs) -> str:
    """The YAML with which `serve run` starts the same server."""
    # Settings of Ray and Serve themselves go outside the application's arguments, or to `ray start`.
    set_args = args.model_dump(mode="json", exclude_defaults=True, exclude={"host", "port", "metrics_port"})
    config = {
        "proxy_location": "HeadOnly",
        "http_options": http_options(args),
        "logging_config": logging_config(args),
        "controller_options": {"runtime_env": {"env_vars": PROXY_ENVIRONMENT}},
        "applications": [
            {"name": APPLICATION, "route_prefix": "/", "import_path": "deployments.app:build", "args": set_args}
        ],
    }
    return yaml.safe_dump(config, sort_keys=False)


if __name__ == "__main__":
    sys.exit(main())
