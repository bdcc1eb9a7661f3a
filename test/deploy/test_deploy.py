"""The deployments, as far as they can be tried without an engine, a cluster and a GPU."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
import venv
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs, prepare_server_args

from cached_attention.permissions import make_private

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
USER = 10001
SETTINGS = {
    "MODEL": "Qwen/Qwen3-8B",
    "HOST_SIZE": "64GB",
    "DISK_SIZE": "1TB",
    "HOST": "127.0.0.1",
    "PORT": "30000",
    "ARGS": "--tensor-parallel-size 2",
    "API_KEY": "key",
    "ADMIN_API_KEY": "secret",
    "KV_DIRECTORY": "/nvme/kv",
}


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's own reading of a command line, on a machine that has the memory and the disk."""
    load_plugins()
    usage = psutil.disk_usage("/")._replace(free=10**14)
    monkeypatch.setattr("sglang.srt.mem_cache.cached_attention.settings.free_memory", lambda: 10**13)
    monkeypatch.setattr(psutil, "disk_usage", lambda _path: usage)

    def parse(arguments: list[str]) -> ServerArgs:
        args = prepare_server_args(arguments)
        assert args.enable_unified_cache_external_linker
        assert args.unified_cache_external_linker_config["linker_extra_config"]["disk_path"] is not None
        return args

    return parse


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their arguments."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]  # type: ignore[misc]


def arguments_of(instruction: str) -> list[str]:
    """Of the last `instruction` in exec form."""
    text = [value for name, value in instructions() if name == instruction][-1]
    listed: list[str] = yaml.safe_load(text[text.index("[") :])
    return listed


def tool(name: str) -> Path:
    """A program that pip installed beside this Python."""
    return Path(sys.executable).with_name(name)


def test_the_dockerfile_is_linted() -> None:
    done = subprocess.run([tool("hadolint"), DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_image_is_for_the_sglang_that_the_package_needs() -> None:
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pin,) = [one for one in package["dependencies"] if one.startswith("sglang==")]
    assert f"pip install --no-cache-dir {pin}\n" in (DEPLOY / "Dockerfile").read_text()
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert compose["services"]["sglang"]["image"] == f"sglang-cached-attention:{package['version']}"


def test_the_image_does_not_run_as_root() -> None:
    assert ("USER", f"{USER}:{USER}") in instructions()
    assert f"--uid {USER} " in (DEPLOY / "Dockerfile").read_text()


def test_what_the_image_installs(tmp_path: Path) -> None:
    """The step that installs this package, from what reaches the build, beside the SGLang that is here."""
    source = tmp_path / "src"
    for name in _build_context():
        whole = ROOT / name
        shutil.copytree(whole, source / name) if whole.is_dir() else _copy(whole, source / name)
    (step,) = [run for name, run in instructions() if name == "RUN" and "/src" in run]
    mount, _, commands = step.partition(" ")
    assert mount == "--mount=type=bind,target=/src,rw"
    install, kernels = commands.split("&&")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    words = [word.replace("/src", str(source), 1) for word in shlex.split(install)[1:]]
    assert f"{source}[encryption,remote]" in words
    run(python, *words, "--no-deps", "--quiet", "--disable-pip-version-check", cwd=tmp_path)
    module = shlex.split(kernels)[-1]
    probe = f"import importlib.util as u; print(u.find_spec('{module}.__main__').origin)"
    found = run(python, "-c", probe, cwd=tmp_path)
    assert Path(found.strip()).is_relative_to(tmp_path / "venv")
    (library,) = (tmp_path / "venv").glob("lib/python3*/site-packages/cached_attention/kernels")
    assert any((library / "csrc").glob("*.cu"))


def _build_context() -> list[str]:
    """What the ignore file lets through: everything is out, and some is in again."""
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    assert lines[0] == "**"
    return [line[1:] for line in lines if line.startswith("!")]


def _copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, target)


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def health() -> Iterator[Any]:
    """Something that answers `/health` with a status of our choice; port and status."""
    state = {"status": 200}

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(state["status"] if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_args: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, state
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_check(status: int, healthy: bool, health: Any) -> None:
    port, state = health
    state["status"] = status
    _, *words = arguments_of("HEALTHCHECK")
    command = [sys.executable, *(word.replace(":30000/", f":{port}/") for word in words)]
    assert (subprocess.run(command, capture_output=True, timeout=60).returncode == 0) == healthy


def entry() -> list[str]:
    """What the image adds to the arguments that it is given."""
    words = arguments_of("ENTRYPOINT")
    assert words[:5] == ["tini", "--", "python", "-m", "sglang.launch_server"]
    return words[5:]


def compose() -> dict[str, Any]:
    """The service, with the settings filled in as Compose does: `${NAME}`, `${NAME:-default}`, `${NAME:?why}`."""

    def fill(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        return SETTINGS.get(name, default or "")

    pattern = re.compile(r"\$\{(?P<name>\w+)(?::-(?P<default>[^}]*)|:\?[^}]*)?\}")
    service: dict[str, Any] = yaml.safe_load(pattern.sub(fill, (DEPLOY / "compose.yaml").read_text()))
    return service["services"]["sglang"]


def test_compose(parse: Any) -> None:
    service = compose()
    args = parse([*entry(), *service["command"]])
    assert (args.host, args.port, args.admin_api_key) == ("0.0.0.0", 30000, "secret")
    volumes = dict(volume.rsplit(":", 1)[::-1] for volume in service["volumes"])
    assert volumes["/kv"] == "/nvme/kv"
    assert (DEPLOY / ".." / service["build"]["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
    assert service["read_only"]


def kubernetes() -> dict[str, Any]:
    return {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}


@pytest.mark.parametrize("version", ["1.30", "1.36"])
def test_kubernetes_takes_the_manifest(version: str) -> None:
    options = ["--strict", "--kubernetes-version", version]
    command = [tool("kubernetes-validate"), *options, DEPLOY / "kubernetes.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed") + done.stderr.count("passed") == len(kubernetes())


def test_kubernetes_pod(parse: Any) -> None:
    resources = kubernetes()
    pod = resources["StatefulSet"]["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    args = parse(
        [
            *entry(),
            *(one.replace("$(ADMIN_API_KEY)", "secret").replace("$(API_KEY)", "key") for one in server["args"]),
        ]
    )
    settings = args.unified_cache_external_linker_config["linker_extra_config"]
    assert pod["securityContext"]["runAsUser"] == USER
    limit = int(server["resources"]["limits"]["memory"].removesuffix("Gi")) << 30
    assert settings["host_size"] + (32 << 30) < limit
    (mount,) = [one["mountPath"] for one in server["volumeMounts"] if one["name"] == "kv"]
    assert Path(settings["disk_path"]).parent == Path(mount)
    volume = int(resources["PersistentVolume"]["spec"]["capacity"]["storage"].removesuffix("Ti")) << 40
    assert settings["disk_size"] < 0.95 * volume
    mounted = {mount["name"] for mount in server["volumeMounts"]}
    claims = resources["StatefulSet"]["spec"]["volumeClaimTemplates"]
    assert mounted == {one["name"] for one in pod["volumes"]} | {claim["metadata"]["name"] for claim in claims}
    assert pod["terminationGracePeriodSeconds"] >= 5 + 5 + 60 + 15


def test_a_volume_as_kubernetes_mounts_it(tmp_path: Path) -> None:
    """With `fsGroup`, kubelet makes the volume's root writable for the group, with the set-group-id bit."""
    volume = tmp_path / "kv"
    volume.mkdir()
    volume.chmod(0o2770)
    with pytest.raises(PermissionError, match="give a directory in it"):
        make_private(volume)
    make_private(volume / "store")


def unit(python: str) -> str:
    return (DEPLOY / "sglang-cached-attention.service").read_text().replace("/opt/sglang/bin/python", python)


def test_the_service_starts_a_server(parse: Any) -> None:
    (command,) = re.findall(r"^ExecStart=(.*)$", unit("python").replace("\\\n", " "), re.MULTILINE)
    command = command.replace("%S", "/var/lib")
    for name, value in SETTINGS.items():
        command = command.replace(f"${{{name}}}", value).replace(f"${name}", value)
    assert "$" not in command
    args = parse(shlex.split(command)[3:])
    assert args.tp_size == 2
    named = set(re.findall(r"^(\w+)=", (DEPLOY / "sglang-cached-attention.env").read_text(), re.MULTILINE))
    assert named == set(re.findall(r"\$\{?(\w+)", unit("python")))


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_takes_the_service(tmp_path: Path) -> None:
    service = tmp_path / "sglang-cached-attention.service"
    service.write_text(unit(sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", service], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    exposure = ["systemd-analyze", "security", "--offline=yes", "--threshold=25", service]
    assert subprocess.run(exposure, capture_output=True, check=False).returncode == 0
