"""Serve a model over HTTP: notes as JSON in, embeddings out. Needs: pip install -e ".[serve]"

    python examples/serve.py MODEL --port 8000
    curl localhost:8000/embed -H 'content-type: application/json' -d '{"notes": [{"title": "Oak shelf"}]}'

A picture is the base64 text of an image file: {"image": "…"}. Paths are not taken: nobody reads this machine's files.
A text in place of a note is its content.
"""

import argparse
import base64
import binascii
import sys
import threading
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, BeforeValidator, Field, model_validator

MAX_NOTES = 256
"""Of one request."""


def decode_image(text: Any) -> bytes:
    """The base64 text of a file, line breaks allowed, as its bytes."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (AttributeError, binascii.Error, ValueError) as error:
        raise ValueError(
            f"{text!r:.80} is not base64: send the content of the picture's file as base64 text, not its name"
        ) from error


class NoteFields(BaseModel, extra="forbid"):
    """A note; one of text or image is needed."""

    title: str = ""
    topics: list[str] | str = ""
    content: str = ""
    image: Annotated[bytes, BeforeValidator(decode_image)] | None = None

    @model_validator(mode="before")
    @classmethod
    def from_text(cls, note: Any) -> Any:
        """A text is a note's content."""
        return {"content": note} if isinstance(note, str) else note


class EmbedRequest(BaseModel, extra="forbid"):
    """Notes to encode, and how many dimensions to keep (default: all)."""

    notes: Annotated[list[NoteFields], Field(min_length=1, max_length=MAX_NOTES)]
    truncate_dim: int | None = None


class EmbedResponse(BaseModel):
    """One embedding a note, in the notes' order, each of unit length."""

    embeddings: list[list[float]]


def create_app(model: Any, batch_size: int = 32) -> FastAPI:
    """The application, for any ASGI server."""
    app = FastAPI(title="Note embeddings", docs_url=None, redoc_url=None)  # these pages load from other servers
    turn = threading.Lock()  # requests run in threads; one at a time has the device

    @app.post("/embed")
    def embed(request: EmbedRequest) -> EmbedResponse:
        notes = [dict(note) for note in request.notes]  # not model_dump, which encodes pictures again
        try:
            with turn:
                embeds = model.encode(notes, batch_size=batch_size, truncate_dim=request.truncate_dim)
        except ValueError as error:  # a note that cannot be read: the message names it, its field and the remedy
            raise HTTPException(422, str(error)) from error
        return EmbedResponse(embeddings=embeds.tolist())

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    return app


def load_model(name: str, device: str) -> Any:
    """The model, with its own code."""
    from safetensors import SafetensorError
    from transformers import AutoModel  # seconds, which --help and a wrong option need not take

    try:
        return AutoModel.from_pretrained(name, trust_remote_code=True).eval().to(device)
    except (OSError, ValueError, SafetensorError) as error:  # the last where weights are damaged
        sys.exit(f"error: {name!r} is no folder with a model, and no Hub id that can be read: {_first_line(error)}")
    except (AssertionError, RuntimeError) as error:  # torch has both for a device that is not there
        sys.exit(f"error: --device={device} cannot be used: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Serve a model over HTTP.")
    parser.add_argument("model", help="folder or Hub id; its own code is run")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 to be reached from other machines")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, …")
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.port <= 65535:
        sys.exit(f"error: --port={arguments.port} must lie between 1 and 65535")
    model = load_model(arguments.model, arguments.device)
    import uvicorn

    uvicorn.run(create_app(model), host=arguments.host, port=arguments.port)


if __name__ == "__main__":
    main()
