"""A small HTTP server in a thread of the test's process, whose answers a test scripts."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

# (path, body) -> (status, answer): a mapping becomes JSON, text is sent as it is
Script = Callable[[str, Any], tuple[int, Any]]


@contextmanager
def serving(
    script: Script, headers: dict[str, str] | None = None, received: list[Message] | None = None
) -> Iterator[str]:
    """Yield the URL of a server that answers as the script says; the headers of requests go to ``received``."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, body):
            if received is not None:
                received.append(self.headers)
            status, answer = script(self.path, body)
            data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with suppress(BrokenPipeError):  # a client that gave up
                self.wfile.write(data)

        def do_GET(self):
            self._answer(None)

        def do_POST(self):
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class VLLMScript:
    """Answers as vLLM does: the completion of a request is its seed modulo 7, as many tokens as are allowed.

    ``tokenizer``: of its model; None: it has no route /tokenize. ``root``: folder of its model.
    """

    def __init__(self, context=64, rl=True, most_rank=16, tokenizer=None, root="m"):
        self.context, self.rl, self.most_rank = context, rl, most_rank
        self.tokenizer, self.root = tokenizer, root
        self.adapters, self.loaded = (
            {},
            [],
        )  # those that it has by name; name and tensors of every one ever loaded
        self.requests, self.weights, self.resets, self.version = [], [], 0, "default"

    def __call__(self, path, body):
        if path == "/v1/models":
            cards = [{"id": name, "parent": "m"} for name in self.adapters]
            card = {"id": "m", "root": str(self.root), "max_model_len": self.context}
            return 200, {"data": [card, *cards]}
        if self.tokenizer and path == "/tokenize":
            tokens = self.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"]).input_ids
            return 200, {"count": len(tokens), "max_model_len": self.context, "tokens": tokens}
        if path.endswith("_lora_adapter"):
            return self._lora(path, body)
        if path == "/v1/completions":
            if body["model"] not in ("m", *self.adapters):
                return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
            self.requests.append(body)
            count = min(body["max_tokens"], 3)
            reason = "length" if count == body["max_tokens"] else "stop"
            tokens = [body["seed"] % 7] * count
            choice = {"text": str(tokens), "token_ids": tokens, "finish_reason": reason}
            return 200, {"choices": [{**choice, "logprobs": {"token_logprobs": [-0.5] * count}}]}
        if self.rl and path == "/collective_rpc":
            files = sorted(Path(body["kwargs"]["weights_path"]).glob("*.safetensors"))
            self.weights.append({name: tensor for file in files for name, tensor in load_file(file).items()})
            return 200, {}
        if self.rl and path == "/update_weight_version":
            self.version = body["new_version"]
            return 200, {"success": True, "new_version": self.version}
        if self.rl and path == "/weight_info":
            return 200, {"weight_version": self.version}
        if self.rl and path == "/reset_prefix_cache":
            self.resets += 1
            return 200, ""
        return 404, {"detail": "Not Found"}

    def _lora(self, path, body):
        name = body["lora_name"]
        if path == "/v1/unload_lora_adapter":
            del self.adapters[name]
            return 200, f"Success: LoRA adapter '{name}' removed successfully."
        folder = Path(body["lora_path"])
        config = json.loads((folder / "adapter_config.json").read_text())
        if config["r"] > self.most_rank:
            message = f"LoRA rank {config['r']} is greater than max_lora_rank {self.most_rank}."
            return 400, {"error": {"message": message}}
        self.adapters[name] = config
        self.loaded.append((name, load_file(folder / "adapter_model.safetensors")))
        return 200, f"Success: LoRA adapter '{name}' added successfully."
