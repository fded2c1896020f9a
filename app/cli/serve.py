"""`layerskip serve`: a model over HTTP, in the form of OpenAI's API. Tested by tests/integration/test_serving.py."""

import importlib.util
import logging
import os
import socket
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.decoding.strategies import Strategy
from app.errors import ConfigError, check_range
from app.generation.loaded_model import DraftLoadOptions
from app.generation.options import DraftOptions, GenerationOptions
from app.generation.request import Request, chosen_settings

if TYPE_CHECKING:
    from app.serving.offer import Offer

_log = logging.getLogger(__name__)
_KEY = "LAYERSKIP_API_KEY"
_PACKAGES = ("starlette", "uvicorn", "pydantic", "prometheus_client")
_LOOPBACK = ("127.", "::1", "localhost")


def serve(
    *,
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    served_name: str | None = None,
    batch_size: int = 8,
    max_waiting: int = 64,
    max_new_tokens: int = 1024,
    max_body_bytes: int = 1_000_000,
    loading: DraftLoadOptions,
    **options: Any,
) -> None:
    """Serve a model over HTTP, in the form of OpenAI's API, for development and small deployments.

    It offers /v1/completions, /v1/chat/completions, /v1/models, /health and /metrics (Prometheus). Requests that wait
    are decoded together. If the environment variable LAYERSKIP_API_KEY is set, clients must send it as their API key.

    Args:
        model: Lightning checkpoint of a run, Hugging Face directory, hub id or .gguf file.
        host: Address to listen on; by default, only this machine can reach the server.
        port: Port to listen on; 0 takes a free one.
        served_name: Name of the model in requests and answers; by default, the last part of its path.
        batch_size: Largest number of prompts that are decoded together.
        max_waiting: Largest number of prompts that wait; more are refused with status 429.
        max_new_tokens: Largest number of new tokens that a request may ask for.
        max_body_bytes: Largest size of a request's body, in bytes.
        loading: See DraftLoadOptions.
        options: See DraftOptions.
    """
    _check_packages()
    from app.serving.application import application  # these load the packages of the extra
    from app.serving.offer import Offer
    from app.serving.scheduler import Scheduler
    from app.serving.server import run_server

    drafting = DraftOptions(**options)
    check_range("batch_size", batch_size, low=1)
    check_range("max_waiting", max_waiting, low=1)
    check_range("max_new_tokens", max_new_tokens, low=1)
    check_range("max_body_bytes", max_body_bytes, low=1)
    with _bind(host, port) as bound:
        loaded = loading.load(model)
        # Costs that were tuned at batch size 1 say when a sampled text stops drafting, which its neighbours must not.
        strategy, settings = chosen_settings(loaded, GenerationOptions(**asdict(drafting)), batch_size=1)
        offer = Offer(
            name=served_name or Path(model).name,
            loaded=loaded,
            settings=settings,
            max_new_tokens=max_new_tokens,
            max_body_bytes=max_body_bytes,
            key=os.environ.get(_KEY) or None,
        )
        scheduler = Scheduler(loaded.decoder, strategy, batch_size=batch_size, max_waiting=max_waiting)
        _announce(offer, strategy, host=host, port=bound.getsockname()[1])
        run_server(application(offer, scheduler), scheduler, bound)


def _check_packages() -> None:
    """Raise ConfigError where a package of the extra is absent."""
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        got = f"no package {missing[0]}"
        raise ConfigError("serve", got=got, allowed="the extra serve", fix='pip install "layerskip-lightning[serve]"')


def _announce(offer: "Offer", strategy: Strategy, *, host: str, port: int) -> None:
    """Log where the server is and how it decodes, and warn where strangers may use it."""
    if offer.key is None and not host.startswith(_LOOPBACK):
        _log.warning("whoever reaches %s can use this server: set %s to ask for a key", host, _KEY)
    request = Request(loaded=offer.loaded, texts=(), tokens=(), strategy=strategy, settings=offer.settings, seed=0)
    address = f"[{host}]" if ":" in host else host
    _log.info("serving %s at http://%s:%d/v1: %s", offer.name, address, port, request.label)


def _bind(host: str, port: int) -> socket.socket:
    """A socket that is bound but does not listen yet, so that nobody waits while the model is loaded."""
    check_range("port", port, low=0, high=2**16 - 1)
    if not host:
        raise ConfigError("host", got=host, allowed="an address of this machine", fix="0.0.0.0 stands for all of them")
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        got, allowed = f"{host}:{port}", "an address of this machine and a port that is free"
        raise ConfigError("port", got=got, allowed=allowed, fix=error.strerror or str(error)) from error
    return bound
