"""A vLLM server that this process starts in a Python environment of its own, and stops at the end."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist

from megatron_align.errors import InputError, require
from megatron_align.model.parallel import failing_together
from megatron_align.rollout.endpoint import VLLM_KEY_VARIABLE, Endpoint, RequestFailed
from megatron_align.storage.atomic_write import require_writable

VLLM_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}  # by our names of precisions
START_SECONDS = 1800.0  # until it answers: it loads a large model and compiles
STOP_SECONDS = 30.0  # between the request to end and the kill
_POLL_SECONDS = 0.5
_DEATH_SIGNAL = 1  # of prctl: sent to the server when this process dies
_SHOWN = 300  # characters of its log in an error line
# Set by launchers for our ranks; a server that finds them takes itself for one of the ranks.
_OF_LAUNCHERS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
)
_OF_OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "MASTER_ADDR", "MASTER_PORT", *_OF_LAUNCHERS)


class VLLMServer:
    """A running vLLM server; as a context manager it is stopped after the with-block.

    It runs ``vllm serve`` of the environment, on this machine, on a free port, with the routes of new weights and with
    ``processed_logprobs``. It ends with this process, however that ends. ``CUDA_VISIBLE_DEVICES`` is passed on.

    Args:
        python: interpreter of an environment that has vLLM.
        model: Hugging Face folder.
        log: file that its output is appended to.
        options: of ``vllm serve``, such as ``--tensor-parallel-size 2``.
        start_seconds: longest time until it answers.

    Attributes:
        url: of the server.
        pid: of its process, which leads a process group.

    Raises:
        InputError: the environment has no vLLM, the model is no Hugging Face folder, or the server dies or does not
            answer in time.
    """

    def __init__(
        self,
        python: str | Path,
        model: str | Path,
        log: str | Path,
        options: Sequence[str] = (),
        start_seconds: float = START_SECONDS,
    ) -> None:
        command = vllm_command(Path(python).expanduser())
        require(
            (Path(model) / "config.json").is_file(),
            f"a vllm server needs a Hugging Face folder, found no config.json in {model}: export the checkpoint",
        )
        self.log = Path(log)
        require_writable(self.log)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        given = ["serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
        command += [*given, "--logprobs-mode", "processed_logprobs", *options]
        environment = {name: value for name, value in os.environ.items() if not _is_ours(name)}
        with self.log.open("ab") as output:
            output.write(f"\n{shlex.join(command)}\n".encode())
            output.flush()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**environment, "VLLM_SERVER_DEV_MODE": "1"},
                start_new_session=True,  # Ctrl-C is for this process, which then stops the server
                preexec_fn=_end_with_parent,  # noqa: PLW1509 - one system call
            )
        self.pid = self._process.pid
        try:
            self._wait_until_healthy(start_seconds)
        except BaseException:
            self.stop()
            raise

    def endpoint(self) -> Endpoint:
        """Return the server's endpoint, whose requests fail at once when the server is dead."""
        return Endpoint(self.url, key_variable=VLLM_KEY_VARIABLE, gone=self.death)

    def death(self) -> str | None:
        """Return one line that says how the server died; None: it runs."""
        code = self._process.poll()
        if code is None:
            return None
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return f"the vllm server (process {self.pid}) ended {how}: {self._last_line()} (log {self.log})"

    def stop(self) -> None:
        """Ask the server and its processes to end, and kill those that remain."""
        _signal_group(self.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        _signal_group(self.pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> VLLMServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_until_healthy(self, seconds: float) -> None:
        """Wait until the server answers."""
        probe, began = Endpoint(self.url, key_variable="", timeout_seconds=10.0, tries=1), time.monotonic()
        while True:
            try:
                probe.get("/health")
                return
            except RequestFailed as error:
                reason = str(error)
            if (line := self.death()) is not None:
                raise InputError(line)
            if time.monotonic() - began > seconds:
                raise InputError(
                    f"the vllm server must answer within {seconds:g} s, it did not: {self._last_line()} "
                    f"(log {self.log}; {reason})"
                )
            time.sleep(_POLL_SECONDS)

    def _last_line(self) -> str:
        """Return the last line of the log."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 8192))
            lines = [line for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
        line = " ".join(lines[-1].split()) if lines else "it wrote nothing"
        return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 3]}..."


@contextmanager
def shared_server(
    python: str | Path, model: str | Path, log: Path, options: Sequence[str], dtype: str
) -> Iterator[str | Endpoint]:
    """Run a server for the ranks of one machine within a with-block; rank 0 starts and stops it. Collective.

    Args:
        python: as :class:`VLLMServer`.
        model: as :class:`VLLMServer`.
        log: as :class:`VLLMServer`.
        options: as :class:`VLLMServer`.
        dtype: of the model in the server, unless the options name one.

    Raises:
        InputError: on every rank: the server does not start, or the ranks are on several machines.
    """
    hosts = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    line = f"rollout.vllm_python serves the ranks of one machine, got {', '.join(sorted(set(hosts)))}: give rollout.url"
    require(len(set(hosts)) == 1, line)
    with ExitStack() as opened:
        found: list[str | Endpoint] = [""]
        with failing_together():
            if dist.get_rank() == 0:
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()  # the server takes the memory that is free
                given = [] if "--dtype" in options else ["--dtype", dtype]
                server = opened.enter_context(VLLMServer(python, model, log, [*given, *options]))
                found = [server.url]
        dist.broadcast_object_list(found, src=0)
        yield server.endpoint() if dist.get_rank() == 0 else found[0]


def vllm_command(python: str | Path) -> list[str]:
    """Return how ``vllm`` of an environment is run.

    Raises:
        InputError: there is no such interpreter, or its environment has no vLLM.
    """
    python = Path(python)
    if not (python.is_file() and os.access(python, os.X_OK)):
        raise InputError(
            f"vllm_python must be the Python interpreter of an environment with vLLM, got {python}"
        )
    script = python.parent / "vllm"
    if not script.is_file():
        raise InputError(
            f"vllm_python must be the interpreter of an environment with vLLM, found no {script}: "
            f"{python} -m pip install vllm"
        )
    return [str(python), str(script)]


def _is_ours(name: str) -> bool:
    return name in _OF_OURS or name.startswith("TORCHELASTIC_")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


_LIBC = ctypes.CDLL(None)


def _end_with_parent() -> None:
    """Let the kernel send SIGTERM to this process when the one that started it dies."""
    _LIBC.prctl(_DEATH_SIGNAL, signal.SIGTERM)


def _signal_group(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, number)
