"""Start, stop and examine the containers of compose.yml: what `make up down logs health` call. Standard library only."""
import argparse
import os
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

HERE = Path(__file__).resolve().parent
OTHER_USER = 10001  # runs the containers when root starts them
SECONDS = 600  # to build, start and become healthy


def ports(env):
    "What answers where, by name: (profile, URL)."
    at = lambda key, default: env.get(f"HMS_{key}") or default
    return {"service": ("core", f"http://127.0.0.1:{at('DEPLOYMENT_SERVICE_PORT', '8000')}/health/ready"),
            "prometheus": ("monitor", f"http://127.0.0.1:{at('MONITORING_PROMETHEUS_PORT', '9090')}/-/ready"),
            "grafana": ("monitor", f"http://127.0.0.1:{at('MONITORING_GRAFANA_PORT', '3001')}/api/health"),
            "app": ("dash", "http://127.0.0.1:7860/"), "lab": ("dev", "http://127.0.0.1:8888/api"), "mlflow": ("track", "http://127.0.0.1:5000/health")}


def write_private(path, text, owner):
    "Write a file that only its owner reads."
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "w") as f: f.write(text)
    os.chmod(path, 0o600)
    if os.getuid() == 0: os.chown(path, owner, owner)


def prepare(folder=HERE):
    "Make what the first start needs: folders, secrets, the user of the containers. What is there stays."
    uid = os.getuid() or OTHER_USER
    gid = os.getgid() if os.getuid() else OTHER_USER
    state = folder / "state"
    for name in ("", "secrets", "outputs", "prometheus", "grafana"):
        (state / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.getuid() == 0: os.chown(state / name, uid, gid)
    for name in ("hms_secret", "grafana_password"):
        if not (path := state / "secrets" / name).exists(): write_private(path, secrets.token_urlsafe(48), uid)
    if not (token := state / "secrets" / "metrics_token").exists(): write_private(token, "", uid)
    env = folder / ".env"
    kept = [line for line in env.read_text().splitlines() if not line.startswith(("HMS_UID=", "HMS_GID="))] if env.exists() else []
    write_private(env, "\n".join([*kept, f"HMS_UID={uid}", f"HMS_GID={gid}"]) + "\n", os.getuid())
    return state


def compose(*words, capture=False, env=None):
    "Run docker compose on our file."
    command = ["docker", "compose", "--project-directory", str(HERE), "--file", str(HERE / "compose.yml"), *words]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE if capture else None, env=env)


def need_engine():
    "Leave with a clear line when there is nothing that runs containers."
    if not shutil.which("docker"): sys.exit("docker is not installed; without containers: hms serve, then make health")
    for words, what in ((["compose", "version"], "docker has no compose plugin (version 2 or newer)"), (["info"], "docker is installed, but its daemon does not answer")):
        if subprocess.run(["docker", *words], capture_output=True).returncode: sys.exit(f"{what}; without containers: hms serve, then make health")


def up(profiles):
    "Start profiles and wait until everything is healthy."
    need_engine()
    state = prepare()
    chosen = [w for p in profiles for w in ("--profile", p)]
    if "monitor" in profiles:  # Prometheus reads the file at every scrape
        compose("--profile", "monitor", "build", "serve")
        token = compose("--profile", "monitor", "run", "--rm", "--no-deps", "-T", "serve", "hms", "token", "create", "--scope", "metrics", "--subject", "prometheus", "--ttl", "365d", capture=True).stdout
        write_private(state / "secrets" / "metrics_token", token.strip(), os.getuid() or OTHER_USER)
    try: compose(*chosen, "up", "--detach", "--build", "--wait", "--wait-timeout", str(SECONDS))
    except subprocess.CalledProcessError as e: sys.exit(f"not everything became healthy (docker compose said {e.returncode}); see make logs")
    for name, (profile, url) in ports(settings()).items():
        if profile in profiles or (name == "service" and "monitor" in profiles): print(f"{name:<12}{url}")
    if "monitor" in profiles: print(f"Grafana: user admin, password in {state / 'secrets' / 'grafana_password'}")


def settings(folder=HERE):
    "deploy/.env, then the environment."
    lines = (folder / ".env").read_text().splitlines() if (folder / ".env").exists() else []
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#")) | dict(os.environ)


def ask(url):
    "ok, or what is wrong."
    try:
        with urlopen(url, timeout=5) as reply: return "ok" if reply.status == 200 else f"status {reply.status}"
    except HTTPError as e: return f"status {e.code}"
    except OSError as e: return "does not answer" if "refused" in str(e) else f"does not answer ({e})"


def health(profiles, wait):
    "Ask everything that the profiles should run; 1 unless all of it answers."
    end = time.monotonic() + wait
    asked = {name: url for name, (profile, url) in ports(settings()).items() if profile in profiles or (name == "service" and "monitor" in profiles)}
    while True:
        found = {name: ask(url) for name, url in asked.items()}
        good = all(v == "ok" for v in found.values())
        if good or time.monotonic() >= end: break
        time.sleep(1)
    for name, verdict in found.items(): print(f"{name:<12}{verdict:<24}{asked[name]}")
    return 0 if good else 1


def main():
    "Read the command line."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verb", choices=["up", "down", "logs", "health", "secrets"])
    parser.add_argument("words", nargs="*", help="profiles: core dash monitor track dev; for logs: services")
    parser.add_argument("--wait", type=float, default=0, help="health: seconds to wait for it")
    given = parser.parse_args()
    profiles = given.words or ["core"]
    known = {"core", "dash", "monitor", "track", "dev"}
    if given.verb in ("up", "health") and (bad := set(profiles) - known): parser.error(f"no profile {min(bad)}; there are {', '.join(sorted(known))}")
    if given.verb == "secrets": print(prepare() / "secrets")
    elif given.verb == "up": up(profiles)
    elif given.verb == "health": sys.exit(health(profiles, given.wait))
    else:
        need_engine()
        every = [w for p in sorted(known) for w in ("--profile", p)]
        prepare()
        compose(*every, *(["down", "--remove-orphans", "--timeout", "40"] if given.verb == "down" else ["logs", "--tail", "100", *given.words]))


if __name__ == "__main__":
    main()
